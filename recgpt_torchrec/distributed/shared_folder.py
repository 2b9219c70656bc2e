"""What ranks share on disk: an output folder that all write into, and bytes that one rank per node reads for all."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pyarrow.fs

from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, local_world_size, rank, run_on_first_rank
from recgpt_torchrec.distributed.watchdog import beat, tracked_phase
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import filesystem, find_storage_failure, folders
from recgpt_torchrec.storage.buffers import IN_MEMORY, Buffer, Fill, named_buffer, open_buffer
from recgpt_torchrec.storage.manifests import FolderManifest
from recgpt_torchrec.storage.visibility import await_parts


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
        folders.raise_write_error(error, path)
        raise
    run_on_first_rank(lambda: staged.__exit__(None, None, None))  # no rank returns before the folder is committed


def write_shared_manifest(fs: pyarrow.fs.FileSystem, folder: str, manifest: FolderManifest) -> None:
    """Write the manifest of a folder that all ranks have written parts into (call on one rank, after all have).

    Raises:
        InputError: this node does not see all parts, or the manifest cannot be written.
    """
    await_parts(fs, folder, manifest.all_parts, beat)
    folders.write_manifest(fs, folder, manifest.to_json())


def read_on_node(name: str, size: int, fill: Fill, total: float, unit: str) -> Buffer:
    """Read bytes that every rank needs (collective): small ones into its memory, larger ones once per node into a file
    in the machine's temporary folder, which all ranks of the node map.

    Args:
        name: of what is read, for progress and messages.
        size: of the bytes, the same on every rank.
        fill: reads them.
        total: amount of work of `fill`, in `unit`.
        unit: what is counted, in the plural.

    Raises:
        InputError: on every rank, where `fill` raises it on one, or the disk is full.
    """
    failure: Exception | None = None
    buffer: Buffer | None = None

    def filled(made: Buffer) -> Buffer:
        with tracked_phase(f"reading {name}", total, unit) as advance:
            fill(made.bytes, advance)
        return made

    first = rank() - rank() % local_world_size()
    with ExitStack() as until_mapped:
        path = ""
        try:
            if size <= IN_MEMORY:
                buffer = filled(Buffer(np.zeros(size, np.uint8)))
            elif rank() == first:
                path, empty = until_mapped.enter_context(named_buffer(size))
                buffer = filled(empty)
        except OSError as error:
            failure = find_storage_failure(error, tempfile.gettempdir(), f"keep {name} in") or InputError(
                f"{name} cannot be kept in {tempfile.gettempdir()}: {error}; free {size:,} bytes there, or set TMPDIR "
                "to another folder on a local disk"
            )
        except Exception as error:
            failure = error
        raise_first_error(failure)
        if size > IN_MEMORY:
            paths = gather_objects(path)
            try:
                if buffer is None:
                    buffer = open_buffer(paths[first], size)
            except OSError:
                pass  # the first rank's folder is another one: this rank makes a file of its own below
            gather_objects(None)  # the file keeps its name until all ranks of the node have opened it
    try:
        if buffer is None:
            with named_buffer(size) as (_, empty):
                buffer = filled(empty)
    except Exception as error:
        failure = error
    raise_first_error(failure)
    assert buffer is not None
    return buffer
