"""`SequenceBatch`: what one rank trains on in one step, packed, with every table asked once for distinct ids only."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recgpt_torchrec.data.packing import pack, ragged_arange
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.data.windows import Cursor

PredictFrom = Literal["interacted", "last", "every"]

USER = "user"
ITEM = "item"


@dataclass(frozen=True)
class Sequences:
    """A ragged list of histories, as numpy arrays; what a batch is made from.

    `items` and `segments` are [entries]; sequence s holds the entries `offsets[s]:offsets[s + 1]`.
    """

    users: np.ndarray
    """[sequences] int64 dense user ids; the same user may come twice."""
    items: np.ndarray
    """[entries] int64 dense item ids."""
    offsets: np.ndarray
    """[sequences + 1] int64."""
    segments: np.ndarray | None = None
    """[entries] int8: 0 interacted, 1 generated, 2 shown but not clicked; None: all interacted."""
    answers: np.ndarray | None = None
    """[entries, answers] int64 items that the pre-trained model answers after each entry, the best first; -1: none."""
    answer_scores: np.ndarray | None = None
    """[entries, answers] float32 scores (logits) of the answers."""
    trained: np.ndarray | None = None
    """[entries] bool: which were trained on before, so that they are no targets; None: none."""
    read: np.ndarray | None = None
    """[sequences] float64: how many of the dataset's interactions each accounts for; progress is measured in these."""
    held_out: np.ndarray | None = None
    """[sequences] int64: the item to be ranked in evaluation."""
    seen: tuple[np.ndarray, np.ndarray] | None = None
    """In evaluation: (items, offsets) of the whole history, which `items` may hold only the newest part of."""

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int64 number of entries."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Capacity:
    """Fixed numbers of bags, equal on all ranks (row-wise sharding needs that; what is not used stays empty)."""

    users: int
    items: int


