"""How a program ends: the exception that a user's mistake raises, exit statuses, and signals that ask it to end."""

import signal

REFUSED = 2
"""Exit status where something that the user gave cannot be used; another start will not help."""
LOST = 69
"""Exit status of a rank that ended because another one did, or never came: EX_UNAVAILABLE of sysexits.h."""
STALLED = 70
"""Exit status of a rank that ended because nothing moved: EX_SOFTWARE of sysexits.h."""
STOPPED = 75
"""Exit status of a run that was asked to end and can resume: EX_TEMPFAIL of sysexits.h, "try again later"."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which schedulers ask a run to end."""


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a row, an option, a folder.

    The message says what was wrong, where (file, row, option), and how to put it right. `cli.run` prints it without a
    traceback and exits with status 2.
    """
