"""Event types in reading and packing, against plain loops: what is history, what is a target, what is asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Events, TargetEvents
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.events import add_events, check_events, request_for, weights_of_targets
from recgpt_torchrec.data.inputs.features import compute_features
from recgpt_torchrec.data.inputs.hiding import draw_hidden
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.packed import Capacity, pack_histories
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.folders import write_manifest
from tests.data.stream_helpers import stream_of
from tests.support import training_part, walks, write_dataset

WORDS = ["view", "cart", "buy"]
INPUTS = Inputs(features=[Feature(name="event", values=4), Feature(name="asked_event", values=4)], events=WORDS)


def with_events(folder: Path, histories: list[list[int]], events: list[list[int]], **more: Any) -> Dataset:
    """A dataset whose events have these types."""
    columns = {"event_ids": pa.array(events, pa.list_(pa.int16()))}
    written = write_dataset(folder, histories, more=columns, **more)
    write_manifest(pa.fs.LocalFileSystem(), str(folder), replace(written.manifest, events=WORDS).to_json())
    return Dataset.open(str(folder))


def draw_events(histories: list[list[int]], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 4, len(history)).tolist() for history in histories]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, list[list[int]], list[list[int]]]:
    """A dataset, its histories and its events."""
    histories = walks(60, 40, seed=2)
    events = draw_events(histories)
    return with_events(tmp_path_factory.mktemp("events") / "data", histories, events), histories, events


@pytest.mark.parametrize("kept", [["view"], ["cart", "buy"], []])
@pytest.mark.parametrize("split", ["validation", "test", "all"])
def test_histories_hold_the_types_that_are_history_and_what_was_seen_is_of_all_types(logged, kept, split):
    dataset, histories, events = logged
    inputs = replace(INPUTS, history_events=kept)
    read: Any = HistoryReader(dataset=dataset, split=split, max_len=4, inputs=inputs).read(row_groups(dataset))
    ids = [WORDS.index(word) + 1 for word in kept] or [0, 1, 2, 3]
    wanted = {}
    for user, (items, types) in enumerate(zip(histories, events, strict=True)):
        stop = {"all": len(items), "test": len(items) - 1, "validation": len(items) - 2}[split]
        entries = [(item, kind) for item, kind in zip(items[:stop], types, strict=False) if kind in ids]
        if entries and (split == "all" or len(items) >= 3):
            wanted[user] = (entries[-4:], items[:stop], None if split == "all" else items[stop])
    assert read.users.tolist() == list(wanted)
    for number, (entries, seen, held_out) in enumerate(wanted.values()):
        one: Any = read.part(number, number + 1)
        assert list(zip(one.items.tolist(), one.events.tolist(), strict=True)) == entries
        assert one.seen.values.tolist() == seen
        assert held_out is None or one.held_out.tolist() == [held_out]


def test_only_users_whose_held_out_item_is_of_the_type_are_ranked_and_the_type_is_asked_for(logged):
    dataset, histories, events = logged
    request = request_for(dataset, INPUTS, "--event", "buy")
    assert request == Request(event=3, held_out_event=3)
    read = HistoryReader(dataset=dataset, split="test", max_len=9, inputs=INPUTS, request=request)
    found: Any = read.read(row_groups(dataset))
    users = [user for user, types in enumerate(events) if len(types) >= 3 and types[-1] == 3]
    assert found.users.tolist() == users and len(users) > 3
    assert found.held_out.tolist() == [histories[user][-1] for user in users]
    assert found.asked_events.tolist() == [3] * len(users)
    assert request_for(dataset, INPUTS, "--event", "buy", ask=False) == Request(held_out_event=3)
    assert request_for(dataset, Inputs(), "--event", "buy") == Request(held_out_event=3), "a model that is not told"
    everyone: Any = HistoryReader(dataset=dataset, split="test", max_len=9, inputs=INPUTS).read(row_groups(dataset))
    assert set(everyone.asked_events.tolist()) == {0}, "the held-out item's own type is not known to a server"


def expected_targets(
    histories: list[list[int]], events: list[list[int]], weights: list[float], kept: list[int], max_len: int
) -> list[tuple[int, tuple[int, ...], int, float]]:
    """(user, history of the token, target, weight) of every target, by a plain loop."""
    wanted = []
    for user, (items, types) in enumerate(zip(histories, events, strict=True)):
        entries = [pair for pair in zip(training_part(items), types, strict=False) if pair[1] in kept]
        entries = entries[-(max_len + 1) :]
        for place in range(1, len(entries)):
            if weights[entries[place][1]] > 0:
                history = tuple(item for item, _ in entries[:place])
                wanted.append((user, history, entries[place][0], weights[entries[place][1]]))
    return sorted(wanted)


@pytest.mark.parametrize("kept, targets", [([], ["buy=5", "cart"]), (["view", "buy"], ["buy=0.5"]), ([], [])])
@pytest.mark.parametrize("layout, pad", [("grid", False), ("row", True)])
def test_batches_hold_the_targets_of_a_plain_loop_with_their_weights(logged, kept, targets, layout, pad):
    dataset, histories, events = logged
    inputs = add_events(Inputs(), Events(history=kept, targets=targets), dataset)
    weights = weights_of_targets(TargetEvents(targets=targets), dataset)
    stream = stream_of(dataset, max_len=5, inputs=inputs, event_weights=weights, layout=layout, pad=pad)
    found, total = [], 0.0
    for batch in stream.batches():
        weight = np.ones(batch.targets) if batch.target_weight is None else batch.target_weight.numpy()
        assert weight[batch.targets :].tolist() == [0.0] * (len(weight) - batch.targets)
        assert float(batch.global_targets) == pytest.approx(weight.sum())
        total += float(batch.global_targets)
        for (user, history, target), one in zip(targets_of(batch), weight, strict=False):
            found.append((user, history, target, pytest.approx(one)))
    by_word = dict(part.split("=") if "=" in part else (part, "1") for part in targets)
    of_ids = [0.0 if targets else 1.0, *(float(by_word.get(word, 0 if targets else 1)) for word in WORDS)]
    ids = [WORDS.index(word) + 1 for word in kept] or [0, 1, 2, 3]
    wanted = expected_targets(histories, events, of_ids, ids, 5)
    assert sorted(found, key=lambda each: each[:3]) == wanted and wanted
    assert total == pytest.approx(sum(each[3] for each in wanted))


def targets_of(batch: Any) -> list[tuple[int, tuple[int, ...], int]]:
    """(user, history of the token, target) by the batch's own slots and the ids of its bags."""
    histories, flat = batch.histories, batch.sequence.flatten().tolist()
    starts = {number: flat.index(number) for number in set(flat) - {-1}}
    found = []
    items = batch.target_item.tolist() if batch.target_item is not None else None
    for index, slot in enumerate(batch.target_slot[: batch.targets].tolist()):
        number = flat[slot]
        one = histories.part(number, number + 1)
        end = slot - starts[number] + 1
        assert items is None or one.items[end] == items[index]
        found.append((int(one.users[0]), tuple(one.items[:end].tolist()), int(one.items[end])))
    return found


