"""Checkpoint folders of a run: torch.distributed.checkpoint folders that count once they are committed.

    OUTPUT/checkpoints/step-00001200/   the distributed checkpoint, and checkpoint.json, written last
    OUTPUT/best.json                    which of them is best on validation

A folder is a complete checkpoint if it holds checkpoint.json; readers check nothing else. On a local disk a checkpoint
is written under a temporary name and renamed once complete. On an object store it is written under its final name.
The rest (best.json, deleting old checkpoints) is derived from the committed checkpoints, so it can be redone after a
kill. `saving` writes checkpoints, `state` says what they hold.
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from recgpt_torchrec import storage
from recgpt_torchrec.data.days.records import path_of
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank, run_on_first_rank, world_size
from recgpt_torchrec.distributed.watchdog import beat, tracked_phase
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.manifests import suggest_below
from recgpt_torchrec.storage.parts import checksum_of
from recgpt_torchrec.storage.typed import SHOWN, make_typed
from recgpt_torchrec.storage.visibility import await_files, await_sight

if TYPE_CHECKING:  # torch.distributed.checkpoint takes 0.9 s to import: only where tensors are read or written
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = "checkpoint.json"
BEST = "best.json"
FOLDER = "checkpoints"
TRAINED_DAYS = "trained_days.json"
"""Lists the days that a run on a folder of days has trained."""
TEMPORARY = ".tmp"
NO_METADATA = "metadata is None; global metadata read failed: "
"""What torch puts before the reason for which `.metadata` could not be read."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The contents of best.json."""

    checkpoint: str | None = None
    """Name of a checkpoint's folder; None: there is none yet."""
    epoch: int = 0
    """Counted from 1; 0: before the first step."""
    value: float = float("nan")
    """The validation figure."""

    @classmethod
    def of(cls, values: Any) -> "Best":
        """Make it of JSON values.

        Raises:
            ValueError: a field is missing, unknown or of another type, or the checkpoint's name is none.
        """
        best = make_typed(cls, values)
        if best.checkpoint is not None and not re.fullmatch(r"step-[0-9]{8,16}", best.checkpoint):
            raise ValueError(f"{best.checkpoint[:SHOWN]!r} is not the name of a checkpoint's folder")
        return best


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
        best = self.read_best()
        if best is None or best.checkpoint is None:
            return None
        path = os.path.join(self.folder, best.checkpoint)
        return path if is_complete(path) else None

    def read_best(self) -> Best | None:
        """Read best.json; None: there is none.

        Raises:
            InputError: it is damaged.
        """
        path = os.path.join(self.output, BEST)
        values = storage.read_json(path)
        try:
            return None if values is None else Best.of(values)
        except ValueError as error:
            raise storage.damaged(path, error) from None

    def start(self, step: int) -> None:
        """Make the empty folder `temporary_path(step)` to write a checkpoint to (call on one rank).

        Raises:
            OSError: it cannot be made.
        """
        storage.remove(self.temporary_path(step), first=METADATA)
        storage.make_folder(self.temporary_path(step))

    def await_files(self, step: int, written: "Metadata") -> None:
        """Wait until this node sees what all ranks have written since `start` (call on one rank).

        Args:
            step: as for `start`.
            written: what `dcp.save` returned.

        Raises:
            InputError: a file is not there: not all nodes write to the same disk.
        """
        sizes: dict[str, int] = {}
        for each in (written.storage_data or {}).values():
            sizes[each.relative_path] = max(sizes.get(each.relative_path, 0), each.offset + each.length)
        fs, folder = storage.filesystem(self.temporary_path(step))
        await_files(fs, folder, sizes.items(), beat)

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
            elif path.endswith(TEMPORARY):
                shutil.rmtree(path)
            elif path in committed and path not in keep:
                os.rename(path, path + TEMPORARY)  # a kill in rmtree must not leave a folder that nothing deletes
                shutil.rmtree(path + TEMPORARY)


def is_complete(checkpoint: str) -> bool:
    """Whether a folder is a committed checkpoint."""
    return storage.exists(os.path.join(checkpoint, METADATA))


def await_checkpoint(checkpoint: str) -> None:
    """Wait until every rank sees a checkpoint that rank 0 has found (collective).

    Raises:
        InputError: on every rank, if one does not see it.
    """

    def find_missing() -> str | None:
        storage.names(os.path.dirname(checkpoint))  # a client of NFS then looks anew
        return None if is_complete(checkpoint) else METADATA

    failure = None
    try:
        await_sight(find_missing, checkpoint, beat)
    except InputError as error:
        failure = error
    raise_first_error(failure)


