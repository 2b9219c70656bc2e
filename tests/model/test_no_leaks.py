"""What predicts a target depends on nothing after its request but the time and the event type that are asked for, and
is in training what it is at inference, with all inputs at once."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.histories import Histories, join
from recgpt_torchrec.data.inputs.places import PLACE_VALUES
from recgpt_torchrec.data.inputs.spec import TIMES, Feature, Inputs
from recgpt_torchrec.data.inputs.times import VALUES
from recgpt_torchrec.data.packed import Capacity, pack_histories
from recgpt_torchrec.data.reading.feedback import extend_by_feedback, find_known
from recgpt_torchrec.data.segments import DISLIKED, EXPOSED, INTERACTED, SEGMENTS, Interacted
from recgpt_torchrec.model.dense import Dense

ITEMS, USERS, DIM, LONGEST = 30, 4, 8, 12
INPUTS = Inputs(
    features=[
        *(Feature(name=name, values=VALUES[name]) for name in TIMES),
        *(Feature(name=name, values=4) for name in ("event", "asked_event")),
        Feature(name="place", values=PLACE_VALUES),
    ],
    events=["view", "cart", "buy"],
    segments=SEGMENTS,
    feedback=True,
)


def make_dense() -> tuple[Dense, torch.Tensor, torch.Tensor]:
    """The dense part with parameters that are all drawn, none 0, and vectors of users and items."""
    torch.manual_seed(0)
    config = Model(dim=DIM, heads=2, layers=2, max_len=LONGEST, dropout=0, attention_dropout=0, user_dropout=0)
    dense = Dense(config, Loss(), segments=True, inputs=INPUTS).train()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return dense, torch.randn(USERS, DIM), torch.randn(ITEMS, DIM)


DENSE, USER_VECTORS, ITEM_VECTORS = make_dense()


def draw(rng: np.random.Generator, user: int) -> Histories:
    """The history of a user: some feedback, some of it of the same request as the interaction after it."""
    length = int(rng.integers(2, LONGEST + 1))
    segments = rng.choice(np.array([INTERACTED, EXPOSED, DISLIKED], np.int8), length, p=[0.5, 0.3, 0.2])
    segments[-1] = INTERACTED
    offsets, times = np.array([0, length]), 10**9 + rng.choice([0, 3, 4000, 90_000], length).cumsum()
    return Histories(
        users=np.array([user]),
        items=rng.integers(0, ITEMS, length),
        offsets=offsets,
        segments=segments,
        times=times,
        events=rng.integers(0, 4, length).astype(np.int16),
        places=rng.integers(0, 40, length).astype(np.int16),
        known=find_known(segments, times, Interacted.among(offsets, segments), offsets),
    )


def run(histories: Histories, *, training: bool) -> torch.Tensor:
    """[targets, dim] outputs that predict the targets, or, not in training, those at the newest entries."""
    batch, ids = pack_histories(
        histories,
        row_length=LONGEST,
        capacity=Capacity(USERS, ITEMS),
        predict=training,
        predict_from="last",
        inputs=INPUTS,
    )
    h, vectors = DENSE.train(training).decode(
        USER_VECTORS[ids.users],
        ITEM_VECTORS[ids.items],
        batch.item_bag,
        batch.user_bag,
        batch.position,
        batch.segment,
        batch.sequence,
        batch.target_slot,
        batch.last_slot,
        None,
        batch.max_seqlen,
        batch.features,
    )
    return (h if training else vectors).detach()


def targets_of(histories: Histories) -> list[int]:
    """The entries that are targets, in the order of the outputs: where an entry was known at their request."""
    found = []
    assert histories.segments is not None and histories.known is not None
    for start, stop in zip(histories.offsets[:-1], histories.offsets[1:], strict=True):
        previous = start
        for entry in range(start, stop):
            if histories.segments[entry] == INTERACTED:
                if histories.known[previous:entry].any():
                    found.append(entry)
                previous = entry
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_an_output_does_not_depend_on_its_target_or_on_anything_after(seed):
    rng = np.random.default_rng(seed)
    histories = join([draw(rng, user) for user in range(3)])
    before = run(histories, training=True)
    targets = targets_of(histories)
    assert len(targets) == len(before)
    if not targets:
        return
    number = int(rng.integers(len(targets)))
    entry = targets[number]
    stop = int(histories.offsets[np.searchsorted(histories.offsets, entry, side="right")])
    assert histories.segments is not None and histories.times is not None and histories.known is not None
    assert histories.events is not None and histories.places is not None
    items, events, places = histories.items.copy(), histories.events.copy(), histories.places.copy()
    times = histories.times.copy()
    earlier = np.flatnonzero((histories.segments == INTERACTED)[:entry])
    beside = np.flatnonzero(histories.times[:entry] == histories.times[entry])  # shown together with the target
    after = np.arange(entry, stop)
    changed = np.concatenate([after, beside[beside > earlier.max(initial=-1)]])
    items[changed] = rng.integers(0, ITEMS, changed.size)
    places[changed] = rng.integers(0, 40, changed.size)
    events[after[1:]] = rng.integers(0, 4, after.size - 1)
    times[after[1:]] += 10**6
    other = replace(histories, items=items, events=events, places=places, times=times)
    ours = run(other, training=True)
    torch.testing.assert_close(ours[number], before[number])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_a_request_is_answered_in_training_as_at_inference(seed):
    rng = np.random.default_rng(seed)
    histories = join([draw(rng, user) for user in range(3)])
    h = run(histories, training=True)
    assert histories.segments is not None and histories.times is not None and histories.known is not None
    assert histories.events is not None and histories.places is not None
    interacted = np.flatnonzero(histories.segments == INTERACTED)
    for number, entry in enumerate(targets_of(histories)):
        sequence = int(np.searchsorted(histories.offsets, entry, side="right")) - 1
        start, stop = histories.offsets[sequence], histories.offsets[sequence + 1]
        earlier = interacted[(interacted < entry) & (interacted >= start)]
        last = np.array([earlier[-1] + 1 if earlier.size else start])
        end = int(extend_by_feedback(last, np.array([stop]), histories.segments, histories.known)[0])
        rows = slice(start, end)
        prefix = Histories(
            users=histories.users[[sequence]],
            items=histories.items[rows],
            offsets=np.array([0, end - start]),
            segments=histories.segments[rows],
            times=histories.times[rows],
            events=histories.events[rows],
            places=histories.places[rows],
            request_times=histories.times[[entry]],
            asked_events=histories.events[[entry]],
        )
        vectors = run(prefix, training=False)
        torch.testing.assert_close(vectors[0], h[number], rtol=1e-4, atol=1e-4)
