"""Errors of storage: reads or writes below a folder fail on one node, as those of a broken disk or a stale mount do.

The calls to the system fail (see `failing_io.c`), so whoever makes them is met: Python, Arrow, torch, TensorBoard.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

VARIABLE, LIBRARY = "RECGPT_FAILING_IO", "LD_PRELOAD"


class Failure(ctypes.Structure):
    """What is to fail, as `failing_io.c` has it."""

    _fields_ = [
        ("active", ctypes.c_int),
        ("error", ctypes.c_int),
        ("writes", ctypes.c_int),
        ("host", ctypes.c_char * 64),
        ("folder", ctypes.c_char * 1024),
    ]


def explain_missing() -> str | None:
    """Why this machine cannot have such errors; None: it can."""
    return None if shutil.which("gcc") else "gcc is not installed"


def preload(folder: Path) -> None:
    """Start this program again with the library that can let calls fail, unless it has been."""
    if VARIABLE in os.environ:
        return
    folder.mkdir(parents=True, exist_ok=True)
    library, control = folder / "failing_io.so", folder / "failing_io"
    source = Path(__file__).with_name("failing_io.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    control.write_bytes(bytes(Failure()))
    environment = {**os.environ, VARIABLE: str(control), LIBRARY: str(library)}
    os.execve(sys.executable, sys.orig_argv, environment)


def let_fail(folder: Path, host: str, error: int, *, writes: bool) -> None:
    """Let reads or writes of files in `folder` fail on a host from now on.

    Args:
        folder: whose files are met.
        host: name of the node.
        error: number of the system's error.
        writes: whether writes fail, else reads.
    """
    _set(Failure(1, error, writes, host.encode(), str(folder).encode()))


def mend() -> None:
    """Let nothing fail any more."""
    _set(Failure())


def _set(failure: Failure) -> None:
    with open(os.environ[VARIABLE], "r+b") as file:
        file.write(bytes(failure))
