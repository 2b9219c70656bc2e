"""The batches of a dataset for one rank: shuffled windows of row groups are dealt to ranks, read and packed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from recgpt_torchrec.config import Batch, Model, Stream
from recgpt_torchrec.data.batch import SequenceBatch, make_batch
from recgpt_torchrec.data.candidates import Candidates, CandidateSource, leave_out_untrained
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories, join, no_histories
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.inputs.hiding import draw_hidden
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.loading import prefetch
from recgpt_torchrec.data.neighbours.answering import NeighbourAnswers
from recgpt_torchrec.data.packed import Capacity, FixedShape, Layout
from recgpt_torchrec.data.ragged import Int64, offsets_of
from recgpt_torchrec.data.reading.damage import SetAside
from recgpt_torchrec.data.reading.draws import CUTTING, draw_for_users
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.reading.thinning import thin
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.targets import PredictFrom, SoftShares
from recgpt_torchrec.data.windows import Cursor, Position, Queue, RowGroup, Window, deal_windows, row_groups, windows_of
from recgpt_torchrec.errors import InputError

ANY = Request()
TOKENS_PER_SEQUENCE = 4
"""A batch has room for one sequence per so many tokens."""


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes batches for one purpose: training, or encoding the histories of a split."""

    reader: HistoryReader
    batch: Batch
    users: int = 0
    """Maximum number of histories of a batch; 0: as many as it has room for."""
    attributes: Attributes | None = None
    """Of users and items, where the model reads any."""
    source: CandidateSource | None = None
    """Where candidates come from; None: nothing is scored (encoding)."""
    seed: int = 0
    predict_from: PredictFrom = "every"
    """Which tokens predict a target that prompts precede (see `make_batch`)."""
    last_target: bool = False
    """Whether only the last target of each history is predicted (see `make_batch`)."""
    soft_targets: float = 0.0
    """Share of a target's weight that goes to the pre-trained model's answers in the dataset (see `make_batch`)."""
    neighbours: NeighbourAnswers | None = None
    """Finds the neighbours that share a target's weight too; None: there are none."""
    thinning: tuple[float, float] = (0.0, 0.0)
    """Probability with which an entry of a thinned history is left out, and share of the histories that are thinned."""
    grows: int = 0
    """Maximum number of entries appended to a history after it is read (see `retrieval.interests`)."""
    item_keys: int | None = None
    """Number of keys that the model which reads the batches looks items up by (see `data.bags`); None: as many as
    leave few bags empty, which the model then is built for."""
    layout: Layout = "grid"
    """How tokens lie in slots."""
    pad: bool = False
    """Whether all batches have the same shapes, in the layout `row`: as many slots as `batch.tokens`."""

    def __post_init__(self) -> None:
        if self.batch.tokens < self.max_len:
            raise InputError(
                f"--batch.tokens {self.batch.tokens} is less than --model.max_len {self.max_len}: a batch must hold "
                "the longest history; give more tokens, or a smaller max_len"
            )

    @property
    def dataset(self) -> Dataset:
        """The dataset that is read."""
        return self.reader.dataset

    @property
    def max_len(self) -> int:
        """Maximum number of entries of a history."""
        return self.reader.max_len

    @property
    def training(self) -> bool:
        """Whether batches hold targets to train on."""
        return self.reader.training

    @property
    def row_length(self) -> int:
        """Slots of a grid row: those of the longest sequence, but at least 64, so that short ones pack tightly."""
        return self.max_len if self.layout == "row" else max(64, self.max_len)

    @property
    def max_sequences(self) -> int:
        """Maximum number of sequences in a batch."""
        return self.users or max(1, self.batch.tokens // TOKENS_PER_SEQUENCE)

    @property
    def negatives(self) -> npt.NDArray[np.bool_] | None:
        """[items] bool: whether an item may be a negative; None: all may."""
        if self.attributes is not None and self.attributes.items.trained is not None:
            return self.attributes.items.trained
        return None if self.source is None else self.source.ever

    @cached_property
    def capacity(self) -> Capacity:
        """Number of bags per table, the same in every batch."""
        users, items = self.max_sequences, self.dataset.manifest.items
        room = 0 if self.source is None else self.source.room
        if not self.training:
            max_items = self.batch.tokens + self.grows * users
        else:
            answers = self.reader.answers + (0 if self.neighbours is None else self.neighbours.answers)
            max_items = self.batch.tokens * (1 + answers) + users + room
        return Capacity.of(users, min(items, max_items), self.item_keys)

    @cached_property
    def _whole_catalogue(self) -> Candidates:
        """The candidates of a source whose candidates are the same in every batch, less those that are never trained:
        found once, since it takes time per item."""
        assert self.source is not None and self.negatives is not None
        every = self.source.draw(np.zeros(0, dtype=np.int64), np.random.default_rng(0))
        return leave_out_untrained(every, self.negatives)

    @cached_property
    def fixed_shape(self) -> FixedShape | None:
        """Sizes that batches are padded to; None: they are as large as needed."""
        if not self.pad:
            return None
        candidates = 0 if self.source is None or not self.training else self.source.count
        return FixedShape(self.batch.tokens, self.max_sequences, candidates)

    def make(self, histories: Histories, cursor: Cursor | None = None, epoch: int = 0) -> SequenceBatch:
        """Pack histories and draw candidates; negatives depend on (seed, epoch, cursor)."""
        cursor, source = cursor or Cursor(), self.source if self.training else None
        seed = () if source is None else source.seed
        rng = np.random.default_rng((self.seed, epoch, cursor.worker, cursor.batches, 3, *seed))
        inputs, hidden, negatives = self.reader.inputs, None, self.negatives
        if self.training and inputs.ask_dropout and inputs.reads("asked_event"):
            hidden = draw_hidden(histories, inputs.ask_dropout, self.seed, epoch)

        def draw(targets: Int64) -> Candidates:
            assert source is not None
            drawn = source.draw(targets, rng)
            if negatives is None:
                return drawn
            return leave_out_untrained(drawn, negatives) if drawn.bags is None else self._whole_catalogue

        return make_batch(
            histories,
            row_length=self.row_length,
            capacity=self.capacity,
            predict=self.training,
            predict_from=self.predict_from,
            last_target=self.last_target,
            max_position=self.max_len - 1,
            soft_shares=SoftShares(self.soft_targets, 0.0 if self.neighbours is None else self.neighbours.share),
            negatives=negatives,
            draw=None if source is None else draw,
            inputs=inputs,
            hidden=hidden,
            attributes=self.attributes,
            cursor=cursor,
            layout=self.layout,
            pad=self.fixed_shape,
        )

    def empty(self, epoch: int = 0, step: int = 0) -> SequenceBatch:
        """A batch without sequences, for a rank that has no batches left; negatives depend on (seed, epoch, step)."""
        return self.make(no_histories(self.reader.inputs), Cursor(batches=step), epoch)

    def batches(
        self, windows: list[Window], queue: Queue, worker: int, epoch: int, shuffle: bool
    ) -> Iterator[SequenceBatch]:
        """The batches of one queue: each takes the next sequences, in order, as long as they fit the budgets."""
        pending: list[Histories] = []
        tokens = sequences = 0
        batches = queue.batches
        for windows_done, piece in enumerate(queue.windows):
            histories = self.read(windows[piece.window], epoch, shuffle)
            size = histories.users.size
            first, last = piece.rows(size)
            offset = first
            lengths = histories.lengths - 1 if self.training else histories.lengths
            token_offsets = offsets_of(np.maximum(lengths, 0))
            # In training a lost part gives thousands of empty rows, which must not take steps of their own.
            sequence_offsets = offsets_of(histories.lengths > 0 if self.training else np.ones(size, dtype=bool))
            while offset < last:
                max_tokens = token_offsets[offset] + self.batch.tokens - tokens
                max_sequences = sequence_offsets[offset] + self.max_sequences - sequences
                limits = ((token_offsets, max_tokens), (sequence_offsets, max_sequences))
                stop = min(int(np.searchsorted(offsets, limit, side="right")) - 1 for offsets, limit in limits)
                stop = min(stop, last)
                if stop > offset:
                    pending.append(histories.part(offset, stop))
                    tokens += int(token_offsets[stop] - token_offsets[offset])
                    sequences += int(sequence_offsets[stop] - sequence_offsets[offset])
                    offset = stop
                if offset < last:
                    batches += 1
                    rows_done = offset if offset > first else 0
                    yield self.make(join(pending), Cursor(worker, windows_done, rows_done, batches), epoch)
                    pending, tokens, sequences = [], 0, 0
        if pending:
            yield self.make(join(pending), Cursor(worker, len(queue.windows), 0, batches + 1), epoch)

    def read(self, window: Window, epoch: int, shuffle: bool) -> Histories:
        """The histories of a window; with `shuffle`, their order is drawn by (seed, epoch, window)."""
        rng = np.random.default_rng((self.seed, epoch, window.index, 2))
        order, shift = rng.permutation if shuffle else None, None
        if self.training and not self.reader.new_targets:  # these are predicted from all that is there before them
            shift = partial(draw_for_users, purpose=CUTTING, seed=self.seed, epoch=epoch)
        histories = self.reader.read(window.groups, order, shift)
        if not self.training:
            return histories
        thinned = thin(histories, *self.thinning, self.seed, epoch)
        return thinned if self.neighbours is None else self.neighbours.attach(thinned, histories)


@dataclass(frozen=True)
class _QueueBatches:
    """Makes the batches of one of a rank's queues, given the worker's number; pickled for loader processes."""

    maker: BatchMaker
    windows: list[Window]
    queues: list[Queue]
    epoch: int
    shuffle: bool

    def __call__(self, worker: int) -> Iterator[SequenceBatch]:
        return self.maker.batches(self.windows, self.queues[worker], worker, self.epoch, self.shuffle)


class Share:
    """One rank's batches of the rest of an epoch, and what is left of it as they are trained.

    Example: `for batch in share: train(batch); share.done(batch.cursor)`
    """

    def __init__(self, source: _QueueBatches, settings: Stream) -> None:
        self.source, self.settings = source, settings
        self.left = list(source.queues)
        """What is left of the queue of each worker of this rank."""

    def __iter__(self) -> Iterator[SequenceBatch]:
        return prefetch(self.source, self.settings)

    def done(self, cursor: Cursor) -> None:
        """Record that the batch with this cursor, and those before it of the same worker, are trained."""
        self.left[cursor.worker] = self.source.queues[cursor.worker].after(cursor)

    def groups_of(self, cursor: Cursor, left: Queue) -> list[RowGroup]:
        """The row groups that the batch with this cursor was read from, if `left` was left of its queue before."""
        windows_done = len(self.source.queues[cursor.worker].windows) - len(left.windows)
        touched = left.windows[: cursor.windows_done - windows_done + (cursor.offset > 0)]
        # A queue may hold several pieces of a window.
        return list(dict.fromkeys(group for piece in touched for group in self.source.windows[piece.window].groups))


class SequenceStream:
    """The batches of a dataset, for one epoch and one rank at a time.

    Example: `for batch in stream.batches(epoch=0, rank=1, world_size=2): ...`
    """

    def __init__(self, maker: BatchMaker, settings: Stream, advance: Callable[[int], None] = lambda _: None) -> None:
        """
        Args:
            maker: of the batches.
            settings: how they are made.
            advance: called with 1 for each footer of the dataset that is read.
        """
        self.maker, self.settings = maker, settings
        set_aside = maker.reader.set_aside
        if set_aside is not None:
            set_aside.restore(maker.dataset)
        sample = maker.reader.sample
        self.groups = row_groups(maker.dataset, advance) if sample is None else list(sample.groups)
        if set_aside is not None:
            set_aside.check_lost(maker.dataset)

    @property
    def dataset(self) -> Dataset:
        """The dataset that is read."""
        return self.maker.dataset

    @property
    def workers(self) -> int:
        """Number of queues per rank: one per loader worker, or one where the rank reads in a thread."""
        return max(1, self.settings.workers)

    def batches(self, epoch: int = 0, position: Position | None = None, rank: int = 0, world_size: int = 1) -> Share:
        """A rank's share of an epoch; training shuffles, everything else keeps the dataset's order.

        Args:
            epoch: from 0.
            position: position in the data within this epoch; None: its beginning.
            rank, world_size: the rank whose share it is, among how many.

        Raises:
            InputError: the position belongs to a dataset with other row groups.
        """
        shuffle = self.maker.training
        windows = windows_of(self.groups, self.maker.seed, epoch, self.settings.window_groups, shuffle)
        dealt = deal_windows(windows, world_size * self.workers, position)
        queues = dealt[rank * self.workers : (rank + 1) * self.workers]
        return Share(_QueueBatches(self.maker, windows, queues, epoch, shuffle), self.settings)


def encoding_stream(
    dataset: Dataset,
    split: SplitName,
    model: Model,
    batch: Batch,
    prompts: bool = False,
    grows: int = 0,
    set_aside: SetAside | None = None,
    *,
    item_keys: int,
    feedback: bool = False,
    sample: UserSample | None = None,
    inputs: Inputs | None = None,
    attributes: Attributes | None = None,
    request: Request = ANY,
) -> SequenceStream:
    """The stream of histories to encode: those before the held-out item of a split, or whole ones with `all`.

    `item_keys`, `feedback`, `inputs` and `attributes` are those of the model that encodes them; `sample` says which
    users are read (None: all), and `request` what is asked after their histories.
    """
    reader = HistoryReader(
        dataset=dataset,
        split=split,
        max_len=model.max_len,
        prompts=prompts,
        feedback=feedback,
        set_aside=set_aside,
        sample=sample,
        inputs=inputs or Inputs(),
        request=request,
    )
    maker = BatchMaker(reader=reader, batch=batch, attributes=attributes, grows=grows, item_keys=item_keys)
    return SequenceStream(maker, Stream())
