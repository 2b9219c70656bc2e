"""A folder that all processes write their shares into, and that is committed whole."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pyarrow.fs

from recgpt_torchrec.distributed.processes import gather_objects, rank, run_on_first_rank
from recgpt_torchrec.storage import filesystem, folders


@contextmanager
def stage_shared_folder(path: str, name: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """`folders.stage_folder` for all processes (collective): rank 0 makes the folder, and gives it its name at the end.

    `path` must be free; `name` says in messages what is to lie there.

    Yields:
        The file system, and the folder on it, the same on every process.
    """
    run_on_first_rank(lambda: folders.check_free(path, name))
    with folders.stage_folder(path) if rank() == 0 else nullcontext((filesystem(path)[0], "")) as (fs, folder):
        yield fs, gather_objects(folder)[0]
    gather_objects(None)  # nobody returns before the folder has its name
