"""Stop signals: Slurm, Kubernetes and torchrun send SIGTERM or SIGUSR1 some time before they kill.

The first signal requests a stop: `lockstep` tells the other ranks, all raise `Stopped` at the same step, and the
trainer saves. A signal that comes `AGAIN_SECONDS` or more after it ends the process at once. (Schedulers signal both
the launcher and its processes, and the launcher forwards its own: one request arrives twice.)
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from recgpt_torchrec.errors import STOP_SIGNALS, STOPPED
from recgpt_torchrec.progress import report_failure

AGAIN_SECONDS = 3.0
"""Signals that arrive sooner after the first belong to the same request."""

_received: signal.Signals | None = None


class Stopped(SystemExit):
    """A rank received a stop signal: raised on every rank at the same step; uncaught, it exits with `STOPPED`."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def received_signal() -> signal.Signals | None:
    """The stop signal that this process has received; None: it has not."""
    return _received


@contextlib.contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Take stop signals as requests within the `with`; outside of it they end the process, as by default.

    Python runs handlers in the main thread only, which may wait for other ranks forever. So a thread reads the pipe
    into which the interpreter writes each signal as it arrives.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    _received = None
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_listen, args=(reading,), daemon=True, name="signals").start()
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.siginterrupt(number, False)  # so that system calls of libraries are restarted
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
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
            report_failure(f"{signal.Signals(number[0]).name} received again: exiting immediately")
            os._exit(128 + number[0])
    os.close(reading)