ENTRY = st.tuples(st.integers(0, 9), st.integers(0, 3), st.sampled_from([0, 0, 0, 1, 2]))
HISTORIES = st.lists(st.lists(ENTRY, min_size=1, max_size=8), min_size=1, max_size=4)


def make_histories(drawn: list[list[tuple[int, int, int]]], segmented: bool) -> Histories:
    entries = [entry for history in drawn for entry in history]
    items, events, segments = (np.array([entry[k] for entry in entries], dtype=np.int64) for k in range(3))
    return Histories(
        users=np.arange(len(drawn)),
        items=items,
        offsets=np.concatenate([[0], np.cumsum([len(history) for history in drawn])]),
        segments=segments.astype(np.int8) if segmented else None,
        events=events.astype(np.int16),
        asked_events=np.arange(len(drawn), dtype=np.int16) % 4,
    )


@settings(deadline=None, max_examples=60)
@given(HISTORIES, st.booleans(), st.data())
def test_features_are_those_of_a_plain_loop_and_show_no_item(drawn, segmented, data):
    histories = make_histories(drawn, segmented)
    hidden = np.array(data.draw(st.lists(st.booleans(), min_size=histories.items.size, max_size=histories.items.size)))
    found: Any = compute_features(INPUTS, histories, np.arange(histories.items.size), hidden)
    wanted: list[tuple[int, int]] = []
    for number, history in enumerate(drawn):
        for place, (_, event, _) in enumerate(history):
            after = [kind for _, kind, segment in history[place + 1 :] if segment == 0 or not segmented]
            asked = after[0] if after else number % 4
            wanted.append((event, 0 if hidden[len(wanted)] else asked))
    assert found.T.tolist() == [list(pair) for pair in wanted]
    # What the items are makes no difference, neither that of the target nor any other.
    other = replace(histories, items=(histories.items + 1 + data.draw(st.integers(0, 5))) % 10)
    changed: Any = compute_features(INPUTS, other, np.arange(other.items.size), hidden)
    assert np.array_equal(changed, found)


