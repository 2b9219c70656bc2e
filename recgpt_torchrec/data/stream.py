"""Parquet row groups -> shuffled windows -> packed batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import Batch, Loss, Stream
from recgpt_torchrec.data import split as leave_one_out
from recgpt_torchrec.data.batch import (
    Candidates,
    Capacity,
    PredictFrom,
    SequenceBatch,
    Sequences,
    make_batch,
    no_sequences,
)
from recgpt_torchrec.data.candidates import LogUniform, NegativeSampler, Uniform
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.loading import made_ahead
from recgpt_torchrec.data.reader import Reader, SetAside
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.data.windows import Cursor, Queue, Window, row_groups, windows_of
from recgpt_torchrec.errors import InputError

EVALUATION = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes the batches of one purpose: training on the training part, or encoding histories for a split."""

    dataset: Dataset
    prompts: bool = False
    """Whether entries that were not interacted with (generated, or shown but not clicked) are read; else left out."""
    predict_from: PredictFrom = "every"
    """Which entries of an interval with prompts predict the next interacted item (see `make_batch`)."""
    soft_targets: float = 0.0
    """Share of a target's weight that goes to the pre-trained model's answers in the dataset (see `make_batch`)."""
    answers: int = 0
    """Answers the dataset holds for each interacted item."""
    grows: int = 0
    """Most entries that are appended to a history after it was read (see `retrieval.recall`)."""
    split: str
    """`training`, `validation`, `test`, or `all`: the whole history, nothing held out (what export encodes)."""
    batch: Batch
    loss: Loss
    max_len: int
    seed: int
    item_counts: np.ndarray | None = None
    """[items] int64 training interactions of each item, for popularity-based sampling and in-batch correction."""
    set_aside: SetAside | None = None
    """Where damaged rows go; None: the first one is an error."""
    time_order: bool = False
    """Whether a history whose times are not in order is damaged."""
    new_targets: bool = False
    """Whether only what the dataset's column `trained` does not mark is predicted in training, from the whole history
    before it; histories without such targets are left out."""

    def __post_init__(self) -> None:
        if self.batch.tokens < self.max_len:
            raise InputError(
                f"--batch.tokens {self.batch.tokens} is less than --model.max_len {self.max_len}: a batch must hold "
                "the longest history; give more tokens, or a smaller max_len"
            )

    @property
    def training(self) -> bool:
        """Whether batches hold targets to learn from."""
        return self.split == "training"

    @property
    def row_length(self) -> int:
        """Slots of a grid row: the longest sequence, but not under 64 so that short ones pack tightly."""
        return max(64, self.max_len)

    @property
    def max_sequences(self) -> int:
        """Most sequences a batch holds."""
        return max(1, self.batch.tokens // 4)

    @property
    def capacity(self) -> Capacity:
        """Bags of the two tables in every batch."""
        items = self.dataset.manifest.items
        if not self.training:
            return Capacity(self.max_sequences, min(items, self.batch.tokens + self.grows * self.max_sequences))
        if self.loss.candidates == "all":
            return Capacity(self.max_sequences, items)
        negatives = 0 if self.loss.candidates == "in_batch" else self.loss.negatives
        most = self.batch.tokens * (1 + self.answers) + self.max_sequences + negatives
        return Capacity(self.max_sequences, min(items, most))

    def sampler(self) -> NegativeSampler | None:
        """Draws the negatives of a batch; None where the loss needs none drawn."""
        if not self.training or self.loss.candidates in ("all", "in_batch"):
            return None
        if self.loss.negatives_by == "uniform":
            return Uniform(self.dataset.manifest.items, self.loss.negatives)
        assert self.item_counts is not None
        return LogUniform(self.item_counts, self.loss.negatives)

    def make(self, sequences: Sequences, cursor: Cursor, sampler: NegativeSampler | None, epoch: int) -> SequenceBatch:
        """Pack sequences, with this purpose's candidates."""
        candidates = None
        if sampler is not None:
            rng = np.random.default_rng((self.seed, epoch, cursor.worker, cursor.batches, 3))
            candidates = Candidates(*sampler.draw(rng))
        in_batch = None
        if self.training and self.loss.candidates == "in_batch":
            assert self.item_counts is not None
            in_batch = in_batch_log_q(self.item_counts, self.batch.tokens)
        return make_batch(
            sequences,
            row_length=self.row_length,
            capacity=self.capacity,
            predict=self.training,
            predict_from=self.predict_from,
            max_position=self.max_len - 1,
            soft_targets=self.soft_targets,
            candidates=candidates,
            all_items=self.dataset.manifest.items if self.training and self.loss.candidates == "all" else 0,
            in_batch_log_q=in_batch,
            cursor=cursor,
        )

    def empty(self) -> SequenceBatch:
        """A batch without sequences, for a rank that has run out."""
        return self.make(no_sequences(), Cursor(), self.sampler(), 0)

    def sequences_of(self, window: Window, epoch: int, shuffle: bool) -> Sequences:
        """Read a window, cut its histories for the split and to `max_len`, and shuffle them."""
        reader = Reader(self.dataset, self.answers, self.time_order, self.set_aside, self.new_targets)
        there = [reader.read(group) for group in window.groups]
        table, read = pa.concat_tables([r.table for r in there]), np.concatenate([r.lengths for r in there])
        users = table["user_id"].to_numpy()
        values, offsets = leave_one_out.item_lists(table["item_ids"])
        segments = (
            leave_one_out.item_lists(table["segment_ids"]).values if "segment_ids" in table.schema.names else None
        )
        kept: slice | np.ndarray = slice(None)
        if segments is not None and not self.prompts:
            kept = segments == INTERACTED
            offsets = np.concatenate([[0], np.cumsum(segments == INTERACTED)])[offsets]
            values, segments = values[kept], None
        real = leave_one_out.Interacted.among(offsets, segments)
        answers = self._answers_of(table, values.size, real)
        trained = None
        if self.new_targets:
            trained = (leave_one_out.lists_of(table["trained"])[0] != 0)[kept]
        held_out, keep = None, self.max_len
        if self.training:
            begin, end = leave_one_out.training(real.offsets)
            keep += 1
        elif self.split in EVALUATION:
            rows = leave_one_out.held_out(real.offsets, self.split)  # type: ignore[arg-type]
            users, begin, end, held_out = users[rows.row], rows.start, rows.stop, values[real.places[rows.target]]
            offsets = np.append(offsets[rows.row], 0)
        else:  # of a user who does not occur there is nothing to encode
            (some,) = np.nonzero(np.diff(real.offsets))
            users, begin, end = users[some], real.offsets[some], real.offsets[some + 1]
            offsets = np.append(offsets[some], 0)
        start = offsets[:-1]
        stop = np.where(end > begin, real.entries(np.maximum(end, 1)) if real.places.size else start, start)
        if self.training and self.batch.long_histories == "windows":
            owner, start, stop = overlapping(start, stop, self.max_len)
            users, read = users[owner], (read / np.bincount(owner, minlength=users.size))[owner]
        else:
            start = np.maximum(start, stop - keep)
        if trained is not None:
            new = ~trained if segments is None else ~trained & (segments == INTERACTED)
            count = np.concatenate([[0], np.cumsum(new)])
            stop = np.where(count[stop] > count[np.minimum(start + 1, stop)], stop, start)
        order = np.arange(users.size)
        if shuffle:
            order = np.random.default_rng((self.seed, epoch, window.index, 2)).permutation(users.size)
        start, stop = start[order], stop[order]
        cut = leave_one_out.take(values, start, stop)
        seen = None
        if not self.training:
            whole = leave_one_out.take(values[real.places], begin[order], end[order])
            seen = (whole.values, whole.offsets)
        return Sequences(
            users=users[order].astype(np.int64, copy=False),
            items=cut.values,
            offsets=cut.offsets,
            segments=None if segments is None else leave_one_out.take(segments, start, stop).values,
            answers=None if answers is None else leave_one_out.take(answers[0], start, stop).values,
            answer_scores=None if answers is None else leave_one_out.take(answers[1], start, stop).values,
            trained=None if trained is None else leave_one_out.take(trained, start, stop).values,
            read=read[order] if self.training else None,
            held_out=None if held_out is None else held_out[order],
            seen=seen,
        )

    def _answers_of(
        self, table: pa.Table, entries: int, real: leave_one_out.Interacted
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Answers and scores by entry; the dataset has them by interacted item."""
        if not self.answers:
            return None
        ids = np.full((entries, self.answers), -1, dtype=np.int64)
        scores = np.zeros((entries, self.answers), dtype=np.float32)
        ids[real.places] = leave_one_out.lists_of(table["answer_ids"])[0].reshape(-1, self.answers)
        scores[real.places] = leave_one_out.lists_of(table["answer_scores"])[0].reshape(-1, self.answers)
        return ids, scores

    def batches(
        self, windows: list[Window], todo: Queue, worker: int, epoch: int, shuffle: bool
    ) -> Iterator[SequenceBatch]:
        """The batches of one queue, in order: as many sequences as the budgets hold, never one out of turn."""
        sampler = self.sampler()
        pending: list[Sequences] = []
        tokens = count = 0
        made = todo.batches
        for done, (index, offset) in enumerate(todo.windows):
            sequences = self.sequences_of(windows[index], epoch, shuffle)
            lengths = sequences.lengths - 1 if self.training else sequences.lengths
            total = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])
            # Only training meets lost parts: thousands of rows without an entry, which need no steps of their own.
            counted = sequences.lengths > 0 if self.training else np.ones(sequences.users.size, dtype=bool)
            number = np.concatenate([[0], np.cumsum(counted)])
            size = sequences.users.size
            while offset < size:
                room, places = total[offset] + self.batch.tokens - tokens, number[offset] + self.max_sequences - count
                stop = min(
                    int(np.searchsorted(t, most, side="right")) - 1 for t, most in ((total, room), (number, places))
                )
                if stop > offset:
                    pending.append(part_of(sequences, offset, stop))
                    tokens += int(total[stop] - total[offset])
                    count += int(number[stop] - number[offset])
                    offset = stop
                if offset < size:
                    made += 1
                    yield self.make(joined(pending), Cursor(worker, done, offset, made), sampler, epoch)
                    pending, tokens, count = [], 0, 0
        if pending:
            yield self.make(joined(pending), Cursor(worker, len(todo.windows), 0, made + 1), sampler, epoch)


def in_batch_log_q(counts: np.ndarray, tokens: int) -> np.ndarray:
    """[items] float32: log of the chance that an item is among the targets of a batch of `tokens` positions."""
    p = np.maximum(counts, 0.5) / max(counts.sum(), 1)
    return np.log(-np.expm1(tokens * np.log1p(-np.minimum(p, 1 - 1e-9)))).astype(np.float32)


def overlapping(start: np.ndarray, stop: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut each range into pieces of `max_len` inputs and one target, from the newest back.

    Every target is in exactly one piece.

    Pieces overlap by the one entry that is a target in the earlier and the first input in the later.

    Returns:
        owner, start, stop: [pieces] which range a piece is of, and where it lies.
    """
    pieces = np.maximum(-(-(stop - start - 1) // max_len), 1)
    back = np.concatenate([np.arange(p) for p in pieces]) if pieces.size else np.zeros(0, dtype=np.int64)
    owner = np.repeat(np.arange(start.size), pieces)
    ends = stop[owner] - back * max_len
    return owner, np.maximum(start[owner], ends - max_len - 1), ends


def part_of(sequences: Sequences, start: int, stop: int) -> Sequences:
    """The sequences `start:stop`."""

    def cut(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values[offsets[start] : offsets[stop]], offsets[start : stop + 1] - offsets[start]

    items, offsets = cut(sequences.items, sequences.offsets)
    return Sequences(
        users=sequences.users[start:stop],
        items=items,
        offsets=offsets,
        segments=None if sequences.segments is None else cut(sequences.segments, sequences.offsets)[0],
        answers=None if sequences.answers is None else cut(sequences.answers, sequences.offsets)[0],
        answer_scores=None if sequences.answer_scores is None else cut(sequences.answer_scores, sequences.offsets)[0],
        trained=None if sequences.trained is None else cut(sequences.trained, sequences.offsets)[0],
        read=None if sequences.read is None else sequences.read[start:stop],
        held_out=None if sequences.held_out is None else sequences.held_out[start:stop],
        seen=None if sequences.seen is None else cut(*sequences.seen),
    )


def joined(parts: list[Sequences]) -> Sequences:
    """The sequences of several lists, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return no_sequences()

    def offsets_of(lengths: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths))])

    first = parts[0]
    seen = None
    if first.seen is not None:
        whole = [p.seen for p in parts if p.seen is not None]
        seen = (np.concatenate([v for v, _ in whole]), offsets_of([np.diff(o) for _, o in whole]))
    return Sequences(
        users=np.concatenate([p.users for p in parts]),
        items=np.concatenate([p.items for p in parts]),
        offsets=offsets_of([p.lengths for p in parts]),
        segments=None if first.segments is None else np.concatenate([p.segments for p in parts]),
        answers=None if first.answers is None else np.concatenate([p.answers for p in parts]),
        answer_scores=None if first.answer_scores is None else np.concatenate([p.answer_scores for p in parts]),
        trained=None if first.trained is None else np.concatenate([p.trained for p in parts]),
        read=None if first.read is None else np.concatenate([p.read for p in parts]),
        held_out=None if first.held_out is None else np.concatenate([p.held_out for p in parts]),
        seen=seen,
    )


@dataclass(frozen=True)
class _Epoch:
    """What is left of an epoch on one rank: called with a worker's number it makes the batches of its queue."""

    maker: BatchMaker
    windows: list[Window]
    queues: list[Queue]
    epoch: int
    shuffle: bool

    def __call__(self, worker: int) -> Iterator[SequenceBatch]:
        return self.maker.batches(self.windows, self.queues[worker], worker, self.epoch, self.shuffle)


class SequenceStream:
    """The batches of a dataset for one rank, an epoch at a time.

    Example: `for batch in stream.epoch(0, stream.deal(0, world_size)[rank : rank + 1]): ...`
    """

    def __init__(self, maker: BatchMaker, settings: Stream) -> None:
        self.maker, self.settings = maker, settings
        if maker.set_aside is not None:
            maker.set_aside.restore(maker.dataset)
        self.groups = row_groups(maker.dataset)
        if maker.set_aside is not None:
            maker.set_aside.check_lost(maker.dataset)

    @property
    def workers(self) -> int:
        """Queues a rank reads side by side: one a loader worker, and one where the rank reads for itself."""
        return max(1, self.settings.workers)

    @property
    def shuffle(self) -> bool:
        """Training shuffles; everything else keeps the dataset's order."""
        return self.maker.training

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, the same on every rank."""
        return windows_of(self.groups, self.maker.seed, epoch, self.settings.window_groups, self.shuffle)

    def epoch(self, epoch: int, queues: list[Queue]) -> Iterator[SequenceBatch]:
        """This rank's batches of what is left in its queues."""
        return made_ahead(_Epoch(self.maker, self.windows(epoch), queues, epoch, self.shuffle), self.settings)


def training_counts(dataset: Dataset) -> np.ndarray:
    """[items] int64: how often each item is in the training part, from the dataset's `items/` parts."""
    counts = np.zeros(dataset.manifest.items, dtype=np.int64)
    for part in dataset.manifest.item_parts:
        with dataset.open_part(part) as file:
            for batch in file.iter_batches(columns=["item_id", "train_count"]):
                counts[batch["item_id"].to_numpy()] = batch["train_count"].to_numpy()
    return counts
