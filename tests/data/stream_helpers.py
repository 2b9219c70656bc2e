"""Streams with small defaults, and what their batches hold, as Python lists."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from recgpt_torchrec.config import Batch, Loss, Stream
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream, training_counts
from recgpt_torchrec.data.windows import Queue
from tests.support import training_part

MAX_LEN = 6


def stream_of(
    dataset: Dataset,
    *,
    split: str = "training",
    tokens: int = 40,
    window_groups: int = 2,
    workers: int = 0,
    max_len: int = MAX_LEN,
    long_histories: Any = "newest",
    loss: Loss | None = None,
    seed: int = 0,
    **more: Any,
) -> SequenceStream:
    maker = BatchMaker(
        dataset=dataset,
        split=split,
        batch=Batch(tokens=tokens, long_histories=long_histories),
        loss=loss or Loss(candidates="all"),
        max_len=max_len,
        seed=seed,
        item_counts=training_counts(dataset),
        **more,
    )
    return SequenceStream(maker, Stream(window_groups=window_groups, workers=workers))


def pairs(batch: SequenceBatch) -> Iterator[tuple]:
    """(user, history up to and including the input, target) of every position that is predicted."""
    bag_item = dict(enumerate(batch.items.values().tolist()))
    sequence, position = batch.sequence.flatten().tolist(), batch.position.flatten().tolist()
    item_bag = batch.item_bag.flatten().tolist()
    for slot, target in zip(batch.target_slot.tolist(), batch.target_bag.tolist(), strict=True):
        history = tuple(bag_item[item_bag[s]] for s in range(slot - position[slot], slot + 1))
        yield int(batch.sequences.users[sequence[slot]]), history, bag_item[target]


def stopped(stream: SequenceStream, queues: list[Queue], stops: list[int], found: Counter) -> list[Queue]:
    """Go through each queue of epoch 1, stop after so many batches, and add their pairs to `found`; what is left."""
    left = list(queues)
    for number, (queue, stop) in enumerate(zip(queues, stops, strict=True)):
        for made, batch in enumerate(stream.epoch(1, [queue])):
            if made == stop:
                break
            found.update(pairs(batch))
            left[number] = queue.after(batch.cursor)
    return left


def expected_pairs(histories: list[list[int]], long_histories: str, max_len: int) -> Counter:
    """The same by a plain loop: each next item of the training part, after the history that its piece holds."""
    wanted: Counter = Counter()
    for user, history in enumerate(histories):
        items = list(training_part(history))
        if long_histories == "newest":
            items = items[-(max_len + 1) :]
        stop = len(items)  # pieces of max_len targets, the newest piece full
        while stop > 1:
            start = max(stop - max_len - 1, 0)
            for target in range(start + 1, stop):
                wanted[user, tuple(items[start:target]), items[target]] += 1
            stop = start + 1
    return wanted
