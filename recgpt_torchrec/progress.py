"""Messages and progress of long work: a bar on a terminal, a plain line now and then where output goes to a file or a
launcher, and in a job's log file the time and the rank before each line.

Messages go through the logger `recgpt_torchrec`, to standard output; a program that uses the package may give it other
handlers.
"""

import logging
import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 15.0
"""Seconds between lines where there is no terminal."""


def stamped(text: str, stream: TextIO) -> str:
    """A message as it is written to a stream: as it is, or in the log file of a job with the time and the rank before
    each line."""
    if "WORLD_SIZE" not in os.environ or stream.isatty():
        return text
    before = f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {os.environ.get('RANK', 0)}: "
    return "\n".join(before + line for line in text.splitlines())


class _Output(logging.Handler):
    """Writes messages to what is standard output at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; above the bar, where there is one."""
        text = stamped(self.format(record), sys.stdout)
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)


LOGGER = logging.getLogger("recgpt_torchrec")
if not LOGGER.handlers:
    LOGGER.addHandler(_Output())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # libraries give the root logger handlers of theirs, and lines would come twice


class _Lines(tqdm):
    """A progress bar that writes whole lines: a launcher that puts a prefix before each line breaks bars."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the bar's state as one line, once something was done."""
        if self.n > self.initial and msg != "":
            print(stamped(str(self) if msg is None else msg, sys.stderr), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End without another line."""
        self.disable = True


def progress_bar(total: float | None, unit: str, *, done: float = 0, active: bool = True, **options: Any) -> tqdm:
    """A progress bar with rate and time left.

    Args:
        total: of the work, in `unit`; None: not known.
        unit: what is counted, in the plural.
        done: what an earlier run did already.
        active: False shows nothing (every rank but 0).
        options: of tqdm.

    Example: `with bar(len(users), "users") as shown: shown.update(32)`
    """
    common = {"total": total, "initial": done, "unit": f" {unit}", "disable": not active, **options}
    if sys.stderr.isatty():
        return tqdm(**common, dynamic_ncols=True, mininterval=0.5)
    line = "{desc}{percentage:3.0f}% of {total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"
    return _Lines(**common, mininterval=EVERY, miniters=1, leave=False, bar_format=line if total else None)