@settings(deadline=None, max_examples=30)
@given(HISTORIES, st.booleans())
def test_the_item_of_a_target_changes_nothing_that_its_token_reads(drawn, segmented):
    """Neither its features nor any other column of the slots up to its own."""
    histories = make_histories(drawn, segmented)
    if histories.items.size < 2:
        return

    def pack(changed: Histories) -> Any:
        options: dict[str, Any] = {"row_length": 8, "capacity": Capacity(9, 99), "predict": True, "inputs": INPUTS}
        return pack_histories(changed, **options)

    packed, ids = pack(histories)
    for index, slot in enumerate(packed.target_slot.tolist()):
        target = int(ids.items[packed.target_bag[index]])
        number = int(packed.sequence.flatten()[slot])
        last = int(histories.offsets[number + 1]) - 1
        if histories.items[last] != target:
            continue
        items = histories.items.copy()
        items[last] = (target + 5) % 10  # the newest entry is a target and no token
        other, other_ids = pack(replace(histories, items=items))
        assert np.array_equal(packed.features, other.features)
        before, after = (
            numbers.items[batch.item_bag.flatten()[batch.sequence.flatten() == number]]
            for batch, numbers in ((packed, ids), (other, other_ids))
        )
        assert np.array_equal(before, after)


def test_the_type_is_hidden_by_seed_epoch_user_and_place_alone():
    histories = make_histories([[(1, 1, 0)] * 50, [(2, 2, 0)] * 70], segmented=False)
    drawn = draw_hidden(histories, 0.3, 5, 1)
    reordered = draw_hidden(histories.reorder(np.array([1, 0])), 0.3, 5, 1)
    assert np.array_equal(drawn, np.concatenate([reordered[70:], reordered[:70]]))
    assert not np.array_equal(drawn[:50], drawn[50:100])
    assert not np.array_equal(drawn, draw_hidden(histories, 0.3, 5, 2))
    assert not np.array_equal(drawn, draw_hidden(histories, 0.3, 6, 1))
    assert draw_hidden(histories, 1.0, 5, 1).all() and not draw_hidden(histories, 0.0, 5, 1).any()
    many = replace(
        histories,
        users=np.array([2**40, 2**40 + 1]),
        items=np.zeros(60_000, np.int64),
        offsets=np.array([0, 3, 60_000]),
    )
    assert draw_hidden(many, 0.3, 5, 1).mean() == pytest.approx(0.3, abs=0.01)


def test_a_batch_hides_types_in_training_and_never_in_encoding(logged):
    dataset, _, _ = logged
    inputs = replace(INPUTS, ask_dropout=0.5)
    hidden = told = 0
    batches: list[Any] = list(stream_of(dataset, inputs=inputs).batches())
    for batch in batches:
        asked, is_token = batch.features[1], batch.sequence >= 0
        features: Any = compute_features(INPUTS, batch.histories, np.arange(batch.histories.items.size))
        following = features[1]
        assert int((asked > 0).sum()) <= int((following > 0).sum())
        hidden, told = hidden + int(((asked == 0) & is_token).sum()), told + int((asked > 0).sum())
    assert 0.3 < hidden / (hidden + told) < 0.8
    again: list[Any] = list(stream_of(dataset, inputs=inputs).batches())
    assert all(torch.equal(a.features, b.features) for a, b in zip(again, batches, strict=True))
    every = stream_of(dataset, split="test", inputs=replace(INPUTS, ask_dropout=1.0), request=Request(event=2))
    batches = list(every.batches())
    for batch in batches:
        assert set(batch.features[1].flatten()[batch.last_slot].tolist()) == {2}


