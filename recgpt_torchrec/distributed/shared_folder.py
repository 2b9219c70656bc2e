"""An output folder that all ranks write into, committed once all have written."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs

from recgpt_torchrec.distributed.processes import rank, run_on_first_rank
from recgpt_torchrec.storage import filesystem, folders


@contextmanager
def stage_shared_folder(path: str, name: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """Make a folder for all ranks to write into; rank 0 commits it at the end of the `with` (collective).

    Args:
        path: folder or URI; must not hold anything yet.
        name: what the folder will hold, for error messages.

    Yields:
        The file system and the folder's path on it, the same on every rank (see `folders.stage_folder`).

    Raises:
        InputError: `path` holds something already, or cannot be written.
    """
    run_on_first_rank(lambda: folders.check_free(path, name))
    staged, fs = folders.stage_folder(path), filesystem(path)[0]
    folder = run_on_first_rank(lambda: staged.__enter__()[1])
    try:
        yield fs, folder
    except BaseException as error:
        if rank() == 0:
            staged.__exit__(type(error), error, error.__traceback__)
        raise
    run_on_first_rank(lambda: staged.__exit__(None, None, None))  # no rank returns before the folder is committed
