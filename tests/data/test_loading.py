"""Batches made ahead: one in a single piece of memory is the batch it was made from; errors and ends reach both."""

import errno
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.config import Loss, Stream
from recgpt_torchrec.data import loading
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.loading import Block, prefetch, prefetch_in_thread
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.errors import InputError
from tests.data.stream_helpers import pairs, stream_of
from tests.support import start_forkserver, walks, write_dataset


def leaves(batch: SequenceBatch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch, those of the jagged one too."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return found | {"bags.values": batch.bags.values(), "bags.lengths": batch.bags.lengths()}


def storages(batch: SequenceBatch) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in leaves(batch).values() if tensor.numel()}


def assert_same(batch: SequenceBatch, other: SequenceBatch) -> None:
    found, wanted = leaves(batch), leaves(other)
    assert found.keys() == wanted.keys() and len(found) > 15
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
    for name, value in vars(other).items():
        if not isinstance(value, torch.Tensor | KeyedJaggedTensor) and name != "histories":
            assert getattr(batch, name) == value
    for name, value in vars(other.histories).items():
        mine: Any = getattr(batch.histories, name)
        if isinstance(value, Ragged):
            assert mine.to_lists() == value.to_lists()
        else:
            assert mine is None if value is None else np.array_equal(mine, value) and mine.dtype == value.dtype


@pytest.fixture
def stream(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(30, 20, longest=12), rows_per_group=4)
    return stream_of(dataset, tokens=30, loss=Loss(candidates="sampled", negatives=5), layout="row", pad=True)


def test_a_batch_in_one_piece_of_memory_is_the_same_batch(stream):
    batches = [*stream.batches(), stream.maker.empty()]
    for batch in batches:
        block = Block.pack(batch, lambda size: torch.full((size,), 77, dtype=torch.uint8))
        assert len(block.rest) < 4000, "content was pickled instead of copied"
        moved = block.copy(lambda size: torch.empty(size, dtype=torch.uint8)).unpack()
        for other in (block.unpack(), moved):
            assert_same(other, batch)
            assert len(storages(other)) == 1
        block.memory.fill_(0)  # `moved` has memory of its own
        assert_same(moved, batch)


def test_a_tensor_that_is_a_view_with_gaps_is_copied_as_it_is_seen():
    value: dict[str, Any] = {
        "a": torch.arange(12).reshape(3, 4).t(),
        "b": np.arange(6).reshape(2, 3)[:, ::2],
        "c": torch.tensor(3.5),
    }
    unpacked = Block.pack(value, lambda size: torch.empty(size, dtype=torch.uint8)).unpack()
    assert torch.equal(unpacked["a"], value["a"]) and np.array_equal(unpacked["b"], value["b"])
    assert unpacked["c"] == 3.5 and unpacked["c"].shape == ()


def test_a_value_without_tensors_takes_no_memory():
    block = Block.pack(("a", 1), lambda size: torch.empty(size, dtype=torch.uint8))
    assert block.memory.numel() == 0 and block.unpack() == ("a", 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_a_batch_draws_no_random_number_that_dropout_draws_from(stream, workers):
    start_forkserver()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert list(prefetch(stream.batches().source, Stream(workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_where_there_is_a_gpu_every_batch_is_pinned_by_one_copy(stream, workers, monkeypatch):
    """Page-locked memory needs a driver, so ordinary memory takes its place, and is recognised by its address."""
    pinned: list[torch.Tensor] = []

    def allocate(size: int) -> torch.Tensor:
        pinned.append(torch.empty(size, dtype=torch.uint8))
        return pinned[-1]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(loading, "_pinned_memory", allocate)
    if workers:
        start_forkserver()
    share = stream.batches()
    wanted = list(share.source(0))
    settings = Stream(workers=workers, window_groups=stream.settings.window_groups)
    read = list(prefetch(share.source if not workers else _Twice(share.source), settings))
    assert len(read) == len(wanted) * max(workers, 1) == len(pinned)
    for batch in read:
        assert storages(batch) <= {memory.untyped_storage().data_ptr() for memory in pinned}
    counted: Counter = Counter()
    for batch in read:
        counted.update(pairs(batch))
    expected: Counter = Counter()
    for batch in wanted * max(workers, 1):
        expected.update(pairs(batch))
    assert counted == expected


def three(worker: int) -> Iterator[int]:
    yield from range(3)


@pytest.mark.parametrize("letters", [1, 90])
def test_loader_processes_meet_where_the_folder_of_temporary_files_has_a_long_name(letters):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        check_that_they_meet(Path(folder) / ("a" * letters), Path(folder) / "a" if letters == 1 else Path("/tmp"))


def check_that_they_meet(scratch: Path, expected: Path) -> None:
    """That a loader process works where temporary files lie in `scratch`, and which folder has its sockets."""
    scratch.mkdir()
    code = """
import multiprocessing.util
from recgpt_torchrec.config import Stream
from recgpt_torchrec.data.loading import prefetch
from tests.data.test_loading import three
print(*prefetch(three, Stream(workers=1)), multiprocessing.util.get_temp_dir())
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    *values, folder = run.stdout.split()
    assert values == ["0", "1", "2"]
    assert Path(folder).parent == expected
    assert not Path(folder).exists()


def test_too_little_shared_memory_is_told_with_its_place(stream, monkeypatch):
    """For a batch, in a loader process, and for the queues to it, in this one."""

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match="too little .*unable.*; give more to /dev/shm"),
    ):
        patch.setattr(torch.UntypedStorage, "_new_shared", full)
        loading._shared_memory(10)

    def no_files(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="^unable to open"):
        patch.setattr(torch.UntypedStorage, "_new_shared", no_files)
        loading._shared_memory(10)
    start_forkserver()
    for code, kind in ((errno.ENOSPC, InputError), (errno.EIO, OSError)):

        def refuse(*_: Any, **__: Any) -> Any:
            raise OSError(code, os.strerror(code))  # noqa: B023 (called within this turn)

        monkeypatch.setattr(loading, "_receive", lambda *_: map(refuse, [1]))
        with pytest.raises(kind, match="give more to /dev/shm" if kind is InputError else "Input/output error"):
            list(prefetch(stream.batches().source, Stream(workers=1)))


class _Twice:
    """Every worker's batches are those of the first; pickled for loader processes."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __call__(self, worker: int) -> Any:
        return self.source(0)


def test_an_error_of_the_reading_thread_reaches_the_caller_after_the_batches_before_it():
    def source() -> Iterator[Any]:
        yield 1
        yield 2
        raise RuntimeError("the third cannot be made")

    got = []
    with pytest.raises(RuntimeError, match="the third cannot be made"):
        for value in prefetch_in_thread(source(), 1):
            got.append(value)
    assert got == [1, 2]


def test_a_caller_that_stops_early_ends_the_reading_thread():
    made = []

    def source() -> Iterator[Any]:
        for number in range(10**6):
            made.append(number)
            yield number

    ahead = prefetch_in_thread(source(), 2)
    assert next(ahead) == 0
    ahead.close()  # type: ignore[attr-defined]
    assert len(made) <= 5
