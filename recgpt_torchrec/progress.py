"""Progress of long work: a bar on a terminal, a plain line now and then where output goes to a file or a launcher."""

import sys
from typing import Any

from tqdm import tqdm

EVERY = 15.0
"""Seconds between lines where there is no terminal."""


class _Lines(tqdm):
    """A progress bar that writes whole lines: a launcher that puts a prefix before each line breaks bars."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the bar's state as one line, once something was done."""
        if self.n > self.initial and msg != "":
            print(str(self) if msg is None else msg, file=sys.stderr, flush=True)

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Write a line of its own; there is no bar to move out of the way."""
        print(s, file=file, end=end, flush=True)

    def close(self) -> None:
        """End without another line."""
        self.disable = True


def bar(total: float | None, unit: str, *, done: float = 0, active: bool = True, **options: Any) -> tqdm:
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
