"""Streams with small defaults, and the content of their batches as Python lists."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from recgpt_torchrec.config import Batch, Loss, Stream
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.candidates import ALONE, Place, candidate_source
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.neighbours.answering import NeighbourAnswers
from recgpt_torchrec.data.packed import Layout
from recgpt_torchrec.data.reading.draws import CUTTING, draw_for_users
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.stream import BatchMaker, SequenceStream
from recgpt_torchrec.data.windows import Position, Queue
from tests.support import items_of, training_part

MAX_LEN = 6


def stream_of(
    dataset: Dataset,
    *,
    split: SplitName = "training",
    tokens: int = 40,
    users: int = 0,
    window_groups: int = 2,
    workers: int = 0,
    max_len: int = MAX_LEN,
    loss: Loss | None = None,
    seed: int = 0,
    predict_from: Any = "every",
    soft_targets: float = 0.0,
    layout: Layout = "grid",
    pad: bool = False,
    place: Place = ALONE,
    thinning: tuple[float, float] = (0.0, 0.0),
    neighbours: NeighbourAnswers | None = None,
    **reads: Any,
) -> SequenceStream:
    """Make a training stream; `reads` are further arguments of the `HistoryReader`."""
    batch = Batch(tokens=tokens)
    source = None
    if split == "training":
        source = candidate_source(loss or Loss(candidates="all"), dataset, batch, *place)
    maker = BatchMaker(
        reader=HistoryReader(dataset=dataset, split=split, max_len=max_len, **reads),
        batch=batch,
        users=users,
        source=source,
        seed=seed,
        predict_from=predict_from,
        soft_targets=soft_targets,
        layout=layout,
        pad=pad,
        thinning=thinning,
        neighbours=neighbours,
    )
    return SequenceStream(maker, Stream(window_groups=window_groups, workers=workers))


def pairs(batch: SequenceBatch) -> Iterator[tuple]:
    """(user, history up to and including the input, target) of every target."""
    bag_item = dict(enumerate(items_of(batch).tolist()))
    sequence, position = batch.sequence.flatten().tolist(), batch.position.flatten().tolist()
    item_bag = batch.item_bag.flatten().tolist()
    count = batch.targets  # the others are padding
    for slot, target in zip(batch.target_slot[:count].tolist(), batch.target_bag[:count].tolist(), strict=True):
        history = tuple(bag_item[item_bag[s]] for s in range(slot - position[slot], slot + 1))
        yield int(batch.histories.users[sequence[slot]]), history, bag_item[target]


def read_until_stopped(stream: SequenceStream, position: Position, stops: list[int], found: Counter) -> list[Queue]:
    """Read each rank's share of epoch 1 up to its stop, and add the pairs to `found`.

    Args:
        stops: number of batches that each rank reads, by rank.

    Returns:
        The queues that are left.
    """
    left = []
    for rank, stop in enumerate(stops):
        share = stream.batches(1, position, rank, len(stops))
        for count, batch in enumerate(share):
            if count == stop:
                break
            found.update(pairs(batch))
            share.done(batch.cursor)
        left += share.left
    return left


def expected_pairs(
    histories: list[list[int]], long_histories: str, max_len: int, seed: int = 0, epoch: int | None = 0
) -> Counter:
    """The pairs by a plain loop: each next item of the training part, after the history in its piece.

    Without an epoch the newest piece is full, as where only new targets are predicted.
    """
    users = np.arange(len(histories))
    shares = np.zeros(users.size) if epoch is None else draw_for_users(users, CUTTING, seed, epoch)
    wanted: Counter = Counter()
    for user, history in enumerate(histories):
        items = list(training_part(history))
        if long_histories == "newest":
            items = items[-(max_len + 1) :]
        stop, targets = len(items), max_len  # pieces of max_len targets, the newest of several shorter
        if stop - 1 > max_len:
            targets -= int(shares[user] * max_len)
        while stop > 1:
            start = max(stop - targets - 1, 0)
            targets = max_len
            for target in range(start + 1, stop):
                wanted[user, tuple(items[start:target]), items[target]] += 1
            stop = start + 1
    return wanted
