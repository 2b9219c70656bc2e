"""Every target of the training part is trained on once an epoch, for any layout and wherever a run stops."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Loss
from recgpt_torchrec.data.candidates import Place, id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import no_histories
from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.data.windows import Cursor, Position, Queue, RowGroup, deal_windows, windows_of
from recgpt_torchrec.errors import InputError
from tests.data.stream_helpers import MAX_LEN, expected_pairs, pairs, read_until_stopped, stream_of
from tests.support import items_of, start_forkserver, walks, write_dataset

layouts = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "users": st.integers(1, 25),
        "items": st.integers(1, 9),
        "longest": st.integers(1, 20),
        "rows_per_group": st.integers(1, 6),
        "groups_per_part": st.integers(1, 3),
        "window_groups": st.integers(1, 4),
        "tokens": st.integers(MAX_LEN, 60),
        "world": st.integers(1, 5),
        "long_histories": st.sampled_from(["newest", "windows"]),
    }
)
CASES = int(os.environ.get("RECGPT_CASES", "25"))
"""Layouts that hypothesis tries of each kind; hundreds take minutes."""
few = settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dataset_of(folder: Path, layout: dict) -> tuple[Dataset, list[list[int]]]:
    folder = folder / str(len(list(folder.iterdir())))
    histories = walks(layout["users"], layout["items"], layout["seed"], shortest=1, longest=layout["longest"])
    sizes = {name: layout[name] for name in ("rows_per_group", "groups_per_part")}
    return write_dataset(folder, histories, items=layout["items"], **sizes), histories


def laid_out(folder: Path, layout: dict, epoch: int = 1) -> tuple[SequenceStream, list[list[int]], Counter]:
    dataset, histories = dataset_of(folder, layout)
    settings = {name: layout[name] for name in ("tokens", "window_groups", "long_histories")}
    stream = stream_of(dataset, seed=layout["seed"], **settings)
    return stream, histories, expected_pairs(histories, layout["long_histories"], MAX_LEN, layout["seed"], epoch)


@few
@given(layouts, st.integers(0, 2))
def test_every_target_comes_once_an_epoch_on_any_number_of_ranks(tmp_path, layout, epoch):
    stream, histories, wanted = laid_out(tmp_path, layout, epoch)
    found: Counter = Counter()
    read = 0.0
    for rank in range(layout["world"]):
        for batch in stream.batches(epoch, rank=rank, world_size=layout["world"]):
            assert (batch.sequence >= 0).sum() <= layout["tokens"]
            assert batch.histories.read is not None
            found.update(pairs(batch))
            read += batch.histories.read.sum()
    assert found == wanted
    assert read == pytest.approx(sum(map(len, histories)))


@few
@given(layouts, st.data())
def test_a_run_stopped_anywhere_resumes_with_each_remaining_target_once(tmp_path, layout, data):
    stream, _, wanted = laid_out(tmp_path, layout)
    for _ in range(2):  # stopped, resumed on as many or another number of ranks, and stopped again
        position = Position(1)
        found: Counter = Counter()
        for last in (False, False, True):
            world = data.draw(st.integers(1, 4), "ranks")
            stops = [10**6 if last else data.draw(st.integers(0, 4), "batches") for _ in range(world)]
            left = read_until_stopped(stream, position, stops, found)
            position = Position.from_state_dict(Position(1, left).state_dict())
        assert found == wanted
        assert position.queues is not None and not any(queue.windows for queue in position.queues)


@few
@given(layouts, st.booleans(), st.sampled_from(["all", "sampled", "in_batch"]))
def test_a_row_holds_the_same_targets_as_a_grid_batch_by_batch(tmp_path, layout, pad, candidates):
    dataset, _ = dataset_of(tmp_path, layout)
    arguments = {name: layout[name] for name in ("seed", "tokens", "window_groups", "long_histories")}
    arguments["loss"] = Loss(candidates=candidates, negatives=4)
    in_grid, in_row = stream_of(dataset, **arguments), stream_of(dataset, layout="row", pad=pad, **arguments)
    shapes = set()
    for grid, row in zip(in_grid.batches(1), in_row.batches(1), strict=True):
        assert Counter(pairs(grid)) == Counter(pairs(row)) and grid.targets == row.targets
        assert grid.cursor == row.cursor
        drawn = items_of(row)[row.candidate_bag[: grid.candidate_bag.numel()]]
        assert torch.equal(items_of(grid)[grid.candidate_bag], drawn)
        shapes.add(tuple(tuple(value.shape) for value in vars(row).values() if isinstance(value, torch.Tensor)))
    empty = in_row.maker.empty()
    shapes.add(tuple(tuple(value.shape) for value in vars(empty).values() if isinstance(value, torch.Tensor)))
    assert not pad or len(shapes) == 1


def test_a_run_resumed_on_as_many_ranks_reads_the_same_batches(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(40, 30, longest=20), rows_per_group=4)
    stream = stream_of(dataset, tokens=20, loss=Loss(candidates="sampled", negatives=5))
    share = stream.batches()
    whole = list(share)
    assert len(whole) > 6
    assert [batch.cursor.batches for batch in whole] == list(range(1, len(whole) + 1))  # part of the negatives' seed
    for stop in range(1, len(whole)):
        share.done(whole[stop - 1].cursor)
        rest = list(stream.batches(0, Position(0, list(share.left))))
        assert len(rest) == len(whole) - stop
        for batch, other in zip(rest, whole[stop:], strict=True):
            assert list(pairs(batch)) == list(pairs(other))
            assert items_of(batch).tolist() == items_of(other).tolist()  # the negatives too
            assert batch.candidate_log_q.tolist() == other.candidate_log_q.tolist()


@few
@given(layouts, st.data())
def test_a_share_knows_the_windows_left_and_the_row_groups_of_each_batch(tmp_path, layout, data):
    stream, _, _ = laid_out(tmp_path, layout)
    world = layout["world"]
    stops = [data.draw(st.integers(0, 3), "batches") for _ in range(world)]
    queues = read_until_stopped(stream, Position(1), stops, Counter())  # so that a share may begin within a window
    owner: dict[int, RowGroup] = {}
    for number, group in enumerate(stream.groups):
        first = sum(before.rows for before in stream.groups[:number])
        owner |= dict.fromkeys(range(first, first + group.rows), group)
    for rank in range(world):
        share = stream.batches(1, Position(1, queues), rank, world)
        assert share.left == share.source.queues == queues[rank : rank + 1]
        for batch in share:
            read = share.groups_of(batch.cursor, share.left[0])
            touched = {owner[user] for user in batch.histories.users.tolist()}
            assert touched <= set(read) and len(set(read)) == len(read)
            windows = [window for window in share.source.windows if touched & set(window.groups)]
            assert set(read) == {group for window in windows for group in window.groups}
            share.done(batch.cursor)
            assert share.left == [share.source.queues[0].after(batch.cursor)]
        assert not share.left[0].windows


def test_shares_are_the_queues_of_a_ranks_workers_and_each_worker_has_its_own(tmp_path):
    stream = stream_of(write_dataset(tmp_path / "data", walks(40, 9), rows_per_group=4), window_groups=1, workers=2)
    shares = [stream.batches(2, rank=rank, world_size=3) for rank in range(3)]
    windows = windows_of(stream.groups, 0, 2, 1)
    dealt = deal_windows(windows, 6)
    assert [queue for share in shares for queue in share.left] == dealt
    shares[1].done(Cursor(worker=1, windows_done=1, offset=0, batches=4))
    assert shares[1].left == [dealt[2], Queue(dealt[3].windows[1:], 4, dealt[3].groups)]
    position = Position(2, [queue for share in shares for queue in share.left])
    assert stream.batches(2, position, 1, 3).left == shares[1].left  # on as many ranks, what was left of this one
    anew = [queue for rank in range(2) for queue in stream.batches(2, position, rank, 2).left]
    assert anew == deal_windows(windows, 4, position)


def test_rows_are_shuffled_across_the_groups_of_a_window_and_anew_each_epoch(tmp_path):
    dataset = write_dataset(tmp_path / "data", [[u % 7, 1, 2, 3] for u in range(40)], rows_per_group=5)
    stream = stream_of(dataset, window_groups=4)
    orders = []
    for epoch in (0, 0, 1):
        orders.append([u for batch in stream.batches(epoch) for u in batch.histories.users.tolist()])
    assert orders[0] == orders[1] != orders[2]
    first_window = {user // 5 for user in orders[0][:10]}
    assert len(first_window) > 2, "rows of only one or two groups at the beginning: not shuffled within the window"
    alone = stream_of(write_dataset(tmp_path / "alone", [[u % 7, 1, 2, 3] for u in range(40)], rows_per_group=40))
    orders = []
    for epoch in (0, 1):
        orders.append([u for batch in alone.batches(epoch) for u in batch.histories.users.tolist()])
    assert orders[0] != orders[1], "the rows of one window stand alike in every epoch"


@pytest.mark.parametrize("split", ["validation", "test", "all"])
def test_evaluation_encodes_each_history_once_with_its_held_out_item(tmp_path, split):
    histories = walks(23, 9, shortest=1, longest=12)
    dataset = write_dataset(tmp_path / "data", histories, rows_per_group=4)
    stream = stream_of(dataset, split=split, tokens=15)
    found: dict = {}
    for rank in range(3):
        for batch in stream.batches(rank=rank, world_size=3):
            assert batch.target_slot.numel() == 0
            encoded, items = batch.histories, items_of(batch)
            for s, user in enumerate(encoded.users.tolist()):
                own = batch.sequence == s
                order = batch.position[own].argsort()
                inputs = items[batch.item_bag[own]][order].tolist()
                assert encoded.seen is not None
                seen = encoded.seen.to_lists()[s]
                assert user not in found
                found[user] = inputs, seen, None if encoded.held_out is None else int(encoded.held_out[s])
    cut = {"validation": -2, "test": -1, "all": None}[split]
    wanted = {
        user: (h[:cut][-MAX_LEN:], h[:cut], None if cut is None else h[cut])
        for user, h in enumerate(histories)
        if cut is None or len(h) >= 3
    }
    assert found == wanted


def test_a_batch_holds_as_many_users_as_given_and_every_target_comes_once(tmp_path):
    histories = walks(23, 30, shortest=4, longest=15)
    stream = stream_of(write_dataset(tmp_path, histories, items=30), tokens=5 * MAX_LEN, users=5)
    batches = list(stream.batches(epoch=1))
    assert [batch.histories.users.size for batch in batches] == [5, 5, 5, 5, 3]
    found = Counter(pair for batch in batches for pair in pairs(batch))
    assert found == expected_pairs(histories, "newest", MAX_LEN)
    assert stream.maker.capacity.users == 5


def test_users_with_one_two_and_three_items(tmp_path):
    dataset = write_dataset(tmp_path / "data", [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]], rows_per_group=2)
    stream = stream_of(dataset)
    batches = list(stream.batches())
    assert Counter(pair for batch in batches for pair in pairs(batch)) == {(1, (1,), 2): 1, (3, (6,), 7): 1}


def test_a_user_without_any_item_does_no_harm(tmp_path):
    dataset = write_dataset(tmp_path / "data", [[], [1, 2], [], [3, 4, 5, 6]], rows_per_group=1)
    for split in ("training", "all", "test"):
        stream = stream_of(dataset, split=split)
        assert sum(b.last_slot.numel() for b in stream.batches()) == (1 if split == "test" else 2)


@pytest.mark.parametrize("candidates", ["all", "sampled", "in_batch", "bce"])
def test_a_catalogue_of_one_item(tmp_path, candidates):
    dataset = write_dataset(tmp_path / "data", [[0] * 6] * 5, rows_per_group=2)
    stream = stream_of(dataset, loss=Loss(candidates=candidates))
    batches = list(stream.batches())
    assert sum(batch.target_slot.numel() for batch in batches) == 5 * 3
    assert all(batch.target_candidate.tolist() == [0] * batch.target_slot.numel() for batch in batches)


def test_a_window_is_shared_by_ranks_and_those_without_a_row_get_no_batch_and_an_empty_one_can_be_made(tmp_path):
    stream = stream_of(write_dataset(tmp_path / "data", walks(3, 5), rows_per_group=3))
    counts = [len(list(stream.batches(rank=rank, world_size=4))) for rank in range(4)]
    assert sorted(counts) == [0, 1, 1, 1]
    empty = stream.maker.empty()
    assert empty.histories.users.size == no_histories().users.size == 0 and empty.candidate_bag.numel() == 5


def imbalance(stream: SequenceStream, world: int, attention: float) -> tuple[float, float, list[int]]:
    """How much longer an epoch takes than if all ranks had equal batches in every step.

    Args:
        stream: of `world` ranks.
        attention: cost of one of the n^2 pairs of a sequence of n tokens, in that of a token.

    Returns:
        The sum over steps of the largest number of tokens of any rank, over that of the mean; the same of the work; and
        the number of steps of each rank.
    """
    shares = [list(stream.batches(rank=rank, world_size=world)) for rank in range(world)]
    steps = [len(share) for share in shares]
    cost = np.zeros((2, world, max(steps)))
    for rank, share in enumerate(shares):
        for step, batch in enumerate(share):
            tokens = np.maximum(batch.histories.lengths - 1, 0)
            cost[:, rank, step] = tokens.sum(), (tokens + attention * tokens**2).sum()
    in_tokens, in_work = cost.max(1).sum(1) / cost.mean(1).sum(1)
    return in_tokens, in_work, steps


@pytest.mark.parametrize("world", [2, 3, 5, 8, 12])
def test_ranks_end_an_epoch_together_though_their_number_does_not_divide_that_of_the_windows(tmp_path, world):
    """10 windows of 160 users: dealt whole, 3 ranks took 1.19 times as long as if equal, 8 ranks 1.53, 12 1.46."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(2.2, 0.6, 1600)).astype(int), 3, 40)
    histories = [rng.integers(50, size=length).tolist() for length in lengths]
    dataset = write_dataset(tmp_path / "data", histories, items=50, rows_per_group=40, groups_per_part=8)
    stream = stream_of(dataset, tokens=160, window_groups=4, max_len=20, loss=Loss(candidates="sampled", negatives=2))
    in_tokens, in_work, steps = imbalance(stream, world, attention=1 / 384)
    assert max(steps) - min(steps) <= 2
    assert max(in_tokens, in_work) < 1.13  # 12 ranks have 7 steps at most, and no batch is quite full


