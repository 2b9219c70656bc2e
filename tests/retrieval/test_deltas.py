"""Deltas: what is in them, and that an export and its deltas are the new export."""

import errno
import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports import lookup, share
from recgpt_torchrec.retrieval.exports.applying import apply_deltas
from recgpt_torchrec.retrieval.exports.chain import open_chain
from recgpt_torchrec.retrieval.exports.changes import has_moved
from recgpt_torchrec.retrieval.exports.reading import open_delta, open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.retrieval.exports.writing import write_delta, write_export
from recgpt_torchrec.storage import parts
from tests.retrieval.delta_helpers import (
    DIM,
    SOURCE,
    Day,
    batches,
    make_datasets,
    make_days,
    one_rank,
    rows_of,
    small_groups,
    write_day,
)
from tests.support import change_json, walks, write_dataset
from tools.ranks import run_ranks


@pytest.fixture(autouse=True)
def groups() -> Iterator[None]:
    yield from small_groups()


@pytest.mark.parametrize(
    ("ranks", "dtype", "interests"),
    [(1, "float32", 1), (1, "float16", 3), (1, "int8", 1), (2, "float32", 1), (2, "int8", 3)],
)
def test_an_export_and_its_deltas_are_the_new_export(tmp_path: Path, ranks: int, dtype: str, interests: int) -> None:
    make_datasets(tmp_path)
    if ranks == 1:
        one_rank(0, 1, str(tmp_path), dtype, interests, 0.0)
    else:
        run_ranks(one_rank, ranks, str(tmp_path), dtype, interests, 0.0)
    names = [str(tmp_path / name) for name in ("full0", "delta1", "delta2")]
    for days in (1, 2):
        apply_deltas(str(tmp_path / f"applied{days}"), open_chain(names[: days + 1]))
        applied, full = (open_export(str(tmp_path / f"{name}{days}")) for name in ("applied", "full"))
        assert rows_of(applied) == rows_of(full)
        assert (applied.manifest.items, applied.manifest.users) == (full.manifest.items, full.manifest.users)
        assert applied.state == open_delta(names[days]).state
        applied.manifest.check_parts(applied.path, checksums=True)
    # A delta after the applied export is the one after the export and its delta.
    day = make_days(interests)[2]
    dataset = Dataset.open(str(tmp_path / "data2"))
    after_applied = write_day(tmp_path / "other2", dataset, day, [str(tmp_path / "applied1")])
    assert after_applied.base == open_delta(names[2]).manifest.base
    assert rows_of(open_delta(str(tmp_path / "other2"))) == rows_of(open_delta(names[2]))


def test_a_delta_holds_what_is_new_or_moved_and_names_who_is_gone(tmp_path: Path) -> None:
    make_datasets(tmp_path)
    one_rank(0, 1, str(tmp_path), "float32", 1, 0.01)
    days = make_days()
    held = days[0]
    for number in (1, 2):
        day, delta = days[number], open_delta(str(tmp_path / f"delta{number}"))
        manifest, rows = delta.manifest, rows_of(delta)
        for kind, before, now in (("items", held.items, day.items), ("users", held.users, day.users)):
            expected = {
                id: vector
                for id, vector in now.items()
                if id not in before
                or float(np.linalg.norm(vector - before[id])) > 0.01 * float(np.linalg.norm(before[id]))
            }
            assert rows[kind].keys() == expected.keys()
            for id, row in rows[kind].items():
                np.testing.assert_array_equal(np.float32(row["vector"]), expected[id])
                assert row["key"] == f"{kind[:-1]} {id}"
            assert getattr(manifest, f"new_{kind}") == len(now.keys() - before.keys())
            assert getattr(manifest, kind) == len(now)
            before |= expected
        gone = held.users.keys() - day.users.keys()
        removed = [row for batch in delta.removed_users() for row in batch.to_pylist()]
        assert removed and {row["user_id"]: row["key"] for row in removed} == {id: f"user {id}" for id in gone}
        assert list(delta.removed_items()) == []
        for id in gone:
            del held.users[id]


