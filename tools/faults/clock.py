"""Another time of day for a process and its forks: what Python's `time` and `datetime` say.

Time since boot stays right, as on a node whose clock is wrong, and times of files are those of the disk. (Debian's
libfaketime 0.9.10 breaks `time.sleep` of Python 3.11 where it leaves the time since boot alone.)
"""

import datetime
import sys
import time
from typing import Any, Self


def shift_clock(hours: float) -> None:
    """Let this process think that it is some hours later."""
    seconds, real = hours * 3600, datetime.datetime
    true_time, true_time_ns = time.time, time.time_ns

    class Shifted(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Self:
            return cls.fromtimestamp(true_time() + seconds, tz)

        @classmethod
        def utcnow(cls) -> Self:
            return cls.now(datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Self:
            return cls.now()

        def __reduce_ex__(self, protocol: Any) -> Any:
            return real.fromtimestamp, (self.timestamp(), self.tzinfo)

    time.time, time.time_ns = lambda: true_time() + seconds, lambda: true_time_ns() + int(seconds * 1e9)
    for module in [*sys.modules.values()]:
        if module is not datetime and getattr(module, "datetime", None) is real:
            module.datetime = Shifted  # type: ignore[attr-defined]
