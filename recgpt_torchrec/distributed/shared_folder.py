"""A folder that all processes write their shares into, and that is committed whole."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pyarrow.fs

from recgpt_torchrec.distributed.processes import gather, rank, together
from recgpt_torchrec.storage import filesystem, folders


@contextmanager
def staged(path: str, name: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """`folders.staged` for all processes (collective): rank 0 makes the folder, and gives it its name at the end.

    `path` must be free; `name` says in messages what is to lie there.

    Yields:
        The file system, and the folder on it, the same on every process.
    """
    together(lambda: folders.check_free(path, name))
    with folders.staged(path) if rank() == 0 else nullcontext((filesystem(path)[0], "")) as (fs, folder):
        yield fs, gather(folder)[0]
    gather(None)  # nobody returns before the folder has its name