def test_an_export_has_the_bias_of_its_last_delta_and_without_one_its_fingerprint_stays(tmp_path: Path) -> None:
    dataset, *_ = make_datasets(tmp_path)
    day = make_days()[0]
    own: dict[str, Any] = {"everyone": True, **SOURCE}
    full, delta = str(tmp_path / "full"), str(tmp_path / "delta")

    def rows(vectors: dict[int, np.ndarray]) -> Any:
        return batches(vectors, 0, 1)

    write_export(full, dataset, items=rows(day.items), users=rows(day.users), dim=DIM, interests=1, **own)
    before = open_export(full).fingerprint
    change_json(tmp_path / "full/manifest.json", lambda values: values.pop("repeat_bias"))
    assert open_export(full).manifest.repeat_bias == 0 and open_export(full).fingerprint == before
    chain = open_chain([full])
    write_delta(delta, dataset, chain, 0.0, items=rows(day.items), users=rows(day.users), repeat_bias=-2.5, **own)
    apply_deltas(str(tmp_path / "applied"), open_chain([full, delta]))
    assert open_export(str(tmp_path / "applied")).manifest.repeat_bias == -2.5
    change_json(tmp_path / "full/manifest.json", lambda values: values.update(repeat_bias=99))
    with pytest.raises(InputError, match="repeat_bias is 99.0, it must be from -30 to 30"):
        open_export(full)


def test_a_chain_with_a_tolerance_does_not_drift(tmp_path: Path) -> None:
    """Vectors that move by less than the tolerance each day are sent once they have moved by more in all."""
    dataset, *_ = make_datasets(tmp_path)
    start = make_days()[0]
    write_day(tmp_path / "full0", dataset, start)
    since = [str(tmp_path / "full0")]
    sent = []
    for number in (1, 2, 3):
        factor = np.float32(1 + 0.008 * number)
        day = Day(*({id: vector * factor for id, vector in vectors.items()} for vectors in start))
        manifest = write_day(tmp_path / f"delta{number}", dataset, day, since, 0.01)
        sent.append(sum(part.rows for part in manifest.item_parts))
        since.append(str(tmp_path / f"delta{number}"))
        held, is_there = open_chain(since).vectors_of("items", np.arange(30))
        assert is_there.all()
        now = np.stack([day.items[id] for id in range(30)])
        assert not has_moved(held, now, 0.01).any()
    assert sent == [0, 30, 0]
    apply_deltas(str(tmp_path / "applied"), open_chain(since))
    _, vectors = open_export(str(tmp_path / "applied")).item_vectors()
    np.testing.assert_array_equal(vectors, np.stack([start.items[id] * np.float32(1.016) for id in range(30)]))


