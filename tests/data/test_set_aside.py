"""Damaged rows that are skipped: counted and listed once on any ranks, however often a run resumes."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.damage import Damage, SetAside
from recgpt_torchrec.data.windows import Position
from recgpt_torchrec.distributed.lockstep import Lockstep
from recgpt_torchrec.errors import InputError
from tests.data.reader_helpers import HISTORIES, PART, read_everything, remove_part
from tests.data.stream_helpers import MAX_LEN, expected_pairs, read_until_stopped, stream_of
from tests.support import rewrite, start_forkserver
from tools.ranks import run_ranks


def write_unknown_items(data: Path, users: Iterable[int]) -> None:
    for part in range(3):

        def change(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                if row["user_id"] in users:
                    row["item_ids"][0] = 99

        rewrite(data, change, part=part)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_run_stopped_anywhere_skips_the_same_rows_and_lists_each_once(undamaged, tmp_path, data):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    shutil.copytree(undamaged, folder / "data")
    users = sorted(data.draw(st.sets(st.integers(0, 23)), "damaged users"))
    write_unknown_items(folder / "data", users)
    lost = data.draw(st.booleans(), "a part lost")
    if lost:
        os.rename(folder / "data" / PART, folder / "part")
    bad = {*users, *(range(8, 16) if lost else ())}
    wanted = expected_pairs([[] if n in bad else h[:-1] for n, h in enumerate(HISTORIES)], "newest", MAX_LEN)
    found: Counter = Counter()
    position = Position(1)
    for last in (False, False, True):
        log = SetAside(str(folder / "damaged.jsonl"), limit=24)
        stream = stream_of(Dataset.open(str(folder / "data"), damaged="skip"), set_aside=log)
        world = data.draw(st.integers(1, 4), "ranks")
        stops = [10**6 if last else data.draw(st.integers(0, 4), "batches") for _ in range(world)]
        left = read_until_stopped(stream, position, stops, found)
        position = Position.from_state_dict(json.loads(json.dumps(Position(1, left).state_dict())))
        if lost and any(damage.row_group is None for damage in log.listed()) and not (folder / "data" / PART).exists():
            os.rename(
                folder / "part", folder / "data" / PART
            )  # restored while the run was stopped: this epoch ignores it
    assert found == wanted
    places = [(damage.part, damage.row_group, damage.row) for damage in log.listed()]
    assert len(places) == len(set(places))
    assert sum(damage.rows for damage in log.listed()) == len(bad)


def test_a_position_in_other_row_groups_is_refused(data):
    stream = stream_of(Dataset.open(str(data)))
    share = stream.batches()
    share.done(next(iter(share)).cursor)
    position = Position.from_state_dict(Position(0, share.left).state_dict())
    remove_part(data)
    log = SetAside(str(data / "damaged.jsonl"), limit=100)
    stream = stream_of(Dataset.open(str(data), damaged="skip"), set_aside=log)
    with pytest.raises(InputError, match="stopped within an epoch over 6 row groups, now the dataset has 5"):
        stream.batches(0, position)
    for rank in range(2):
        assert stream.batches(1, Position(1), rank, 2).left[0].windows  # the next epoch reads the new row groups


def test_more_damaged_rows_than_the_limit_end_the_run_and_are_listed(data, tmp_path):
    write_unknown_items(data, [1, 2, 9])
    log = SetAside(str(tmp_path / "damaged.jsonl"), limit=2)
    stream = stream_of(Dataset.open(str(data)), set_aside=log)
    with pytest.raises(InputError, match=rf"3 rows are damaged, listed in {log.path}, more than .*_limit 2; the last"):
        for epoch in range(3):
            read_everything(stream, epoch)
    assert {(damage.part[-9:-8], damage.row_group, damage.row) for damage in log.listed()} == {
        ("0", 0, 1), ("0", 0, 2), ("1", 0, 1)}  # fmt: skip
    raised = SetAside(log.path, limit=3)
    read_everything(stream_of(Dataset.open(str(data)), set_aside=raised))
    assert len(raised.listed()) == 3


def list_some(path: str, start: int) -> None:
    log = SetAside(path, limit=10**6)
    for row in range(start, start + 40):
        log.add([Damage("part", 0, row, 1, "x" * 300), Damage("part", 0, row + 1, 1, "x" * 300)])


def test_concurrent_writers_list_each_row_once(tmp_path, monkeypatch):
    listed = SetAside.listed

    def slowly(self: SetAside) -> list[Damage]:
        found = listed(self)
        time.sleep(0.001)  # time for others to write meanwhile, if they may
        return found

    monkeypatch.setattr(SetAside, "listed", slowly)
    path = str(tmp_path / "damaged.jsonl")  # the lock is on the opened file: threads wait as processes do
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(list_some, [path] * 3, (0, 0, 20)))
    assert sorted(damage.row for damage in SetAside(path, limit=0).listed()) == list(range(61))  # type: ignore[type-var]


def test_a_list_that_cannot_be_written_is_an_error(data, tmp_path):
    write_unknown_items(data, [1])
    log = SetAside(str(tmp_path / "no/damaged.jsonl"), limit=9)
    with pytest.raises(InputError, match="damaged rows cannot be listed there"):
        read_everything(stream_of(Dataset.open(str(data)), set_aside=log))


# --------------------------------------------------------------------------------- loader processes and ranks


def test_an_error_in_a_loader_process_reaches_the_caller_as_it_is(data, tmp_path):
    write_unknown_items(data, [9])
    start_forkserver()
    log = SetAside(str(tmp_path / "damaged.jsonl"), limit=0)
    stream = stream_of(Dataset.open(str(data)), workers=2, set_aside=log)
    with pytest.raises(InputError) as caught:
        list(stream.batches())
    assert str(caught.value).startswith("1 rows are damaged, listed in ")
    assert f"{PART}, row group 0, row 1: item id 99 is outside the vocabulary" in str(caught.value)
    assert "Traceback" not in str(caught.value) and "DataLoader" not in str(caught.value)
    assert [damage[:3] for damage in log.listed()] == [(PART, 0, 1)]


class Dies(SetAside):
    def add(self, damages: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_dies_is_an_error_with_what_to_do(data):
    write_unknown_items(data, range(24))
    start_forkserver()
    stream = stream_of(Dataset.open(str(data)), workers=1, set_aside=Dies("", limit=9))
    with pytest.raises(InputError, match="a loader process ended .*--stream.workers 0"):
        list(stream.batches())


def step_through(rank: int, world_size: int, data: str) -> list[str]:
    """The errors with a damaged row, and with a bug on rank 1, while the other rank has batches left."""

    def broken(batches: Any) -> Any:
        yield next(batches)
        raise KeyError("a bug of ours")

    errors = []
    for path, bug in ((data, False), (f"{data}/intact", rank == 1)):
        stream = stream_of(Dataset.open(path), tokens=10)
        batches = iter(stream.batches(rank=rank, world_size=world_size))
        try:
            for _ in Lockstep(broken(batches) if bug else batches, stream.maker.empty):
                dist.all_reduce(torch.zeros(1))  # what a step does
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_an_error_of_one_rank_ends_all_of_them_with_that_error(data):
    shutil.copytree(data, data / "intact")
    write_unknown_items(data, [9])
    first, second = run_ranks(step_through, 2, str(data), timeout=60)
    assert first[0] == second[0]
    assert first[0].startswith(f"InputError: {data}: {PART}, row group 0, row 1: item id 99 is outside")
    assert first[1] == "RuntimeError: rank 1 failed: KeyError('a bug of ours')"
    assert second[1] == "KeyError: 'a bug of ours'"