@pytest.mark.parametrize("bad", [4, -1])
def test_event_ids_outside_the_vocabulary_are_damage(tmp_path, bad):
    dataset = with_events(tmp_path / "data", [[1, 2, 3, 4]] * 3, [[1, 2, 3, 0], [1, bad, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(InputError, match=rf"row 1: event id {bad} is none of 0 \(unknown\) to 3"):
        HistoryReader(dataset=dataset, split="training", max_len=5, inputs=INPUTS).read(row_groups(dataset))


def test_a_dataset_that_promises_types_must_have_their_column(tmp_path):
    written = write_dataset(tmp_path / "data", [[1, 2, 3, 4]] * 3)
    manifest = replace(written.manifest, events=WORDS)
    write_manifest(pa.fs.LocalFileSystem(), str(tmp_path / "data"), manifest.to_json())
    with pytest.raises(InputError, match="event_ids"):
        row_groups(Dataset.open(str(tmp_path / "data")))


def test_a_type_that_came_after_the_training_is_unknown_to_the_model(tmp_path):
    dataset = with_events(tmp_path / "data", [[1, 2, 3, 4]] * 3, [[1, 2, 3, 0]] * 3)
    inputs = replace(INPUTS, events=WORDS[:2], features=[Feature(name="event", values=3)])
    check_events(inputs, "run", dataset)
    read: Any = HistoryReader(dataset=dataset, split="all", max_len=5, inputs=inputs).read(row_groups(dataset))
    assert read.events.tolist() == [1, 2, 0, 0] * 3


@pytest.mark.parametrize("words", [[], ["cart", "view"], ["view", "fav", "buy"]])
def test_a_checkpoint_needs_the_types_that_it_was_trained_with(words):
    dataset = Dataset(path="data", manifest=Manifest(events=words))
    with pytest.raises(InputError, match=r"the checkpoint run reads the event types view, cart, buy, and data has"):
        check_events(INPUTS, "run", dataset)
    check_events(Inputs(), "run", dataset)


@pytest.mark.parametrize(
    "choice, message",
    [
        (Events(input=True), "--events.input true: data has no event types; prepare the log with --event_column"),
        (Events(history=["buy"]), "--events.history buy: data has no event types"),
        (Events(ask=True), "--events.ask true: data has no event types"),
    ],
)
def test_types_that_a_dataset_lacks_are_refused(choice, message):
    with pytest.raises(InputError, match=message):
        add_events(Inputs(), choice, Dataset(path="data", manifest=Manifest()))
    with pytest.raises(InputError, match=r"--events.history by: data has no such event type; it has view, cart, buy"):
        add_events(Inputs(), Events(history=["by"]), Dataset(path="data", manifest=Manifest(events=WORDS)))
    with pytest.raises(InputError, match=r"--events.targets by: data has no such event type"):
        weights_of_targets(TargetEvents(targets=["by=2"]), Dataset(path="data", manifest=Manifest(events=WORDS)))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"targets": ["buy=x"]}, "--events.targets buy=x: 'x' is no weight"),
        ({"targets": ["buy=0"]}, "--events.targets buy: its weight is 0.0; it must be from 0.001 to 1000"),
        ({"targets": ["buy=nan"]}, "its weight is nan"),
        ({"targets": ["buy,buy=2"]}, "--events.targets names 'buy' twice"),
        ({"targets": ["buy"], "history": ["view"]}, "--events.targets buy is not among --events.history view"),
        ({"ask_dropout": 1.5}, "--events.ask_dropout is 1.5; it must be from 0 to 1"),
    ],
)
def test_options_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Events(**given)


def test_a_dataset_without_types_reads_none():
    dataset = Dataset(path="data", manifest=Manifest())
    assert add_events(Inputs(), Events(), dataset) == Inputs() and weights_of_targets(Events(), dataset) is None