def test_the_state_is_read_in_any_order_and_from_the_newest_folder(tmp_path: Path) -> None:
    make_datasets(tmp_path)
    one_rank(0, 1, str(tmp_path), "int8", 1, 0.0)
    chain = open_chain([str(tmp_path / name) for name in ("full0", "delta1", "delta2")])
    full = open_export(str(tmp_path / "full2"))
    expected = {
        row["user_id"]: vector
        for batch in full.users()
        for row, vector in zip(batch.to_pylist(), vectors_of(batch), strict=True)
    }
    ids = np.random.default_rng(0).permutation(70)
    vectors, is_there = chain.vectors_of("users", ids)
    np.testing.assert_array_equal(is_there, [id in expected for id in ids])
    for id, vector in zip(ids[is_there], vectors[is_there], strict=True):
        np.testing.assert_array_equal(vector, expected[id])
    shares = [
        [id for batch in chain.rows("users", ["user_id"], rank=r, world_size=2) for id in batch[0].to_pylist()]
        for r in (0, 1)
    ]
    assert all(shares) and sorted(itertools.chain(*shares)) == sorted(expected)
    assert chain.vectors_of("items", np.zeros(0, np.int64))[0].shape == (0, DIM)


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_distances_are_those_of_a_plain_loop(tolerance: float, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    old = (rng.normal(size=(200, *shape)) * 10.0 ** rng.integers(-42, 5, (200, *[1] * len(shape)))).astype(np.float32)
    old[:3] = 0
    new = (old * rng.choice([1, 1 + 1e-6, 1.009, 1.011, 3], old.shape)).astype(np.float32)
    new[2] = 1e-40
    expected = []
    for before, now in zip(old.reshape(200, -1, 5).tolist(), new.reshape(200, -1, 5).tolist(), strict=True):
        moved = [
            sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 > tolerance * sum(a**2 for a in x) ** 0.5
            for x, y in zip(before, now, strict=True)
        ]
        expected.append(any(moved))
    np.testing.assert_array_equal(has_moved(old, new, tolerance), expected)
    if not tolerance:
        np.testing.assert_array_equal(expected, (old != new).reshape(200, -1).any(axis=1))


def full_disk(rank: int, world_size: int, folder: str, is_users: bool, delta: bool) -> str:
    """The message of an export on two ranks, one of which has a full disk."""
    here = Path(folder)
    written = itertools.count()
    write = parts._ChecksummedFile.write

    def write_until_full(self: Any, data: bytes) -> int:
        if "users/" in open_paths[-1] or not is_users:
            if next(written) > 8:
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    open_paths: list[str] = []
    start = parts._PartWriter.__init__

    def note_path(self: Any, fs: Any, root: str, path: str, *others: Any) -> None:
        open_paths.append(path)
        start(self, fs, root, path, *others)

    for _ in small_groups():
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(parts._ChecksummedFile, "write", write_until_full)
                patch.setattr(parts._PartWriter, "__init__", note_path)
            try:
                dataset, day = Dataset.open(str(here / "data1")), make_days()[1]
                since = [str(here / "full0")] if delta else None
                write_day(here / "new", dataset, day, since, rank=rank, world_size=world_size)
            except InputError as error:
                return str(error)
    return "written"


@pytest.mark.parametrize(("is_users", "delta"), [(False, False), (True, False), (True, True)])
def test_a_full_disk_of_one_rank_is_the_same_error_on_all(tmp_path: Path, is_users: bool, delta: bool) -> None:
    datasets = make_datasets(tmp_path)
    write_day(tmp_path / "full0", datasets[0], make_days()[0])
    messages = run_ranks(full_disk, 2, str(tmp_path), is_users, delta, timeout=60)
    assert len(set(messages)) == 1
    assert f"cannot write {tmp_path / 'new'}" in messages[0] and "No space left on device" in messages[0]
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_memory_does_not_grow_with_the_number_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of what numpy allocates while a delta is written: some row groups, and a bit per id."""
    monkeypatch.setattr(share, "GROUP_BYTES", 2**16)
    monkeypatch.setattr(share, "CHANGED_GROUP_BYTES", 2**16)
    monkeypatch.setattr(lookup, "KEPT_BYTES", 2**18)

    def vectors(count: int, factor: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, count, 512):
            ids = np.arange(start, min(start + 512, count))
            yield ids, np.full((ids.size, 32), factor, np.float32)

    peaks = []
    for count in (8_000, 32_000):
        folder = tmp_path / str(count)
        dataset = write_dataset(folder / "data", walks(users=20, items=count), items=count, vocabulary="v")
        shape: dict[str, Any] = {"dim": 32, "interests": 1, "everyone": True, **SOURCE}
        write_export(str(folder / "full"), dataset, items=vectors(count, 1), users=vectors(20, 1), **shape)
        chain = open_chain([str(folder / "full")])
        tracemalloc.start()
        write_delta(
            str(folder / "delta"),
            dataset,
            chain,
            0.0,
            items=vectors(count, 2),
            users=vectors(20, 2),
            everyone=True,
            **SOURCE,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 2**16 < peaks[0] < 32_000 * 32 * 4 / 2  # the vectors of all would not fit
    assert peaks[1] < 1.3 * peaks[0]
