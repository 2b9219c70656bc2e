"""Checkpoint folders of a run: torch.distributed.checkpoint folders that count once they are committed.

    OUTPUT/checkpoints/step-00001200/   the distributed checkpoint, and checkpoint.json, written last
    OUTPUT/best.json                    which of them is best on validation

A folder is a complete checkpoint if it holds checkpoint.json; readers check nothing else. On a local disk a checkpoint
is written under a temporary name and renamed once complete. On an object store it is written under its final name.
The rest (best.json, deleting old checkpoints) is derived from the committed checkpoints, so it can be redone after a
kill. `saving` writes checkpoints, `state` says what they hold.
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
    """Number of newest checkpoints to keep, beside the best one."""

    @property
    def folder(self) -> str:
        """The folder of all checkpoints."""
        return os.path.join(self.output, FOLDER)

    def path(self, step: int) -> str:
        """The folder of the checkpoint after `step` steps."""
        return os.path.join(self.folder, f"step-{step:08d}")

    def temporary_path(self, step: int) -> str:
        """The folder that it is written to before the commit; on an object store, which cannot rename, `path`."""
        return self.path(step) + ("" if storage.remote(self.output) else TEMPORARY)

    def list_committed(self) -> list[str]:
        """Paths of the committed checkpoints, oldest first."""
        paths = [path for path in self._list_folders() if not path.endswith(TEMPORARY)]
        return [path for path in paths if is_complete(path)]

    def _list_folders(self) -> list[str]:
        return [os.path.join(self.folder, name) for name in storage.names(self.folder) if name.startswith("step-")]

    def latest(self) -> str | None:
        """Path of the newest committed checkpoint; None: there is none."""
        return next(reversed(self.list_committed()), None)

    def best(self) -> str | None:
        """Path of the checkpoint that is best on validation; None: there is none."""
        record = storage.read_json(os.path.join(self.output, BEST))
        path = record and os.path.join(self.folder, record["checkpoint"])
        return path if path and is_complete(path) else None

    def start(self, step: int) -> None:
        """Make the empty folder `temporary_path(step)` to write a checkpoint to (call on one rank).

        Raises:
            OSError: it cannot be made.
        """
        storage.remove(self.temporary_path(step), first=METADATA)
        storage.make_folder(self.temporary_path(step))

    def commit(self, step: int, metadata: dict[str, Any]) -> None:
        """Commit what was written since `start`, then `clean_up` (call on one rank).

        If the step already has a committed checkpoint, only its metadata is written: nothing was trained in between,
        and the run must have a checkpoint at any moment.

        Args:
            step: optimizer steps done.
            metadata: JSON values that readers need before they build a model. Its `best` becomes best.json; there,
                `checkpoint` names the best checkpoint so far, or is None.

        Raises:
            OSError: something cannot be written or deleted.
        """
        path, temporary = self.path(step), self.temporary_path(step)
        if storage.remote(self.output) or is_complete(path):
            storage.write_json(os.path.join(path, METADATA), metadata)
        else:
            storage.write_json(os.path.join(temporary, METADATA), metadata)
            _sync_folder(temporary)
            os.rename(temporary, path)
            _sync_folder(self.folder)
        self.clean_up()

    def clean_up(self) -> None:
        """Update best.json from the newest checkpoint; delete incomplete and old checkpoints (call on one rank)."""
        committed = self.list_committed()
        if committed:
            best = read_metadata(committed[-1]).get("best", {})
            if best.get("checkpoint") and best != storage.read_json(os.path.join(self.output, BEST)):
                storage.write_json(os.path.join(self.output, BEST), best)
        keep = [*committed[-max(self.keep, 1) :], self.best()]
        for path in self._list_folders():
            if storage.remote(path):
                if path not in keep:
                    storage.remove(path, first=METADATA)
            elif path.endswith(TEMPORARY) or (path in committed and path not in keep):
                shutil.rmtree(path)


def is_complete(checkpoint: str) -> bool:
    """Whether a folder is a committed checkpoint."""
    return storage.exists(os.path.join(checkpoint, METADATA))


def make_writer(path: str) -> dcp.FileSystemWriter:
    """A writer of torch.distributed.checkpoint for a local folder or a URI."""
    writer = dcp.FileSystemWriter(path, sync_files=False)  # DirectFile syncs by itself; object stores have no sync
    if storage.remote(path):
        writer.fs, writer.path = cast(Any, storage.Streams(path)), path
    else:
        writer.fs = DirectFiles()
    return writer


def make_reader(path: str) -> dcp.FileSystemReader:
    """A reader of torch.distributed.checkpoint for a local folder or a URI, which verifies checksums."""
    reader = dcp.FileSystemReader(path)
    reader.transforms = _ChecksumVerifier()
    if storage.remote(path):
        reader.fs, reader.path = cast(Any, storage.Streams(path)), path
    return reader


class _ChecksumVerifier(_StorageReaderTransforms):
    """Verifies the checksum that torch.save writes with each tensor, which torch.load ignores."""

    def transform_load_stream(self, read_item: Any, transform_descriptors: Any, raw_stream: IO[bytes]) -> IO[bytes]:
        """The stream of one tensor, verified, at its beginning.

        Raises:
            BadZipFile: the checksum differs.
        """
        content = io.BytesIO(raw_stream.read(-1))  # so that a store is read once
        with zipfile.ZipFile(content) as records:
            if (damaged := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"{read_item.storage_index.fqn}: the checksum of {damaged} differs")
        content.seek(0)
        return content


def read_tensor_metadata(checkpoint: str) -> dict[str, Any]:
    """Sizes and dtypes of a checkpoint's tensors, by name.

    Raises:
        InputError: the checkpoint is damaged.
    """
    try:
        return make_reader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling damaged bytes can raise almost anything
        raise _make_read_error(checkpoint, [error]) from None


def read_tensors(state: dict[str, Any], checkpoint: str) -> None:
    """Read the tensors of `state` from a checkpoint, in place (collective).

    Raises:
        InputError: files of the checkpoint are missing or damaged.
    """
    try:
        dcp.load(state, storage_reader=make_reader(checkpoint))
    except CheckpointException as error:
        raise _make_read_error(checkpoint, [failure[0] for failure in error.failures.values()]) from None


def _make_read_error(checkpoint: str, errors: list[BaseException]) -> InputError:
    reasons = sorted({f"{type(error).__name__}: {' '.join(str(error).split())[:300]}" for error in errors})
    return InputError(
        f"the checkpoint {checkpoint} cannot be read ({'; '.join(reasons)}). Restore it, or give another checkpoint of "
        "the run; to resume the run from the checkpoint before, remove this folder"
    )


def _sync_folder(folder: str) -> None:
    """Sync a folder's entries to the disk, so that they survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_metadata(checkpoint: str) -> dict[str, Any]:
    """The JSON metadata (checkpoint.json) of a committed checkpoint.

    Raises:
        InputError: the checkpoint is not committed, or its metadata is damaged.
    """
    metadata = storage.read_json(os.path.join(checkpoint, METADATA))
    if metadata is None:
        raise InputError(f"{checkpoint} is not a finished checkpoint: it has no {METADATA}")
    return metadata


def find_checkpoint(path: str) -> str:
    """Find the checkpoint folder for `path`: itself, or the best (else the newest) of a run's output folder.

    Raises:
        InputError: there is no committed checkpoint.
    """
    if is_complete(path):
        return path
    checkpoints = Checkpoints(path, keep=0)
    checkpoint = checkpoints.best() or checkpoints.latest()
    if checkpoint is None:
        raise InputError(
            f"{path} holds no finished checkpoint; give a run's output folder or one of its {FOLDER}/step-* folders"
        )
    return checkpoint


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Hash of all file names and contents of a checkpoint folder, 32 hex digits (collective: ranks share the files)."""
    names = storage.names(checkpoint)[rank() :: world_size()]
    shares = gather_objects([(name, _checksum(os.path.join(checkpoint, name))) for name in names])
    return hashlib.sha256(repr(sorted(pair for share in shares for pair in share)).encode()).hexdigest()[:32]


def _checksum(path: str) -> int:
    return int(checksum_of(*storage.filesystem(path)), 16)  # a number, so that fingerprints of earlier exports stay
