"""Messages and progress bars.

Messages go through the logger `recgpt_torchrec` to standard output; a program that uses the package may give it other
handlers. Progress is a bar on a terminal, and one line every 15 seconds in a file or under a launcher. In a job's log
file each line starts with the time and the rank.
"""

import io
import logging
import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 15.0
"""Seconds between lines of progress where there is no terminal."""


def stamped(text: str, stream: TextIO) -> str:
    """A message with the time and the rank before each line; unchanged on a terminal and outside a job."""
    if "WORLD_SIZE" not in os.environ or stream.isatty():
        return text
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {os.environ.get('RANK', 0)}: "
    return "\n".join(stamp + line for line in text.splitlines())


def open_streams() -> None:
    """Make standard output and standard error streams that any message can be written to.

    Where one is closed (`2>&-`), messages go nowhere, and no file that is opened later takes its number, which
    libraries write to. A letter that a stream's encoding lacks (PYTHONIOENCODING=ascii) is written as its escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest number that is free. Loader processes are to have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="backslashreplace")


def is_output_lost() -> bool:
    """Whether standard output cannot be written: nobody reads it any more, or its disk is full.

    It writes an empty line.
    """
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        return True
    return False


class _Output(logging.Handler):
    """Writes messages to the current `sys.stdout`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, above the progress bar if there is one."""
        text = stamped(self.format(record), sys.stdout)
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)


LOGGER = logging.getLogger("recgpt_torchrec")
if not LOGGER.handlers:
    LOGGER.addHandler(_Output())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # other libraries add handlers to the root logger, which would print each line twice


def report_failure(text: str) -> None:
    """Say on standard error why this process ends, with time and rank in a job's log file.

    It takes no lock that another thread may hold: a watchdog has to be heard when nothing else moves.
    """
    print(stamped(text, sys.stderr), file=sys.stderr, flush=True)


class _Lines(tqdm):
    """A progress bar that writes whole lines, for launchers that put a prefix before each line."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the bar's state as one line, once there is progress."""
        if self.n > self.initial and msg != "":
            print(stamped(str(self) if msg is None else msg, sys.stderr), file=sys.stderr, flush=True)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show `s` from the next line on; a line of its own for each would be too many."""
        super().set_postfix_str(s, refresh=False)

    def close(self) -> None:
        """End without another line."""
        self.disable = True


def progress_bar(total: float | None, unit: str, *, done: float = 0, active: bool = True, **options: Any) -> tqdm:
    """A progress bar with rate and remaining time.

    Args:
        total: amount of work, in `unit`; None: unknown.
        unit: what is counted, in the plural.
        done: amount that an earlier run has done.
        active: whether to show anything; False on every rank but 0.
        options: other options of tqdm.

    Example: `with progress_bar(len(users), "users") as bar: bar.update(32)`
    """
    common = {"total": total, "initial": done, "unit": f" {unit}", "disable": not active, **options}
    if sys.stderr.isatty():
        return tqdm(**common, dynamic_ncols=True, mininterval=0.5)
    line = "{desc}{percentage:3.0f}% of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"
    return _Lines(**common, mininterval=EVERY, miniters=1, bar_format=line if total else None)