def make_writer(path: str) -> "dcp.FileSystemWriter":
    """A writer of torch.distributed.checkpoint for a local folder or a URI."""
    import torch.distributed.checkpoint as dcp

    from recgpt_torchrec.checkpoints.direct_io import DirectFiles

    writer = dcp.FileSystemWriter(path, sync_files=False)  # DirectFile syncs by itself; object stores have no sync
    if storage.remote(path):
        writer.fs, writer.path = cast(Any, storage.Streams(path)), path
    else:
        writer.fs = DirectFiles()
    return writer


def read_tensor_metadata(checkpoint: str) -> dict[str, Any]:
    """Sizes and dtypes of a checkpoint's tensors, by name.

    Raises:
        InputError: the checkpoint is damaged.
    """
    from recgpt_torchrec.checkpoints.safe_reading import SafeReader, UnsafeCheckpoint

    try:
        return SafeReader(checkpoint).read_metadata().state_dict_metadata
    except (UnsafeCheckpoint, OSError) as error:
        storage.raise_storage_failure(error, checkpoint)
        raise _make_read_error(checkpoint, [error]) from None


def read_tensors(state: dict[str, Any], checkpoint: str) -> None:
    """Read the tensors of `state` from a checkpoint, in place (collective).

    Raises:
        InputError: files of the checkpoint are missing or damaged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import CheckpointException

    from recgpt_torchrec.checkpoints.records import tensors_of
    from recgpt_torchrec.checkpoints.safe_reading import SafeReader, TensorPlanner

    numbers = sum(tensor.numel() for tensor in tensors_of(state))
    try:
        with tracked_phase("restoring", numbers, "numbers") as advance:
            dcp.load(state, storage_reader=SafeReader(checkpoint), planner=TensorPlanner(advance))
    except CheckpointException as error:
        failures = {number: failure[0] for number, failure in error.failures.items()}
        for number, failure in failures.items():
            if failed := storage.find_storage_failure(failure, checkpoint, who=f"rank {number}"):
                raise failed from None
        raise _make_read_error(checkpoint, [*failures.values()]) from None


def _make_read_error(checkpoint: str, errors: list[BaseException]) -> InputError:
    from recgpt_torchrec.checkpoints.safe_reading import UnsafeCheckpoint

    texts = {" ".join(str(error).removeprefix(NO_METADATA).split())[:300]: error for error in errors}
    reasons = sorted(
        text if isinstance(error, (UnsafeCheckpoint, AssertionError)) else f"{type(error).__name__}: {text}"
        for text, error in texts.items()
    )
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
    path = os.path.join(checkpoint, METADATA)
    metadata = storage.read_json(path)
    if metadata is None:
        raise InputError(f"{checkpoint} is not a finished checkpoint: it has no {METADATA}")
    try:
        if metadata.get("best", {}) != {}:
            Best.of(metadata["best"])
    except ValueError as error:
        raise storage.damaged(path, error) from None
    return metadata


def find_checkpoint(path: str) -> str:
    """Find the checkpoint folder for `path`: itself, or the best (else the newest) of a run's output folder.

    Of a run on a folder of days it is that of the newest day that is trained.

    Rank 0 looks, for all ranks (collective).

    Raises:
        InputError: there is no committed checkpoint.
    """
    checkpoint = run_on_first_rank(lambda: _find_checkpoint(path))
    await_checkpoint(checkpoint)
    return checkpoint


def _find_checkpoint(path: str) -> str:
    if is_complete(path):
        return path
    if (trained := storage.read_json(os.path.join(path, TRAINED_DAYS))) is not None:
        path = path_of(path, len(trained.get("days", [])))
    checkpoints = Checkpoints(path, keep=0)
    checkpoint = checkpoints.best() or checkpoints.latest()
    if checkpoint is None:
        meant = suggest_below(path, lambda folder: storage.is_folder(f"{folder}/{FOLDER}"))
        raise InputError(
            f"{path} holds no finished checkpoint; give a run's output folder or one of its {FOLDER}/step-* folders"
            + (f". {meant}" if meant else "")
        )
    return checkpoint


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Hash of all file names and contents of a checkpoint folder, 32 hex digits (collective: ranks share the files)."""
    names = run_on_first_rank(lambda: storage.names(checkpoint))[rank() :: world_size()]
    shares = gather_objects([(name, _checksum(os.path.join(checkpoint, name))) for name in names])
    return hashlib.sha256(repr(sorted(pair for share in shares for pair in share)).encode()).hexdigest()[:32]


def _checksum(path: str) -> int:
    return int(checksum_of(*storage.filesystem(path)), 16)  # a number, so that fingerprints of earlier exports stay