@dataclass
class SequenceBatch(Pipelineable):
    """A packed batch. Grid tensors are [rows, row_length]; empty slots have `sequence` -1."""

    users: KeyedJaggedTensor
    """One bag a distinct user, `Capacity.users` bags."""
    items: KeyedJaggedTensor
    """One bag a distinct item of histories, targets and candidates, `Capacity.items` bags."""
    item_bag: torch.Tensor
    """[rows, row_length] int64: the bag of each slot's item."""
    user_bag: torch.Tensor
    """[rows, row_length] int64: the bag of each slot's user."""
    position: torch.Tensor
    """[rows, row_length] int64: 0 for the first entry of its sequence."""
    sequence: torch.Tensor
    """[rows, row_length] int64: number of the slot's sequence in the batch; -1: empty."""
    segment: torch.Tensor
    """[rows, row_length] int64 segment ids."""
    target_slot: torch.Tensor
    """[targets] int64: flat slot whose output predicts the target."""
    target_bag: torch.Tensor
    """[targets] int64: bag of the item that came next."""
    candidate_bag: torch.Tensor
    """[candidates] int64: bags that every target is scored against."""
    candidate_log_q: torch.Tensor
    """[candidates] float32: log of the expected count of the candidate among those drawn (0: it is always there)."""
    soft_bag: torch.Tensor
    """[targets, answers] int64: bags of the items that share a target's place as soft targets."""
    soft_weight: torch.Tensor
    """[targets, answers] float32: the share of each; the target itself keeps what is left of 1."""
    target_candidate: torch.Tensor
    """[targets] int64: index into the candidates of the target itself, which is no negative; -1 where it is not
    there."""
    last_slot: torch.Tensor
    """[sequences] int64: flat slot of the newest entry of each sequence."""
    global_targets: torch.Tensor
    """[] float32: targets of this step on all ranks together; the loss is a mean over them."""
    sequences: Sequences
    """The histories the batch was made from; stays on the host."""
    cursor: Cursor = field(default_factory=Cursor)
    """Where the data stands once this batch is trained; stays on the host."""

    def _tensors(self) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: v for name, v in values if isinstance(v, torch.Tensor | KeyedJaggedTensor)}

    def to(self, device: torch.device, non_blocking: bool = False) -> "SequenceBatch":
        """A copy on `device`."""
        return replace(self, **{n: v.to(device=device, non_blocking=non_blocking) for n, v in self._tensors().items()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors."""
        for value in self._tensors().values():
            value.record_stream(stream)

    def pin_memory(self) -> "SequenceBatch":
        """A copy in page-locked host memory."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})


@dataclass(frozen=True)
class Candidates:
    """The candidate set of one batch, in item ids."""

    ids: np.ndarray
    """[candidates] int64, all different."""
    log_q: np.ndarray
    """[candidates] float32."""


def distinct(ids: np.ndarray, capacity: int, key: str) -> tuple[KeyedJaggedTensor, np.ndarray]:
    """Bags of the distinct `ids` [n], one id a bag, padded with empty bags to `capacity`; and the bag of each id
    [n]."""
    unique, bags = np.unique(ids, return_inverse=True)
    if unique.size > capacity:
        raise ValueError(f"{unique.size} distinct {key} ids in a batch with room for {capacity}")
    lengths = torch.zeros(capacity, dtype=torch.int32)
    lengths[: unique.size] = 1
    return KeyedJaggedTensor(keys=[key], values=torch.from_numpy(unique), lengths=lengths), bags.astype(np.int64)


def make_batch(
    sequences: Sequences,
    *,
    row_length: int,
    capacity: Capacity,
    predict: bool,
    predict_from: PredictFrom = "every",
    max_position: int | None = None,
    soft_targets: float = 0.0,
    candidates: Candidates | None = None,
    all_items: int = 0,
    in_batch_log_q: np.ndarray | None = None,
    cursor: Cursor | None = None,
) -> SequenceBatch:
    """Pack sequences into a batch.

    Args:
        sequences: at most `row_length` entries each (one more where `predict`); may be none at all.
        row_length: slots of a grid row.
        capacity: bags of the two jagged tensors.
        predict: every entry but the last is input, and predicts the next one that was interacted with (segment 0); else
            all entries are input and nothing is predicted.
        predict_from: where prompts stand between the two, which entries predict: the `interacted` one before them, the
            `last` entry before the target, or `every` one.
        max_position: largest position there is; None: `row_length` - 1.
        soft_targets: share of a target's weight that goes to the model's answers, where `sequences` has some.
        candidates: what targets are scored against, drawn ahead.
        all_items: score against the whole catalogue of this many items instead.
        in_batch_log_q: [items] float32; score against the distinct targets of the batch, with these log probabilities.
        cursor: where the data stands after this batch.
    """
    max_position = row_length - 1 if max_position is None else max_position
    lengths, items, count = sequences.lengths, sequences.items, sequences.users.size
    segments = sequences.segments if sequences.segments is not None else np.zeros(items.size, dtype=np.int8)
    positions = positions_of(segments, sequences.offsets)
    is_last = np.zeros(items.size, dtype=bool)
    is_last[sequences.offsets[1:][lengths > 0] - 1] = True
    if predict:
        inputs, entries = ~is_last, np.maximum(lengths - 1, 0)
        wanted, targets = targets_of(sequences, segments, inputs, predict_from)
    else:
        inputs, entries = np.ones(items.size, dtype=bool), lengths
        wanted = np.zeros(items.size, dtype=bool)
        targets = np.zeros(0, dtype=np.int64)
    soft_items, soft_weights = soft_targets_of(sequences, inputs, wanted, targets, soft_targets)

    grid = pack(entries, row_length)
    size = grid.rows * row_length

    def on_grid(values: np.ndarray, empty: int = 0) -> torch.Tensor:
        out = np.full(size, empty, dtype=np.int64)
        out[grid.slots] = values
        return torch.from_numpy(out.reshape(grid.rows, row_length))

    looked_up = entries > 0
    user_kjt, bags = distinct(sequences.users[looked_up], capacity.users, USER)
    user_bags = np.zeros(count, dtype=np.int64)
    user_bags[looked_up] = bags
    if all_items:
        item_kjt, bags = distinct(np.arange(all_items), all_items, ITEM)
        input_bags, target_bags, candidate_bags = items[inputs], targets, np.arange(all_items)
        soft_bags = soft_items.ravel()
        log_q, target_candidate = np.zeros(all_items, dtype=np.float32), targets
    else:
        if in_batch_log_q is not None:
            there = np.unique(targets)
            candidates = Candidates(there, in_batch_log_q[there])
        elif candidates is None:
            candidates = Candidates(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        ids = [items[inputs], targets, candidates.ids, soft_items.ravel()]
        item_kjt, bags = distinct(np.concatenate(ids), capacity.items, ITEM)
        input_bags, target_bags, candidate_bags, soft_bags = np.split(bags, np.cumsum([part.size for part in ids])[:-1])
        log_q = candidates.log_q
        index_of = np.full(capacity.items, -1, dtype=np.int64)
        index_of[candidate_bags] = np.arange(candidate_bags.size)
        target_candidate = index_of[target_bags]
    ends = np.cumsum(entries)
    number = np.repeat(np.arange(count), entries)
    return SequenceBatch(
        users=user_kjt,
        items=item_kjt,
        item_bag=on_grid(input_bags),
        user_bag=on_grid(user_bags[number]),
        position=on_grid(np.minimum(positions[inputs], max_position)),
        sequence=on_grid(number, empty=-1),
        segment=on_grid(segments[inputs]),
        target_slot=torch.from_numpy(grid.slots[wanted]),
        target_bag=torch.from_numpy(target_bags),
        candidate_bag=torch.from_numpy(candidate_bags),
        candidate_log_q=torch.from_numpy(log_q),
        soft_bag=torch.from_numpy(soft_bags.reshape(soft_items.shape)),
        soft_weight=torch.from_numpy(soft_weights),
        target_candidate=torch.from_numpy(target_candidate),
        last_slot=torch.from_numpy(grid.slots[ends[entries > 0] - 1]),
        global_targets=torch.tensor(float(targets.size)),
        sequences=sequences,
        cursor=cursor or Cursor(),
    )


def positions_of(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The position of each entry [entries] int64: an interacted one has the number of interacted ones before it.

    The k-th prompt after it has k more, as if it were the k-th item to come: that is how the model generates on.
    Example: segments 0 1 1 0 0 have the positions 0 1 2 1 2.
    """
    entry = ragged_arange(np.diff(offsets))
    first = np.repeat(offsets[:-1], np.diff(offsets))
    real = segments == INTERACTED
    before = np.concatenate([[0], np.cumsum(real)])
    number = before[1:] - before[first]  # interacted entries up to and including this one
    newest = np.maximum.accumulate(np.where(real, np.arange(real.size), -1)) if real.size else entry
    since = np.where(newest >= first, np.arange(real.size) - newest, entry + 1)
    return np.where(real, number - 1, number - 1 + since)


def targets_of(
    sequences: Sequences, segments: np.ndarray, inputs: np.ndarray, predict_from: PredictFrom
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the input entries predict, [inputs] bool, and the next interacted item of each that does."""
    real = segments == INTERACTED
    places = np.flatnonzero(real)
    entry = np.flatnonzero(inputs)
    after = np.searchsorted(places, entry, side="right")
    following = np.append(places, -1)[after]
    end = np.repeat(sequences.offsets[1:], sequences.lengths)[entry]
    wanted = (following >= 0) & (following < end)
    if sequences.trained is not None:
        wanted &= ~sequences.trained[following]
    if predict_from == "interacted":
        wanted &= real[entry]
    elif predict_from == "last":
        wanted &= following == entry + 1
    return wanted, sequences.items[following[wanted]]


def soft_targets_of(
    sequences: Sequences, inputs: np.ndarray, wanted: np.ndarray, targets: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The answers that share a target's place, [targets, answers] int64, and the weight of each, float32.

    A `share` of the target's weight is spread over the answers by the softmax of their scores. The target itself is
    none of them; one that is left out has weight 0 and stands as the target.
    """
    if not share or sequences.answers is None or sequences.answer_scores is None:
        return np.zeros((targets.size, 0), dtype=np.int64), np.zeros((targets.size, 0), dtype=np.float32)
    answers = sequences.answers[inputs][wanted]
    scores = sequences.answer_scores[inputs][wanted]
    valid = (answers >= 0) & (answers != targets[:, None])
    scores = np.where(valid, scores, -np.inf)
    top = scores.max(1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    weights *= share / np.maximum(weights.sum(1, keepdims=True), 1e-30)
    return np.where(valid, answers, targets[:, None]), weights.astype(np.float32)


def no_sequences() -> Sequences:
    """A ragged list without any sequence: what a rank that has run out goes on with."""
    none = np.zeros(0, dtype=np.int64)
    return Sequences(users=none, items=none, offsets=np.zeros(1, dtype=np.int64))
