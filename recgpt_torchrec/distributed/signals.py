"""Being asked to end: Slurm, Kubernetes and torchrun send SIGTERM or SIGUSR1 some time before they kill.

The first such signal only asks. `training.lockstep` tells the other ranks, all of them end at the same step with
`Stopped`, and the trainer saves. Another signal, `AGAIN_SECONDS` later or more, ends the process at once. (Schedulers
signal the launcher and its processes alike, and the launcher passes its own on: one request arrives twice.)
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from recgpt_torchrec.errors import STOP_SIGNALS, STOPPED

AGAIN_SECONDS = 3.0

_received: signal.Signals | None = None


class Stopped(SystemExit):
    """Raised on every rank at the same step where one of them was asked to end; left alone it ends the process."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def received_signal() -> signal.Signals | None:
    """The signal by which this process was asked to end, if it was."""
    return _received


@contextlib.contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Take the signals for requests within the `with`; outside of it they end the process, as by default.

    Python runs handlers between two steps of the main thread, which may be waiting for other ranks for ever; so a
    thread listens to the pipe into which the interpreter writes each signal as it arrives.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    _received = None
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_listen, args=(reading,), daemon=True, name="signals").start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.siginterrupt(number, False)  # libraries that write files need not know of it
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writing)


def _listen(reading: int) -> None:
    global _received
    since = 0.0
    while number := os.read(reading, 1):
        if number[0] not in STOP_SIGNALS:
            continue
        if _received is None:
            _received, since = signal.Signals(number[0]), time.monotonic()
        elif time.monotonic() - since >= AGAIN_SECONDS:
            print(f"{signal.Signals(number[0]).name} again: ending at once", file=sys.stderr, flush=True)
            os._exit(128 + number[0])
    os.close(reading)
