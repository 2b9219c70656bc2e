"""Storage that fails is told from a file that is damaged: nothing is left out, no folder is said to be to remove."""

import errno
import os
import socket
from collections.abc import Callable
from typing import Any

import pyarrow.fs
import pytest
import torch
import torch.distributed.checkpoint

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints import folder as checkpoint_folder
from recgpt_torchrec.checkpoints import safe_reading
from recgpt_torchrec.data import dataset as dataset_module
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.damage import SetAside
from recgpt_torchrec.data.reading.reader import Reader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.shared_folder import stage_shared_folder
from recgpt_torchrec.errors import InputError, OtherRanksError, StorageError
from recgpt_torchrec.storage import parts
from tests.support import walks, write_dataset
from tools.ranks import run_ranks

FAILED, DAMAGED = OSError(errno.ESTALE, os.strerror(errno.ESTALE)), OSError("its footer is damaged")
HOST = socket.gethostname()


def let_fail(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_a_failure_of_storage_names_the_node_the_file_and_the_reason(number):
    with pytest.raises(StorageError, match=f"^{HOST} cannot write /mnt/a: .*{os.strerror(number)}.* the same command"):
        storage.raise_storage_failure(OSError(number, os.strerror(number)), "/mnt/a", "write")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.ENOENT, "none"), DAMAGED, KeyError()])
def test_other_errors_are_no_failures_of_storage(error):
    assert storage.find_storage_failure(error, "/mnt/a") is None


def test_a_failure_keeps_its_message_however_often_it_is_met():
    first = storage.find_storage_failure(FAILED, "/mnt/a")
    assert storage.find_storage_failure(first, "/mnt/b") is first


def test_rows_that_cannot_be_read_because_storage_fails_are_not_left_out_as_damaged(tmp_path, monkeypatch):
    """`--stream.damaged skip` would train without them, and say that they are damaged."""
    write_dataset(tmp_path / "data", walks(24, 9, shortest=4), items=9, rows_per_group=4)
    dataset = Dataset.open(str(tmp_path / "data"), damaged="skip")
    group = row_groups(dataset)[0]
    reader = Reader(dataset, set_aside=SetAside(str(tmp_path / "damaged.jsonl"), limit=100))
    monkeypatch.setattr(dataset_module, "open_part", let_fail(FAILED))
    with pytest.raises(StorageError, match=f"{HOST} cannot read {tmp_path}/data/sequences/part-00000.parquet"):
        reader.read(group)
    assert not reader.set_aside.listed()  # type: ignore[union-attr]
    with pytest.raises(StorageError):
        row_groups(Dataset.open(str(tmp_path / "data"), damaged="skip"))
    monkeypatch.setattr(dataset_module, "open_part", let_fail(DAMAGED))
    reader.read(group)
    assert len(reader.set_aside.listed()) == 1  # type: ignore[union-attr]


def test_a_manifest_that_storage_does_not_give_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", walks(4, 9), items=9)
    monkeypatch.setattr(storage.files, "filesystem", lambda path: (Failing(FAILED), path))
    for read in (
        lambda: Dataset.open(str(tmp_path / "data")),
        lambda: storage.read_json(f"{tmp_path}/data/manifest.json"),
    ):
        with pytest.raises(StorageError, match=f"{HOST} cannot read {tmp_path}/data/manifest.json"):
            read()


class Failing:
    """A file system whose files are there and cannot be read."""

    type_name = "local"

    def __init__(self, error: OSError) -> None:
        self.error = error

    def get_file_info(self, path: Any) -> Any:
        return pyarrow.fs.LocalFileSystem().get_file_info(path)

    def open_input_stream(self, path: str, compression: Any) -> Any:
        raise self.error


def read_checkpoint(rank: int, world_size: int, folder: str, error: OSError) -> str:
    """What reading a checkpoint says, whose file rank 1 cannot read."""
    state = {"a": torch.zeros(4)}
    torch.distributed.checkpoint.save(state, storage_writer=checkpoint_folder.make_writer(folder))
    if rank == 1:
        safe_reading.SafeReader.read_data = let_fail(error)  # type: ignore[method-assign]
    try:
        checkpoint_folder.read_tensors(state, folder)
    except (InputError, StorageError) as met:
        return f"{type(met).__name__}: {met}"
    return ""


def test_a_checkpoint_that_storage_does_not_give_is_not_said_to_be_to_remove(tmp_path):
    texts = run_ranks(read_checkpoint, 2, str(tmp_path / "a"), FAILED)
    assert [*{*texts}] == [texts[0]] and texts[0].startswith(f"StorageError: rank 1 cannot read {tmp_path}/a: ")
    assert "remove" not in texts[0]
    texts = run_ranks(read_checkpoint, 2, str(tmp_path / "b"), DAMAGED)
    assert all(text.startswith("InputError") and "remove this folder" in text for text in texts)


def write_together(rank: int, world_size: int, folder: str, number: int) -> str:
    """What is said where rank 1 cannot write its part of a folder."""
    socket.gethostname = lambda: f"node{rank}"
    try:
        with stage_shared_folder(folder, "export"):
            raise_first_error(OSError(number, os.strerror(number)) if rank == 1 else None)
    except (InputError, OSError) as met:
        return f"{type(met).__name__}: {met}"
    return ""


def test_a_rank_that_cannot_write_its_part_ends_all_with_the_same_words(tmp_path):
    """Rank 0 ended with a RuntimeError and its stack, and rank 1 did not say of which folder it spoke."""
    texts = run_ranks(write_together, 2, str(tmp_path / "a"), errno.EIO)
    assert texts[0] == texts[1] and texts[0].startswith(f"StorageError: node1 cannot write {tmp_path}/a: ")
    full = f"InputError: cannot write {tmp_path}/b: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    assert run_ranks(write_together, 2, str(tmp_path / "b"), errno.ENOSPC) == [full, full]
    assert not [*tmp_path.iterdir()]


def first_error(rank: int, world_size: int, errors: list[Exception | None]) -> tuple[str, str, str]:
    socket.gethostname = lambda: f"node{rank}"
    try:
        raise_first_error(errors[rank])
    except Exception as met:
        return type(met).__name__, str(met), getattr(met, "host", "")
    return "", "", ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StorageError("node1 cannot read"), ("StorageError", "node1 cannot read", "")),
        (OSError(errno.ENOSPC, "full"), ("OtherRanksError", f"[Errno {errno.ENOSPC}] full", "node1")),
        (OSError("no answer"), ("OtherRanksError", "no answer", "node1")),
        (KeyError("x"), ("RuntimeError", "rank 1 failed: KeyError('x')", "")),
    ],
)
def test_an_error_of_the_system_is_one_on_every_rank(error, expected):
    assert run_ranks(first_error, 2, [None, error])[0] == expected
    assert issubclass(OtherRanksError, OSError) and not issubclass(StorageError, ValueError)


def test_a_part_whose_bytes_storage_does_not_give_is_named(tmp_path):
    with pytest.raises(StorageError, match="cannot read /mnt/part"):
        parts.checksum_of(Failing(FAILED), "/mnt/part")
