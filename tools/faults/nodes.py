"""Two nodes on one machine: network namespaces with host names of their own, joined by a switch; root is needed.

A third namespace holds the switch, so that nothing of the machine's own network is touched. The nodes share its disks;
each has mounts of its own, which follow those of the machine.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.faults.clock import shift_clock

NODES = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 0x80000


def explain_missing() -> str | None:
    """Why this machine cannot have such nodes; None: it can."""
    if os.geteuid():
        return "network namespaces need root"
    if missing := [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} is not installed"
    name = f"recgpt-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "the kernel gives no network namespaces here"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@dataclass
class Launched:
    """The launcher of a job on one node."""

    pid: int
    output: Path
    """File with what it and its ranks said."""
    status: int | None = None
    """Exit status once it has ended; negative: the signal that killed it."""

    def poll(self) -> int | None:
        """The exit status; None: it runs."""
        if self.status is None:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(code) if pid else None
        return self.status

    def reap(self) -> None:
        """Wait for its end."""
        while self.poll() is None:
            time.sleep(0.01)


def address(node: int) -> str:
    """The address of a node, which the other can reach."""
    return f"10.77.0.{node + 1}"


class Nodes:
    """The two nodes, `node0` and `node1`.

    Example: `with Nodes() as nodes: nodes.launch(0, (run_stage, ["{}", "pretrain", ...]), output, "job")`
    """

    def __init__(self) -> None:
        self.prefix = f"recgpt-{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.spaces = [f"{self.prefix}-{node}" for node in range(NODES)]
        self.folder = tempfile.mkdtemp(prefix="recgpt-nodes-")

    def __enter__(self) -> "Nodes":
        hosts = "127.0.0.1 localhost\n" + "".join(f"{address(n)} {self.host(n)}\n" for n in range(NODES))
        Path(self.folder, "hosts").write_text(hosts)
        Path(self.folder, "resolv.conf").write_text("")
        _run("ip", "netns", "add", self.switch)
        _run("ip", "-n", self.switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "bridge0", "up")
        for node, space in enumerate(self.spaces):
            _run("ip", "netns", "add", space)
            end = ["peer", "name", "eth0", "netns", space]
            _run("ip", "-n", self.switch, "link", "add", f"port{node}", "type", "veth", *end)
            _run("ip", "-n", self.switch, "link", "set", f"port{node}", "master", "bridge0", "up")
            _run("ip", "-n", space, "address", "add", f"{address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for node, space in enumerate(self.spaces):
            self.kill(node)
            subprocess.run(["ip", "netns", "delete", space])
        subprocess.run(["ip", "netns", "delete", self.switch])
        shutil.rmtree(self.folder, ignore_errors=True)

    def host(self, node: int) -> str:
        """The host name of a node."""
        return f"node{node}"

    def launch(
        self,
        node: int,
        entry: tuple[Callable[..., None], Sequence[Any]],
        output: Path,
        job: str,
        hours: float = 0.0,
    ) -> Launched:
        """Start the launcher of a job on a node, with one rank.

        Args:
            node: its number.
            entry: what the rank calls, and with which arguments.
            output: file for what is said.
            job: its id, the same on both nodes.
            hours: by which the clock of launcher and rank is ahead.
        """
        words = ["--nnodes", str(NODES), "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", job]
        words += ["--local_addr", address(node), "--rdzv_endpoint", f"{address(0)}:29400"]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.setsid()
                handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                self._enter(node)
                os.environ |= environment
                if hours:
                    shift_clock(hours)
                status = _run_launcher(words, entry)
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        return Launched(pid, output)

    def _enter(self, node: int) -> None:
        """Move this process to a node."""
        libc = ctypes.CDLL(None, use_errno=True)

        def check(status: int) -> None:
            if status:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

        space = os.open(f"/run/netns/{self.spaces[node]}", os.O_RDONLY)
        check(libc.setns(space, CLONE_NEWNET))
        check(libc.unshare(CLONE_NEWUTS | CLONE_NEWNS))
        check(libc.mount(None, b"/", None, MS_SLAVE | MS_REC, None))
        for name in ("hosts", "resolv.conf"):
            check(libc.mount(f"{self.folder}/{name}".encode(), f"/etc/{name}".encode(), None, MS_BIND, None))
        socket.sethostname(self.host(node))

    def pids(self, node: int) -> list[int]:
        """The processes on a node."""
        listed = subprocess.run(["ip", "netns", "pids", self.spaces[node]], capture_output=True, text=True)
        return [int(word) for word in listed.stdout.split()]

    def send(self, node: int, number: signal.Signals) -> None:
        """Send a signal to all processes of a node."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, node: int) -> None:
        """Kill all processes of a node, as a loss of power does."""
        while self.pids(node):
            self.send(node, signal.SIGKILL)
            time.sleep(0.02)

    def plug(self, node: int, state: str) -> None:
        """Connect a node's cable (`up`) or disconnect it (`down`): packets are lost, and nothing says so."""
        _run("ip", "-n", self.switch, "link", "set", f"port{node}", state)

    def unmount(self, node: int, path: Path) -> None:
        """Take a mount away from all processes of a node, and of no other; an empty folder of the node's own is there.

        Where the mount was both nodes would else see the same folder of this machine's disk.
        """
        spaces: dict[Any, int] = {}
        for pid in self.pids(node):
            with contextlib.suppress(OSError):
                spaces[os.readlink(f"/proc/{pid}/ns/mnt")] = pid
        for pid in spaces.values():
            in_node = ["nsenter", "--target", str(pid), "--mount"]
            _run(*in_node, "umount", "--lazy", str(path))
            _run(*in_node, "mount", "-t", "tmpfs", "-o", "size=64m", "recgpt-own", str(path))


@contextlib.contextmanager
def scratch_disk(path: Path, mebibytes: int) -> Any:
    """Mount an empty disk of some size at `path` within the `with`."""
    path.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "recgpt-faults", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)])


def _run_launcher(words: list[str], entry: tuple[Callable[..., None], Sequence[Any]]) -> int:
    """The launcher's main program; returns its exit status.

    Its rank is a fork of it, and nothing is imported again: a job starts in 2 s instead of 20.
    """
    from torch.distributed import run

    from recgpt_torchrec.launch import node

    function, arguments = entry
    module = function.__module__
    sys.argv = ["node", *words, "-m", module, *arguments]
    made = run.config_from_args

    def config_from_args(given: Any) -> Any:
        config, _, _ = made(given)
        config.start_method = "fork"
        return config, function, arguments

    run.config_from_args = config_from_args  # type: ignore[assignment]
    try:
        node.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
