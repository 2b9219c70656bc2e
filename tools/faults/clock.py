"""Another time of day for a process and its forks: what Python's `time` and `datetime` say.

Time since boot stays right, as on a node whose clock is wrong, and times of files are those of the disk. (Debian's
libfaketime 0.9.10 breaks `time.sleep` of Python 3.11 where it leaves the time since boot alone.)
"""

import datetime
import sys
import time
from typing import Any, Self

TRUE_DATETIME = datetime.datetime


def at_time(seconds: float, zone: Any) -> datetime.datetime:
    """The `datetime` of this process at a time: what a shifted one is pickled as."""
    return datetime.datetime.fromtimestamp(seconds, zone)


def shift_clock(hours: float) -> None:
    """Let this process think that it is some hours later, also modules that it imports afterwards.

    A part of a program with another clock than the rest is no wrong clock: torchrun then takes its own node for lost
    again and again.
    """
    seconds, true_time, true_time_ns = hours * 3600, time.time, time.time_ns

    class AnyDatetime(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, TRUE_DATETIME)

    class Shifted(TRUE_DATETIME, metaclass=AnyDatetime):
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
            return at_time, (self.timestamp(), self.tzinfo)

    time.time, time.time_ns = lambda: true_time() + seconds, lambda: true_time_ns() + int(seconds * 1e9)
    for module in [*sys.modules.values()]:
        if getattr(module, "datetime", None) is TRUE_DATETIME:
            module.datetime = Shifted  # type: ignore[attr-defined]
