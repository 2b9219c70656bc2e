"""A batch equals, slot by slot, the result of a plain loop over the histories."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.data.bags import bags_of
from recgpt_torchrec.data.batch import SequenceBatch, make_batch
from recgpt_torchrec.data.candidates import AllItems, Candidates, InBatch, Place
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.packed import MOST_ITEM_KEYS, Capacity, FixedShape
from recgpt_torchrec.data.targets import SoftShares
from tests.support import ids_by_bag, items_of

ROW = 8
ITEMS = 12
USERS = 5


@st.composite
def cases(draw) -> tuple[Histories, bool]:
    """Histories as long as a row may be, with or without segments, users more than once; and whether to predict."""
    predict = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, ROW + predict), max_size=6))
    total = sum(lengths)

    def of(strategy, count):
        return draw(st.lists(strategy, min_size=count, max_size=count))

    segments = draw(st.booleans())
    histories = Histories(
        users=np.array(of(st.integers(0, USERS - 1), len(lengths)), dtype=np.int64),
        items=np.array(of(st.integers(0, ITEMS - 1), total), dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        segments=np.array(of(st.integers(0, 2), total), dtype=np.int8) if segments else None,
    )
    return histories, predict


PAD = FixedShape(tokens=6 * ROW, sequences=7, candidates=ITEMS)
LAYOUTS: dict[str, dict] = {"grid": {}, "row": {"layout": "row"}, "padded row": {"layout": "row", "pad": PAD}}


def build_batch_and_candidates(
    histories: Histories,
    predict: bool,
    how: str,
    predict_from: str = "every",
    layout: str = "grid",
    last_target: bool = False,
) -> tuple[SequenceBatch, np.ndarray, np.ndarray]:
    """Make a batch; returns it with the candidates it must hold and their logQ."""
    capacity = Capacity(users=8, items=ITEMS, item_keys=3)
    arguments: dict = {"row_length": ROW, "capacity": capacity, "predict": predict, "predict_from": predict_from}
    arguments |= {**LAYOUTS[layout], "last_target": last_target}
    ids, log_q = np.zeros(0, np.int64), np.zeros(0, np.float32)
    rng = np.random.default_rng(0)
    if how == "all":
        everything = AllItems(ITEMS)
        arguments["draw"] = lambda targets: everything.draw(targets, rng)
        ids, log_q = np.arange(ITEMS), np.zeros(ITEMS, np.float32)
    elif how == "a range":
        a_range = AllItems(ITEMS, Place(1, 3))
        arguments["draw"] = lambda targets: a_range.draw(targets, rng)
        ids, log_q = np.arange(4, 8), np.zeros(4, np.float32)
    elif how == "sampled":
        ids, log_q = np.array([7, 0, 3, 11]), np.array([-1, -2, -3, -4], np.float32)
        arguments["draw"] = lambda targets: Candidates(ids, log_q)
    elif how == "in_batch":
        in_batch = InBatch(np.arange(ITEMS), tokens=5)
        arguments["draw"] = lambda targets: in_batch.draw(targets, rng)
        targets = {target for *_, target in expected(histories, predict, predict_from, last_target)}
        ids = np.array(sorted(targets - {None}), np.int64)
        log_q = in_batch.log_q[ids]
        assert np.unique(in_batch.log_q).size == ITEMS
    return make_batch(histories, **arguments), ids, log_q


def expected(
    histories: Histories, predict: bool, predict_from: str = "every", last_target: bool = False
) -> list[tuple]:
    """(sequence, position, user, item, segment, target or None) of every input entry, by a plain loop."""
    entries = []
    for s, user in enumerate(histories.users.tolist()):
        part = slice(int(histories.offsets[s]), int(histories.offsets[s + 1]))
        items = histories.items[part].tolist()
        segments = histories.segments[part].tolist() if histories.segments is not None else [0] * len(items)
        seen = since = 0
        last = max((q for q in range(len(items)) if segments[q] == 0), default=0)
        for p in range(len(items) - predict):
            seen, since = (seen + 1, 0) if segments[p] == 0 else (seen, since + 1)
            position = min(seen - 1 + since, ROW - 1)
            coming = [q for q in range(p + 1, len(items)) if segments[q] == 0]
            allowed = {"every": True, "interacted": segments[p] == 0, "last": coming[:1] == [p + 1]}[predict_from]
            allowed &= not last_target or coming[:1] == [last]
            target = items[coming[0]] if predict and coming and allowed else None
            entries.append((s, position, user, items[p], segments[p], target))
    return sorted(entries, key=str)


@given(
    cases(),
    st.sampled_from(["none", "all", "a range", "sampled", "in_batch"]),
    st.sampled_from(["every", "interacted", "last"]),
    st.sampled_from(list(LAYOUTS)),
    st.booleans(),
)
def test_a_batch_equals_a_plain_loop(case, how, predict_from, layout, last_target):
    histories, predict = case
    batch, candidates, log_q = build_batch_and_candidates(histories, predict, how, predict_from, layout, last_target)
    users, items = ids_by_bag(batch.bags)
    assert len(users) >= 8 and len(items) >= ITEMS
    for filled in ([id for id in ids if id is not None] for ids in (users, items)):
        assert len(set(filled)) == len(filled), "an id is looked up twice"
    flat = {
        name: getattr(batch, name).flatten().tolist()
        for name in ("sequence", "position", "user_bag", "item_bag", "segment")
    }
    count = batch.targets
    targets = dict(zip(batch.target_slot[:count].tolist(), batch.target_bag[:count].tolist(), strict=True))
    found = [
        (
            sequence,
            flat["position"][slot],
            users[flat["user_bag"][slot]],
            items[flat["item_bag"][slot]],
            flat["segment"][slot],
            items[targets[slot]] if slot in targets else None,
        )
        for slot, sequence in enumerate(flat["sequence"])
        if sequence >= 0
    ]
    found = sorted(found, key=str)
    wanted = expected(histories, predict, predict_from, last_target)
    assert found == wanted
    assert len(targets) == count == float(batch.global_targets)
    assert all(flat["sequence"][slot] >= 0 for slot in targets)

    size = candidates.size
    assert [items[bag] for bag in batch.candidate_bag[:size].tolist()] == candidates.tolist()
    assert np.array_equal(batch.candidate_log_q[:size].numpy(), log_q)
    assert batch.candidates_first == (how in ("all", "a range"))
    assert (batch.target_item is None) == (batch.candidate_item is None) == (how != "a range")
    if batch.target_item is not None and batch.candidate_item is not None:  # ranks share candidates
        assert batch.target_item[:count].tolist() == [items[bag] for bag in batch.target_bag[:count].tolist()]
        assert batch.candidate_item[:size].tolist() == candidates.tolist() == sorted(candidates)
        assert (batch.target_item[count:] == -1).all() and (batch.candidate_item[size:] > ITEMS).all()
    for bag, own in zip(batch.target_bag[:count].tolist(), batch.target_candidate.tolist(), strict=False):
        where = np.flatnonzero(candidates == items[bag])
        assert own == (where[0] if where.size else -1)

    # The newest entry of a sequence is the one in the last slot that is its own.
    sequences = sorted({s for s, *_ in wanted})
    last_slots = batch.last_slot[: len(sequences)].tolist()
    for slot in last_slots:
        assert slot == max(other for other, s in enumerate(flat["sequence"]) if s == flat["sequence"][slot])
    assert [flat["sequence"][slot] for slot in last_slots] == sequences

    lengths = [sum(s == number for s, *_ in wanted) for number in sequences]
    if layout == "grid":
        assert batch.cu_seqlens is None
    else:
        assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
        starts = [0, *itertools.accumulate(lengths)]
        assert batch.cu_seqlens[: len(starts)].tolist() == starts
        assert set(batch.cu_seqlens[len(starts) :].tolist()) <= {starts[-1]}
        for number, start, stop in zip(sequences, starts, starts[1:], strict=False):
            assert flat["sequence"][start:stop] == [number] * (stop - start)
    if layout == "padded row":
        check_padding(batch, predict, size)
        assert batch.max_seqlen == ROW
    else:
        assert batch.target_weight is None
        assert batch.target_bag.numel() == count and batch.candidate_bag.numel() == size
        assert batch.last_slot.numel() == len(sequences)
        assert batch.max_seqlen == max(lengths, default=0)


def check_padding(batch: SequenceBatch, predict: bool, candidates: int) -> None:
    """All sizes are those of `PAD`, and what is not filled counts for nothing."""
    targets = PAD.tokens if predict else 0
    assert batch.sequence.shape == batch.item_bag.shape == (1, PAD.tokens)
    assert batch.cu_seqlens is not None and batch.cu_seqlens.numel() == PAD.sequences + 1
    assert batch.last_slot.numel() == PAD.sequences
    assert batch.target_slot.numel() == batch.target_bag.numel() == batch.target_candidate.numel() == targets
    assert batch.soft_bag.shape == batch.soft_weight.shape == (targets, 0)
    assert batch.target_weight is not None and batch.target_weight.dtype == torch.float32
    assert batch.target_weight.tolist() == [1.0] * batch.targets + [0.0] * (targets - batch.targets)
    assert (batch.target_candidate[batch.targets :] == -1).all()
    assert batch.candidate_bag.numel() == batch.candidate_log_q.numel() == PAD.candidates
    assert (batch.candidate_log_q[candidates:] == torch.inf).all() and batch.candidate_log_q[
        :candidates
    ].isfinite().all()


def test_generated_and_shown_entries_are_inputs_and_never_targets():
    histories = Histories(
        users=np.array([3]),
        items=np.array([5, 6, 7, 8]),
        offsets=np.array([0, 4]),
        segments=np.array([0, 1, 2, 0], dtype=np.int8),
    )
    for predict_from, slots in {"every": [0, 1, 2], "interacted": [0], "last": [2]}.items():
        batch, _, _ = build_batch_and_candidates(histories, True, "all", predict_from)
        assert batch.segment.flatten()[:3].tolist() == [0, 1, 2]
        assert batch.position.flatten()[:3].tolist() == [0, 1, 2]
        assert (batch.target_slot.tolist(), batch.target_bag.tolist()) == (slots, [8] * len(slots))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["none", "all", "a range", "sampled", "in_batch"])
def test_a_batch_without_sequences_has_the_shape_of_any_other(how, layout):
    batch, candidates, _ = build_batch_and_candidates(no_histories(), True, how, layout=layout)
    assert batch.sequence.shape == (1, {"grid": ROW, "row": 1, "padded row": PAD.tokens}[layout])
    assert (batch.sequence == -1).all()
    assert batch.targets == batch.global_targets == 0
    if layout == "padded row":
        check_padding(batch, True, candidates.size)
    else:
        assert batch.target_slot.numel() == batch.last_slot.numel() == 0
        assert batch.candidate_bag.numel() == candidates.size
    if layout == "row":
        assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 0]
    full, _, _ = build_batch_and_candidates(
        Histories(users=np.array([1]), items=np.array([2, 3]), offsets=np.array([0, 2])), True, how, layout=layout
    )
    for name in ("item_bag", "position", "target_slot", "target_bag", "candidate_bag", "target_candidate", "last_slot"):
        assert getattr(batch, name).dtype == getattr(full, name).dtype == torch.int64, name
    bags, other = batch.bags, full.bags
    assert bags.lengths().shape == other.lengths().shape
    assert (bags.values().dtype, bags.lengths().dtype) == (other.values().dtype, other.lengths().dtype)


@given(st.integers(1, 300), st.integers(1, 20_000), st.none() | st.integers(1, 9), st.data())
def test_bags_lie_where_they_are_looked_for_and_few_are_empty(users, items, item_keys, data):
    capacity = Capacity.of(users, items, item_keys)
    assert capacity.item_keys == item_keys or item_keys is None and 1 <= capacity.item_keys <= MOST_ITEM_KEYS
    if item_keys is None:
        room = capacity.stride * (1 + capacity.item_keys)
        assert room < users + items + capacity.stride + max(users, items // MOST_ITEM_KEYS)
    user_ids, item_ids = (
        np.random.default_rng(0).integers(0, 2**60, data.draw(st.integers(0, room))) for room in (users, items)
    )
    bags = bags_of(user_ids, item_ids, capacity)
    in_users, in_items = ids_by_bag(bags)
    assert len(in_users) >= users and len(in_items) >= items
    assert in_users[: user_ids.size] == user_ids.tolist() and set(in_users[user_ids.size :]) <= {None}
    assert in_items[: item_ids.size] == item_ids.tolist() and set(in_items[item_ids.size :]) <= {None}
    plain = KeyedJaggedTensor(keys=bags.keys(), values=bags.values(), lengths=bags.lengths())
    assert (bags.stride(), bags.length_per_key()) == (plain.stride(), plain.length_per_key())
    assert bags.offset_per_key() == plain.offset_per_key()


@pytest.mark.parametrize(
    ("capacity", "what"), [(Capacity(1, 9), "2 distinct user"), (Capacity(9, 3), "4 distinct item")]
)
def test_more_distinct_ids_than_the_capacity_is_an_error_that_says_so(capacity, what):
    histories = Histories(users=np.array([0, 1]), items=np.array([1, 2, 3, 4]), offsets=np.array([0, 2, 4]))
    with pytest.raises(ValueError, match=f"{what} ids in a batch with room for [13]"):
        make_batch(histories, row_length=ROW, capacity=capacity, predict=True)


@pytest.mark.parametrize(
    ("pad", "what"),
    [
        (FixedShape(tokens=3, sequences=9, candidates=ITEMS), "4 tokens do not fit a row of 3"),
        (FixedShape(tokens=9, sequences=1, candidates=ITEMS), "3 values do not fit a tensor that is padded to 2"),
        (FixedShape(tokens=9, sequences=9, candidates=3), "4 values do not fit a tensor that is padded to 3"),
    ],
    ids=["tokens", "sequences", "candidates"],
)
def test_more_than_a_fixed_shape_holds_is_an_error(pad, what):
    histories = Histories(users=np.array([0, 1]), items=np.array([1, 2, 3, 4, 5, 6]), offsets=np.array([0, 3, 6]))
    candidates = Candidates(np.arange(4), np.zeros(4, np.float32))
    packing: dict = {"row_length": ROW, "predict": True, "layout": "row", "draw": lambda targets: candidates}
    make_batch(histories, capacity=Capacity(9, 9), pad=FixedShape(4, 2, 4), **packing)
    with pytest.raises(ValueError, match=what):
        make_batch(histories, capacity=Capacity(9, 9), pad=pad, **packing)


def test_a_row_takes_no_sequence_that_is_longer_than_it_may_be():
    histories = Histories(users=np.array([0]), items=np.arange(ROW + 1), offsets=np.array([0, ROW + 1]))
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        make_batch(histories, row_length=ROW, capacity=Capacity(9, 9), predict=False, layout="row")


def test_moving_a_batch_keeps_every_field():
    batch, _, _ = build_batch_and_candidates(
        Histories(users=np.array([1]), items=np.array([2, 3]), offsets=np.array([0, 2])), True, "sampled"
    )
    moved = batch.to(torch.device("cpu"))
    assert moved.histories is batch.histories and moved.cursor == batch.cursor
    assert torch.equal(moved.item_bag, batch.item_bag)
    assert torch.equal(moved.bags.values(), batch.bags.values())


def test_answers_that_are_not_the_target_become_its_soft_targets():
    """By hand: the share is spread by the softmax of the scores, the target itself and missing answers left out."""
    histories = Histories(
        users=np.array([0, 1]),
        items=np.array([1, 2, 9, 3, 4, 5]),
        offsets=np.array([0, 4, 6]),
        segments=np.array([0, 0, 1, 0, 0, 0], dtype=np.int8),
        answers=np.array([[7, 8], [9, 3], [-1, -1], [6, 6], [5, -1], [0, 0]]),
        answer_scores=np.array([[1.0, 1.0], [2.0, 1.0], [0, 0], [0, 0], [3.0, 0], [0, 0]], dtype=np.float32),
    )
    batch = make_batch(
        histories,
        row_length=ROW,
        capacity=Capacity(users=8, items=ITEMS),
        predict=True,
        predict_from="interacted",
        soft_shares=SoftShares(0.4),
    )
    items = items_of(batch)
    assert items[batch.target_bag].tolist() == [2, 3, 5]
    # Item 3 answered after 2 is the target, and so is 5 after 4: nothing is left to share with.
    assert items[batch.soft_bag].tolist() == [[7, 8], [9, 3], [5, 5]]
    expected = torch.tensor([[0.2, 0.2], [0.4, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(batch.soft_weight, expected)


def test_the_weight_of_an_answer_that_is_never_a_negative_goes_back_to_the_target():
    """Nothing would push its score down: its vector has no gradient, and the target the whole of its own."""
    histories = Histories(
        users=np.array([0]),
        items=np.array([1, 2, 3]),
        offsets=np.array([0, 3]),
        answers=np.array([[7, 8], [8, -1], [-1, -1]]),
        answer_scores=np.array([[0.0, np.log(3)], [2.0, 1.0], [0, 0]], dtype=np.float32),
    )
    batch = make_batch(
        histories,
        row_length=ROW,
        capacity=Capacity(users=8, items=ITEMS),
        predict=True,
        soft_shares=SoftShares(0.4),
        negatives=np.arange(ITEMS) != 8,
    )
    items = items_of(batch)
    assert items[batch.soft_bag].tolist() == [[7, 2], [3, 3]] and 8 not in items
    torch.testing.assert_close(batch.soft_weight, torch.tensor([[0.1, 0.0], [0.0, 0.0]]))


def test_without_a_share_there_are_no_soft_targets():
    histories = Histories(users=np.array([0]), items=np.array([1, 2]), offsets=np.array([0, 2]))
    batch, *_ = build_batch_and_candidates(histories, True, "all")
    assert batch.soft_weight.shape == (1, 0) and batch.soft_bag.shape == (1, 0)
