"""Checkpoints of a run on disk: torch.distributed.checkpoint folders that count only once they are committed.

    OUTPUT/checkpoints/step-00001200/   the distributed checkpoint, and checkpoint.json, written last
    OUTPUT/best.json                    which of them is best on validation

On a local disk a checkpoint is written under a temporary name and renamed when it is whole; where the output is a URI
it is written where it belongs, and checkpoint.json, written last, is what makes it one. Readers look at nothing else.
Whatever comes after that (best.json, dropping old ones) follows from the checkpoints, so that it can be made up for
after a kill. `saving` writes them, `state` says what is in them.
"""

import hashlib
import io
import os
import shutil
import zipfile
from dataclasses import dataclass
from typing import IO, Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageReaderTransforms

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.direct_io import DirectFiles
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.parts import checksum_of

METADATA = "checkpoint.json"
BEST = "best.json"
FOLDER = "checkpoints"
TEMPORARY = ".tmp"


@dataclass
class Checkpoints:
    """The checkpoints of one run's output folder."""

    output: str
    keep: int
    """Newest checkpoints kept, beside the best one."""

    @property
    def folder(self) -> str:
        """Where the checkpoints lie."""
        return os.path.join(self.output, FOLDER)

    def path(self, step: int) -> str:
        """Where the checkpoint lies that is made after `step` steps."""
        return os.path.join(self.folder, f"step-{step:08d}")

    def temporary(self, step: int) -> str:
        """Where it is written before it counts; at once in its place where folders cannot be renamed."""
        return self.path(step) + ("" if storage.remote(self.output) else TEMPORARY)

    def committed(self) -> list[str]:
        """Paths of the checkpoints that are whole, oldest first."""
        paths = [path for path in self._all() if not path.endswith(TEMPORARY)]
        return [path for path in paths if is_complete(path)]

    def _all(self) -> list[str]:
        return [os.path.join(self.folder, name) for name in storage.names(self.folder) if name.startswith("step-")]

    def latest(self) -> str | None:
        """The newest whole checkpoint."""
        return next(reversed(self.committed()), None)

    def best(self) -> str | None:
        """The checkpoint that did best on validation."""
        found = storage.read_json(os.path.join(self.output, BEST))
        path = found and os.path.join(self.folder, found["checkpoint"])
        return path if path and is_complete(path) else None

    def begin(self, step: int) -> None:
        """Make an empty folder to write a checkpoint into, `temporary` (on one rank)."""
        storage.remove(self.temporary(step), first=METADATA)
        storage.make_folder(self.temporary(step))

    def commit(self, step: int, metadata: dict[str, Any]) -> None:
        """Make what was written after `begin` a checkpoint, and settle what follows from it (on one rank).

        Where the step has a checkpoint already only its metadata is written: nothing was trained in between, and at no
        moment may there be none.

        Args:
            step: optimizer steps done.
            metadata: JSON values that readers need before they build a model. `best` among them holds what becomes
                best.json: its `checkpoint` names the best one so far, or is None.
        """
        path, temporary = self.path(step), self.temporary(step)
        if storage.remote(self.output) or is_complete(path):
            storage.write_json(os.path.join(path, METADATA), metadata)
        else:
            storage.write_json(os.path.join(temporary, METADATA), metadata)
            _sync(temporary)
            os.rename(temporary, path)
            _sync(self.folder)
        self.settle()

    def settle(self) -> None:
        """Bring everything in line with the newest checkpoint: best.json, and no half or dropped ones (on one rank)."""
        there = self.committed()
        if there:
            best = read_metadata(there[-1]).get("best", {})
            if best.get("checkpoint") and best != storage.read_json(os.path.join(self.output, BEST)):
                storage.write_json(os.path.join(self.output, BEST), best)
        kept = [*there[-max(self.keep, 1) :], self.best()]
        for path in self._all():
            if storage.remote(path):
                if path not in kept:
                    storage.remove(path, first=METADATA)
            elif path.endswith(TEMPORARY) or (path in there and path not in kept):
                shutil.rmtree(path)


def is_complete(checkpoint: str) -> bool:
    """Whether a folder is a finished checkpoint."""
    return storage.exists(os.path.join(checkpoint, METADATA))


