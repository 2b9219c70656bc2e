"""Checkpoints are read without running code or believing their sizes; those of plain torch are read as ever."""

import enum
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from recgpt_torchrec.checkpoints import safe_reading
from recgpt_torchrec.checkpoints.folder import read_tensor_metadata, read_tensors
from recgpt_torchrec.checkpoints.safe_reading import UnsafeCheckpoint, check_metadata, unpickle_metadata
from recgpt_torchrec.errors import InputError
from tools.mutations import hostile_pickles
from tools.ranks import run_ranks

STATE: dict[str, Any] = {
    "model": {"table": torch.arange(12.0).view(4, 3), "step": torch.tensor(7)},
    "half": torch.ones(5).half(),
}
NAME = "model.table"
MEMORY_FORMAT = safe_reading._MEM_FORMAT_ENCODING


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint written by torch alone, as every version of this program did."""
    dcp.save(STATE, checkpoint_id=tmp_path / "plain", no_dist=True)
    return tmp_path / "plain"


def files_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def plain_metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


# ------------------------------------------------------------------------------------------------- what torch writes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_that_torch_pickled_are_read_as_torch_reads_them(checkpoint: Path, protocol: int) -> None:
    expected = plain_metadata(checkpoint)
    read = check_metadata(unpickle_metadata(pickle.dumps(expected, protocol)), files_of(checkpoint))
    assert read.state_dict_metadata == expected.state_dict_metadata
    assert read.storage_data == expected.storage_data


class EarlyPython(pickle._Pickler):
    """Writes members of an enum as Python 3.11.0 to 3.11.3 do."""

    dispatch = dict(pickle._Pickler.dispatch)

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_that_an_early_python_3_11_pickled_are_read(checkpoint: Path, protocol: int) -> None:
    expected, written = plain_metadata(checkpoint), io.BytesIO()
    EarlyPython(written, protocol).dump(expected)
    assert b"getattr" in written.getvalue()
    read = check_metadata(unpickle_metadata(written.getvalue()), files_of(checkpoint))
    assert read.state_dict_metadata == expected.state_dict_metadata


@pytest.mark.parametrize("asked", [(TensorProperties, "__init__"), (MEMORY_FORMAT, "mro"), (MEMORY_FORMAT, 3), ()])
def test_only_members_of_an_enum_are_got_as_attributes(asked: tuple[Any, ...]) -> None:
    class Asks:
        def __reduce__(self) -> Any:
            return getattr, asked

    with pytest.raises(UnsafeCheckpoint, match="no memory format"):
        unpickle_metadata(pickle.dumps(Asks()))


def load_both(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    state = {"model": {"table": torch.zeros(4, 3), "step": torch.tensor(0)}, "half": torch.zeros(5).half()}
    read_tensors(state, folder)
    return state


def test_tensors_of_a_plain_checkpoint_are_read_on_several_ranks(checkpoint: Path) -> None:
    for state in run_ranks(load_both, 2, str(checkpoint)):
        assert torch.equal(state["model"]["table"], STATE["model"]["table"])
        assert state["model"]["step"] == 7 and torch.equal(state["half"], STATE["half"])


# ------------------------------------------------------------------------------------------------------ what it is not


@pytest.mark.parametrize("name", hostile_pickles(""))
@pytest.mark.timeout(20)
def test_another_pickle_in_place_of_metadata_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    content = hostile_pickles(f"{tmp_path}/canary")[name]
    with pytest.raises(UnsafeCheckpoint) as error:
        unpickle_metadata(content)
    assert not (tmp_path / "canary").exists()
    assert len(str(error.value)) < 400


def test_the_hostile_pickles_do_run_their_command_where_any_pickle_is_read(tmp_path: Path) -> None:
    commands = hostile_pickles(f"{tmp_path}/canary")
    for name in ("reduce, protocol 4", "global", "stack global", "inst", "obj", "eval"):
        pickle.loads(commands[name])
        (tmp_path / "canary").unlink()  # fails if the command did not run


def other_objects() -> dict[str, Any]:
    size = torch.Size([2])
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), size, [ChunkStorageMetadata(torch.Size([0]), size)])
    return {"a tensor": torch.ones(2), "metadata of one tensor": tensor, "a list": [Metadata({})], "a class": Metadata}


@pytest.mark.parametrize("name", other_objects())
def test_a_pickle_of_another_object_is_refused(name: str) -> None:
    with pytest.raises(UnsafeCheckpoint):
        unpickle_metadata(pickle.dumps(other_objects()[name]))


def test_an_entry_that_is_no_tensor_is_never_unpickled(tmp_path: Path, monkeypatch: Any) -> None:
    class Command:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "canary"),)

    dcp.save({"a": torch.ones(2), "model": {"b": Command()}}, checkpoint_id=tmp_path / "hostile", no_dist=True)
    assert list(read_tensor_metadata(str(tmp_path / "hostile"))) == ["a"]
    for keep in (False, True):  # dropped; and, if it were kept, refused by the planner
        if keep:
            monkeypatch.setattr(safe_reading, "check_metadata", lambda metadata, files: metadata)
        reader, planner = safe_reading.SafeReader(str(tmp_path / "hostile")), safe_reading.TensorPlanner()
        with pytest.raises(CheckpointException, match=r"model\.b is no tensor" if keep else r"Missing key.*model\.b"):
            dcp.load({"model": {"b": torch.zeros(1)}}, storage_reader=reader, planner=planner, no_dist=True)
        assert not (tmp_path / "canary").exists()
    dcp.load({"model": {"b": torch.zeros(1)}}, checkpoint_id=tmp_path / "hostile", no_dist=True)
    assert (tmp_path / "canary").exists()  # what torch alone does


# -------------------------------------------------------------------------------------------------- sizes and paths


def chunk_of(metadata: Metadata) -> Any:
    tensor: Any = metadata.state_dict_metadata[NAME]
    return tensor.chunks[0]


def set_size(metadata: Metadata, size: list[int], chunk: list[int] | None = None) -> None:
    tensor: Any = metadata.state_dict_metadata[NAME]
    tensor.size = torch.Size(size)
    if chunk is not None:
        tensor.chunks[0].sizes = torch.Size(chunk)


def set_place(metadata: Metadata, **values: Any) -> None:
    vars(metadata.storage_data[MetadataIndex(NAME, [0, 0])]).update(values)


def split_in_two(metadata: Metadata) -> None:
    tensor: Any = metadata.state_dict_metadata[NAME]
    tensor.chunks = [tensor.chunks[0], tensor.chunks[0]]
    tensor.size = torch.Size([8, 3])


WRONG: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "rows beyond any file": (lambda m: set_size(m, [2**60, 3], [2**60, 3]), "has 13,835,058,055,282,163,712 bytes at"),
    "rows without values": (lambda m: set_size(m, [2**60, 3]), "numbers, its parts 12"),
    "fewer rows": (lambda m: set_size(m, [3, 3]), "is no part of it"),
    "another number of dimensions": (lambda m: set_size(m, [12]), "is no part of it"),
    "no parts": (lambda m: vars(m.state_dict_metadata[NAME]).update(chunks=[]), "12 numbers, its parts 0"),
    "a part twice": (split_in_two, "has two parts at [0, 0]"),
    "a file in the folder above": (lambda m: set_place(m, relative_path="../x"), "'../x', which is not a file of the"),
    "a file anywhere": (lambda m: set_place(m, relative_path="/etc/passwd"), "which is not a file of the folder"),
    "a path of Windows": (lambda m: set_place(m, relative_path="..\\x"), "which is not a file of the folder"),
    "the folder above": (lambda m: set_place(m, relative_path=".."), "which is not a file of the folder"),
    "a number as a path": (lambda m: set_place(m, relative_path=3), "lies nowhere"),
    "an offset beyond the file": (lambda m: set_place(m, offset=2**60), "__0_0.distcp has"),
    "a length beyond the file": (lambda m: set_place(m, length=2**60), "__0_0.distcp has"),
    "a negative offset": (lambda m: set_place(m, offset=-1), "lies nowhere"),
    "true as an offset": (lambda m: set_place(m, offset=True), "lies nowhere"),
    "too short": (lambda m: set_place(m, length=40), "has 48 bytes at [0, 0], its file 40"),
    "transformed": (lambda m: set_place(m, transform_descriptors=["zstd"]), "is transformed"),
    "no place": (lambda m: m.storage_data.clear(), "lies nowhere"),
    "no tensors": (lambda m: vars(m).update(state_dict_metadata=None), "lists no tensors"),
    "a tensor that is a text": (lambda m: m.state_dict_metadata.update({NAME: "x"}), "is no tensor"),  # type: ignore
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_do_not_fit_the_files_are_refused(checkpoint: Path, name: str) -> None:
    change, message = WRONG[name]
    metadata = plain_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError) as error:
        read_tensor_metadata(str(checkpoint))
    assert message in str(error.value) and "Restore it, or give another checkpoint" in str(error.value)


def test_a_thousand_tensors_in_one_record_are_more_bytes_than_the_files_have(checkpoint: Path) -> None:
    metadata = plain_metadata(checkpoint)
    place = metadata.storage_data[MetadataIndex(NAME, [0, 0])]
    for number in range(1000):
        metadata.state_dict_metadata[f"more{number}"] = metadata.state_dict_metadata[NAME]
        metadata.storage_data[MetadataIndex(f"more{number}", [0, 0])] = place
    with pytest.raises(UnsafeCheckpoint, match=r"its tensors have .* bytes, the files"):
        check_metadata(metadata, files_of(checkpoint))


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(InputError, match="__0_0.distcp is missing"):
        read_tensor_metadata(str(checkpoint))
    (checkpoint / ".metadata").unlink()
    with pytest.raises(InputError, match=".metadata is missing"):
        read_tensor_metadata(str(checkpoint))


def test_metadata_without_end_are_refused_unread(checkpoint: Path) -> None:
    os.truncate(checkpoint / ".metadata", safe_reading.METADATA_BYTES + 1)  # a file with a hole
    with pytest.raises(InputError, match="more than 67,108,864"):
        read_tensor_metadata(str(checkpoint))


def test_dropped_entries_need_no_file() -> None:
    size, start = torch.Size([2]), torch.Size([0])
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), size, [ChunkStorageMetadata(start, size)])
    places = {MetadataIndex("a", [0]): _StorageInfo("f", 0, 1000), MetadataIndex("b"): _StorageInfo("../x", 0, 1)}
    metadata = Metadata({"a": tensor, "b": BytesStorageMetadata()}, storage_data=places)
    read = check_metadata(metadata, {"f": 1000})
    assert list(read.state_dict_metadata) == ["a"] and list(read.storage_data) == [MetadataIndex("a", [0])]


# ------------------------------------------------------------------------------------------------------- the tensors


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return target.getvalue()


def overlapping(count: int) -> bytes:
    """An archive whose members are all the same bytes."""
    whole = archive({"a/0": bytes(10_000)})
    end = whole.rindex(b"PK\x05\x06")
    first = whole.index(b"PK\x01\x02")
    directory = whole[first:end] * count
    tail = bytearray(whole[end:])
    tail[8:12] = count.to_bytes(2, "little") * 2
    tail[12:16] = len(directory).to_bytes(4, "little")
    return whole[:first] + directory + bytes(tail)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (archive({"a/data/0": bytes(10**6)}, zipfile.ZIP_DEFLATED), "is compressed"),
        (overlapping(500), "overlap"),
        (pickle.dumps([1, 2]), "is not a record of torch.save"),
        (b"\x80\x02" + archive({"a/data.pkl": b""}), "is not a record of torch.save"),
        (
            archive({"a/data.pkl": hostile_pickles("/nowhere/x")["global"], "a/version": b"3"}),
            "[Ww]eights.only",
        ),
        (archive({"a/data.pkl": b"N.", "a/constants.pkl": b"N.", "a/version": b"3"}), "TorchScript"),
    ],
)
def test_a_record_that_torch_does_not_write_is_refused(record: bytes, message: str, checkpoint: Path) -> None:
    metadata = plain_metadata(checkpoint)
    (checkpoint / "__0_0.distcp").write_bytes(record.ljust(200, b"\0"))
    tensor: Any = metadata.state_dict_metadata["half"]
    place = _StorageInfo("__0_0.distcp", 0, len(record))
    kept = Metadata({"half": tensor}, storage_data={MetadataIndex("half", [0]): place})
    (checkpoint / ".metadata").write_bytes(pickle.dumps(kept))
    with pytest.raises(CheckpointException, match=message):
        reader, planner = safe_reading.SafeReader(str(checkpoint)), safe_reading.TensorPlanner()
        dcp.load({"half": torch.zeros(5).half()}, storage_reader=reader, planner=planner, no_dist=True)