FIRST_BATCH = """
import sys
from recgpt_torchrec.data.dataset import Dataset
from tests.data.stream_helpers import stream_of
batch = next(iter(stream_of(Dataset.open(sys.argv[1]), tokens=20).batches()))
print(batch.targets, "pandas" in sys.modules)
"""


@pytest.mark.parametrize("hold_out", ["last", "time"])
def test_the_first_batch_does_not_wait_for_an_import_of_pandas(tmp_path, hold_out):
    starts = [(2, 3)] * 8 if hold_out == "time" else None
    write_dataset(tmp_path / "data", walks(8, 9, shortest=4), hold_out=hold_out, starts=starts)
    command = [sys.executable, "-c", FIRST_BATCH, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    targets, imported = done.stdout.split()
    assert int(targets) > 0 and imported == "False"


def test_loader_processes_make_the_same_batches_as_the_thread(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(20, 9), rows_per_group=4)
    here, apart = stream_of(dataset), stream_of(dataset, workers=1)
    start_forkserver()
    expected, found = list(here.batches()), list(apart.batches())
    assert [list(pairs(batch)) for batch in found] == [list(pairs(batch)) for batch in expected]
    assert [batch.cursor for batch in found] == [batch.cursor for batch in expected]


def test_a_batch_that_cannot_hold_the_longest_history_is_an_error_and_no_endless_loop(tmp_path):
    dataset = write_dataset(tmp_path / "data", [list(range(12))] * 2)
    with pytest.raises(InputError, match="--batch.tokens 4 .* --model.max_len 9"):
        stream_of(dataset, tokens=4, max_len=9)


@pytest.mark.parametrize("prompts", [True, False])
def test_answers_stay_beside_their_items_whatever_is_cut_and_shuffled(tmp_path, prompts):
    """Each item's answers are a function of the item here, and so they must be where it is the input."""
    rng = np.random.default_rng(0)
    histories, segments = walks(30, 20, shortest=1, longest=14), []
    for history in histories:
        segments.append([0 if p == 0 else int(rng.integers(2)) for p in range(len(history))])
    real = [[i for i, s in zip(h, k, strict=True) if s == 0] for h, k in zip(histories, segments, strict=True)]
    answers = [[a for i in row for a in (i, (i + 7) % 20)] for row in real]
    scores = [[float(i) for i in row for _ in range(2)] for row in real]
    more = {"answer_ids": pa.array(answers, pa.list_(pa.int64())), "answer_scores": pa.array(scores)}
    dataset = write_dataset(tmp_path / "data", histories, items=20, segments=segments, more=more)
    stream = stream_of(
        dataset,
        prompts=prompts,
        answers=2,
        predict_from="interacted",
        soft_targets=0.5,
        loss=Loss(candidates="sampled", negatives=5),
    )
    seen = 0
    for batch in stream.batches(0, Position(0)):
        items, inputs = items_of(batch), batch.item_bag.flatten()
        for slot, target, soft, weight in zip(
            batch.target_slot.tolist(), batch.target_bag, batch.soft_bag, batch.soft_weight, strict=True
        ):
            item, goal = int(items[inputs[slot]]), int(items[target])
            there = [a for a in (item, (item + 7) % 20) if a != goal]
            assert {int(items[b]) for b, w in zip(soft, weight, strict=True) if w > 0} == set(there)
            assert float(weight.sum()) == pytest.approx(0.5)
            seen += 1
    assert seen >= 40


def test_in_batch_an_answer_that_is_never_a_target_has_no_weight(tmp_path):
    histories = [[0, 1, 2, 3, 9], [3, 2, 1, 0, 9]]  # the last two of each are held out
    answers = [[9, 3] * 5, [9, 1] * 5]
    more = {
        "answer_ids": pa.array(answers, pa.list_(pa.int64())),
        "answer_scores": pa.array([[5.0, 0.0] * 5, [5.0, 0.0] * 5]),
    }
    dataset = write_dataset(tmp_path / "data", histories, items=10, more=more)
    for loss, found in ((Loss(candidates="in_batch"), {1, 3}), (Loss(candidates="all"), {1, 3, 9})):
        (batch,) = stream_of(dataset, answers=2, soft_targets=0.5, loss=loss).batches(0, Position(0))
        assert {*items_of(batch)[batch.soft_bag[batch.soft_weight > 0]].tolist()} == found


@pytest.mark.parametrize("long_histories", ["newest", "windows"])
def test_only_new_targets_are_predicted_from_the_whole_history_before_them(tmp_path, long_histories):
    rng = np.random.default_rng(5)
    histories = walks(40, 30, shortest=1, longest=25)
    marks = [[int(place < rng.integers(0, 25)) for place in range(len(history))] for history in histories]
    marks = [sorted(row, reverse=True) for row in marks]  # what came first was trained on
    more = {"trained": pa.array(marks, pa.list_(pa.int8()))}
    dataset = write_dataset(tmp_path, histories, items=30, more=more, rows_per_group=8)
    found = []
    for new_targets in (True, False):
        stream = stream_of(dataset, max_len=6, long_histories=long_histories, new_targets=new_targets)
        batches = list(stream.batches())
        found.append(Counter(pair for batch in batches for pair in pairs(batch)))
        read = sum(float(np.sum(batch.histories.read)) for batch in batches if batch.histories.read is not None)
        assert read == pytest.approx(sum(map(len, histories)))  # progress is that of the whole dataset
    new: Counter = Counter()
    for user, (history, row) in enumerate(zip(histories, marks, strict=True)):
        trains = len(history) - 2 if len(history) >= 3 else len(history)
        for target in range(max(1, trains - 6) if long_histories == "newest" else 1, trains):
            new[user, history[target]] += not row[target]
    assert Counter((pair[0], pair[-1]) for pair in found[0].elements()) == +new
    # Each is predicted from as much as there is in whole windows from the newest on.
    assert found[0] <= expected_pairs(histories, long_histories, 6, epoch=None)
    assert found[0].total() < found[1].total()


def test_each_rank_of_all_looks_up_its_range_and_what_its_batch_has_besides(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(12, 40, longest=15), items=40, rows_per_group=2)
    streams = [stream_of(dataset, place=Place(rank, 3)) for rank in range(3)]
    capacities = {stream.maker.capacity for stream in streams}
    assert len(capacities) == 1 and len({stream.maker.empty().bags.stride() for stream in streams}) == 1
    for rank, stream in enumerate(streams):
        first, stop = id_range(40, rank, 3)
        for batch in [*stream.batches(rank=rank, world_size=3), stream.maker.empty()]:
            items = items_of(batch).tolist()
            assert items[: stop - first] == list(range(first, stop))
            used = {item for *_, item in pairs(batch)} | {item for _, items, _ in pairs(batch) for item in items}
            assert set(items[stop - first :]) == used - set(range(first, stop))


@pytest.mark.parametrize("workers", [0, 2])
def test_different_negatives_are_drawn_again_by_a_resumed_run_and_by_no_other_rank(tmp_path, workers):
    dataset = write_dataset(tmp_path / "data", walks(120, 200, longest=15), items=200, rows_per_group=2)
    loss = Loss(negatives=8, negatives_across_ranks="different")

    def negatives(batch: Any) -> list[int]:
        return items_of(batch)[batch.candidate_bag].tolist()

    drawn = []
    for rank in range(2):
        stream = stream_of(dataset, loss=loss, place=Place(rank, 2), workers=workers)
        shares = [stream.batches(1, None, other, 2) for other in range(2)]
        batches = list(shares[rank])
        assert len(batches) >= 4
        for batch in batches[:2]:
            shares[rank].done(batch.cursor)
        position = Position(1, [queue for share in shares for queue in share.left])
        resumed = list(stream.batches(1, position, rank, 2))
        assert [negatives(batch) for batch in resumed] == [negatives(batch) for batch in batches[2:]]
        drawn += [tuple(negatives(batch)) for batch in batches]
        drawn += [tuple(negatives(stream.maker.empty(1, step))) for step in (100, 101)]
        assert drawn[-1] == tuple(negatives(stream.maker.empty(1, 101))) != tuple(negatives(stream.maker.empty(2, 101)))
    assert len(set(drawn)) == len(drawn)