def make_writer(path: str) -> dcp.FileSystemWriter:
    """What torch.distributed.checkpoint writes a folder with, wherever it lies."""
    made = dcp.FileSystemWriter(path, sync_files=False)  # a DirectFile does that itself; a store knows no such thing
    if storage.remote(path):
        made.fs, made.path = cast(Any, storage.Streams(path)), path
    else:
        made.fs = DirectFiles()
    return made


def make_reader(path: str) -> dcp.FileSystemReader:
    """What torch.distributed.checkpoint reads a folder with, wherever it lies."""
    made = dcp.FileSystemReader(path)
    made.transforms = _Checked()
    if storage.remote(path):
        made.fs, made.path = cast(Any, storage.Streams(path)), path
    return made


class _Checked(_StorageReaderTransforms):
    """Compares the checksum that torch.save writes with each tensor, and torch.load takes no notice of."""

    def transform_load_stream(self, read_item: Any, transform_descriptors: Any, raw_stream: IO[bytes]) -> IO[bytes]:
        """The stream of one tensor, from its beginning.

        Raises:
            BadZipFile: its bytes are not those that were written.
        """
        whole = io.BytesIO(raw_stream.read(-1))  # so that a store is asked for it once
        with zipfile.ZipFile(whole) as records:
            if (damaged := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"{read_item.storage_index.fqn}: the checksum of {damaged} differs")
        whole.seek(0)
        return whole


def read_tensor_metadata(checkpoint: str) -> dict[str, Any]:
    """Shapes and types of a checkpoint's tensors, by name.

    Raises:
        InputError: it says so no more, for it is damaged.
    """
    try:
        return make_reader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # there is hardly one that unpickling damaged bytes does not lead to
        raise _unreadable(checkpoint, [error]) from None


def read_tensors(state: dict[str, Any], checkpoint: str) -> None:
    """Read the tensors of `state` from a checkpoint, in place (collective).

    Raises:
        InputError: files of the checkpoint are missing or damaged.
    """
    try:
        dcp.load(state, storage_reader=make_reader(checkpoint))
    except CheckpointException as error:
        raise _unreadable(checkpoint, [failure[0] for failure in error.failures.values()]) from None


def _unreadable(checkpoint: str, errors: list[BaseException]) -> InputError:
    reasons = sorted({f"{type(error).__name__}: {' '.join(str(error).split())[:300]}" for error in errors})
    return InputError(
        f"the checkpoint {checkpoint} cannot be read ({'; '.join(reasons)}). Restore it, or give another checkpoint of "
        "the run; a run goes on from the one before once this folder is removed"
    )


def _sync(folder: str) -> None:
    """Make the names in a folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_metadata(checkpoint: str) -> dict[str, Any]:
    """The metadata of a checkpoint folder.

    Raises:
        InputError: it is not a whole checkpoint.
    """
    metadata = storage.read_json(os.path.join(checkpoint, METADATA))
    if metadata is None:
        raise InputError(f"{checkpoint} is not a finished checkpoint: it has no {METADATA}")
    return metadata


def find_checkpoint(path: str) -> str:
    """The checkpoint folder that `path` means: itself, or the best (else the newest) of a run's output folder.

    Raises:
        InputError: there is none.
    """
    if is_complete(path):
        return path
    checkpoints = Checkpoints(path, keep=0)
    found = checkpoints.best() or checkpoints.latest()
    if found is None:
        raise InputError(
            f"{path} holds no finished checkpoint; give a run's output folder or one of its {FOLDER}/step-* folders"
        )
    return found


def checkpoint_fingerprint(checkpoint: str) -> str:
    """32 hex digits of everything in a checkpoint folder, wherever it lies (collective: ranks share the files out)."""
    names = storage.names(checkpoint)
    shares = gather_objects([(name, _crc(os.path.join(checkpoint, name))) for name in names[rank() :: world_size()]])
    return hashlib.sha256(repr(sorted(pair for share in shares for pair in share)).encode()).hexdigest()[:32]


def _crc(path: str) -> int:
    return int(checksum_of(*storage.filesystem(path)), 16)  # the number: fingerprints of earlier exports are made of it
