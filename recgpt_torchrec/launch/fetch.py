"""The step of a pod before its stage: copies data from an object store, and sees that what the stage reads is there.

python -m recgpt_torchrec.launch.fetch --source s3://bucket/data --target /scratch/data --require /data/other
"""

import argparse
import os
import shutil
import socket
import sys
import time

from recgpt_torchrec.errors import LOST, REFUSED

HOST_SECONDS = 600.0
"""Maximum time to wait for a host name, in seconds: the first pod may wait for a node."""


def main() -> None:
    """Do what the options say; exits with status 2 where something is missing, 1 where a store or a disk failed."""
    parser = argparse.ArgumentParser(prog="recgpt_torchrec.launch.fetch", description=__doc__)
    parser.add_argument("--source", help="folder of an object store, as s3://bucket/folder")
    parser.add_argument("--target", help="folder that it is copied to")
    parser.add_argument("--require", action="append", default=[], help="file or folder that must be there")
    parser.add_argument("--host", help="name that must be known before the stage starts: that of the first pod")
    options = parser.parse_args()
    if (options.source is None) != (options.target is None):
        parser.error("--source and --target need each other")
    if options.source:
        try:
            copy(options.source, options.target)
        except FileNotFoundError:
            end(REFUSED, f"{options.source} is not there; give --copy_data a folder that exists")
        except (OSError, ImportError) as error:
            end(1, f"{options.source} cannot be copied: {type(error).__name__}: {error}")
    for path in options.require:
        if not os.path.exists(path):
            end(REFUSED, f"{path} is not there; put it on the volume, or correct the option that names it")
    if options.host and not wait_for_host(options.host, HOST_SECONDS):
        end(LOST, f"{options.host} has no address after {HOST_SECONDS:.0f} s; does the headless service exist?")


def copy(source: str, target: str) -> None:
    """Copy a folder from an object store. A folder that is there has been copied whole, and is left as it is.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the store or the disk failed.
        ImportError: the store's client is not installed.
    """
    import fsspec

    if os.path.exists(target):
        print(f"Already there: {target}", flush=True)
        return
    system, root = fsspec.core.url_to_fs(source)
    files = {path: size for path, size in system.find(root, detail=True).items() if size["type"] == "file"}
    if not files:
        raise FileNotFoundError(source)
    started, partial = time.perf_counter(), f"{target}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path in files:
        place = os.path.join(partial, os.path.relpath(path, root))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        system.get_file(path, place)
    os.rename(partial, target)
    total = sum(each["size"] for each in files.values())
    print(
        f"Copied:  {source} -> {target}, {len(files)} files, {total / 1e6:,.1f} MB in "
        f"{time.perf_counter() - started:.1f} s",
        flush=True,
    )


def wait_for_host(name: str, seconds: float) -> bool:
    """Wait until a host name has an address; returns whether it has one."""
    limit = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(name, None)
            return True
        except socket.gaierror:
            if time.monotonic() > limit:
                return False
            time.sleep(min(1.0, seconds))


def end(status: int, message: str) -> None:
    """End with a status, and a message on standard error."""
    print(f"recgpt_torchrec.launch.fetch: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
