"""The one exception a user's mistake raises, so that programs can tell it from a bug."""


class InputError(ValueError):
    """Something the user gave cannot be used: a file, a row, an option, a folder.

    The message says what was wrong, where (file, row, option), and how to put it right. `cli.run` prints it without a
    traceback and exits with status 2.
    """
