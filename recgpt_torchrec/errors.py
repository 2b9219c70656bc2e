"""The exception for errors in the user's input, the exit statuses, and the signals that ask a program to end."""

import signal

REFUSED = 2
"""Exit status if something that the user gave cannot be used; another start will not help."""
LOST = 69
"""Exit status of a rank that ended because another rank ended or never started: EX_UNAVAILABLE of sysexits.h."""
STALLED = 70
"""Exit status of a rank that ended because the run made no progress: EX_SOFTWARE of sysexits.h."""
STOPPED = 75
"""Exit status of a run that a signal ended and that can resume: EX_TEMPFAIL of sysexits.h, "try again later"."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals with which schedulers ask a run to end."""


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a row, an option, a folder.

    The message says what is wrong, where (file, row, option), and how to fix it. `cli.run` prints it without a
    traceback and exits with status 2.
    """

    is_told = False
    """Whether another rank prints the same message, so that this one need not."""
    identity = ""
    """What is the same on every rank that meets this error, where the message is not."""


class StorageError(OSError):
    """A disk, a mount or a network failed, which another start may find mended.

    The message names the node and the file or folder. `cli.run` prints it and exits with status 1.
    """

    identity = ""
    """See `InputError`."""


class OtherRanksError(OSError):
    """An error of the system that another rank has met, with its number."""

    host = ""
    """Name of that rank's node."""
