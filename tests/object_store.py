"""A real S3 server as a process: moto's, for tests of everything that may lie on an object store."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

BUCKET = "bucket"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int

    def request(self, method: str, path: str) -> None:
        """Ask it something directly."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path)
        assert connection.getresponse().status == 200
        connection.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def server(timeout_s: float = 60.0) -> Iterator[Server]:
    """Start one with an empty bucket; it is gone when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "TZ": "UTC"})
        try:
            deadline = time.monotonic() + timeout_s
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"moto's server did not start:\n{said.read().decode()[-2000:]}")
                time.sleep(0.05)
            running = Server(process, port)
            running.request("PUT", f"/{BUCKET}")
            yield running
        finally:
            process.kill()
            process.wait()
