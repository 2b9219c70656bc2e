"""An output folder that all ranks write into, committed once all have written."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pyarrow.fs

from recgpt_torchrec.distributed.processes import gather_objects, rank, run_on_first_rank
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
        InputError: `path` holds something already.
    """
    run_on_first_rank(lambda: folders.check_free(path, name))
    with folders.stage_folder(path) if rank() == 0 else nullcontext((filesystem(path)[0], "")) as (fs, folder):
        yield fs, gather_objects(folder)[0]
    gather_objects(None)  # no rank returns before the folder is committed
