"""`SequenceBatch`: the packed histories that one rank trains on in one step. Each distinct id is looked up once."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recgpt_torchrec.data.bags import ITEM, USER, bags_of, distinct_bags
from recgpt_torchrec.data.candidates import Candidates, no_candidates
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packing import pack_sequences
from recgpt_torchrec.data.ragged import ragged_arange
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.data.windows import Cursor

PredictFrom = Literal["interacted", "last", "every"]


@dataclass(frozen=True)
class Capacity:
    """Fixed number of bags per table, equal on all ranks (row-wise sharding needs that); unused bags are empty."""

    users: int
    items: int


@dataclass
class SequenceBatch(Pipelineable):
    """A packed batch. Grid tensors are [rows, row_length]; empty slots have `sequence` -1."""

    users: KeyedJaggedTensor
    """One bag per distinct user, `Capacity.users` bags."""
    items: KeyedJaggedTensor
    """One bag per distinct item of histories, targets, soft targets and candidates, `Capacity.items` bags."""
    item_bag: torch.Tensor
    """[rows, row_length] int64: the bag of each slot's item."""
    user_bag: torch.Tensor
    """[rows, row_length] int64: the bag of each slot's user."""
    position: torch.Tensor
    """[rows, row_length] int64: 0 for the first entry of its sequence."""
    sequence: torch.Tensor
    """[rows, row_length] int64: index of the slot's sequence in the batch; -1: empty."""
    segment: torch.Tensor
    """[rows, row_length] int64 segment ids."""
    target_slot: torch.Tensor
    """[targets] int64: flat index of the slot whose output predicts the target."""
    target_bag: torch.Tensor
    """[targets] int64: bag of the target."""
    candidate_bag: torch.Tensor
    """[candidates] int64: bags that every target is scored against."""
    candidate_log_q: torch.Tensor
    """[candidates] float32: log of the expected count of the candidate among those drawn (0: always a candidate)."""
    soft_bag: torch.Tensor
    """[targets, answers] int64: bags of the answers that share a target's weight, its soft targets."""
    soft_weight: torch.Tensor
    """[targets, answers] float32: weight of each; the target itself keeps the rest of 1."""
    target_candidate: torch.Tensor
    """[targets] int64: index of the target among the candidates, where it is no negative; -1: not among them."""
    last_slot: torch.Tensor
    """[sequences] int64: flat index of the slot of each sequence's newest token."""
    global_targets: torch.Tensor
    """[] float32: number of targets of this step on all ranks; the loss is the mean over them."""
    histories: Histories
    """The histories that were packed; they stay on the host."""
    cursor: Cursor = field(default_factory=Cursor)
    """How far the queue is read once this batch is trained; it stays on the host."""

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


def make_batch(
    histories: Histories,
    *,
    row_length: int,
    capacity: Capacity,
    predict: bool,
    predict_from: PredictFrom = "every",
    max_position: int | None = None,
    soft_targets: float = 0.0,
    draw: Callable[[np.ndarray], Candidates] | None = None,
    cursor: Cursor | None = None,
) -> SequenceBatch:
    """Pack histories into a batch.

    Args:
        histories: at most `row_length` entries each (one more where `predict`); may be empty.
        row_length: slots of a grid row.
        capacity: bags of the two jagged tensors.
        predict: whether there are targets: every entry but the last is a token that predicts the next interacted entry
            (segment 0). Otherwise all entries are tokens and nothing is predicted.
        predict_from: which tokens predict where prompts precede the target: the `interacted` one before them, the
            `last` one before the target, or `every` one.
        max_position: largest position, which all later tokens share; None: `row_length` - 1.
        soft_targets: share of a target's weight that goes to the model's answers, where `histories` has them.
        draw: returns the candidates for the targets [targets] int64; None: there are none.
        cursor: how far the queue is read after this batch.

    Raises:
        ValueError: a history does not fit a row, or there are more distinct ids than bags.
    """
    max_position = row_length - 1 if max_position is None else max_position
    lengths, items, sequences = histories.lengths, histories.items, histories.users.size
    segments = histories.segments if histories.segments is not None else np.zeros(items.size, dtype=np.int8)
    positions = positions_of(segments, histories.offsets)
    is_last = np.zeros(items.size, dtype=bool)
    is_last[histories.offsets[1:][lengths > 0] - 1] = True
    if predict:
        inputs, tokens = ~is_last, np.maximum(lengths - 1, 0)
        predicts, targets = targets_of(histories, segments, inputs, predict_from)
    else:
        inputs, tokens = np.ones(items.size, dtype=bool), lengths
        predicts = np.zeros(items.size, dtype=bool)
        targets = np.zeros(0, dtype=np.int64)
    soft_items, soft_weights = soft_targets_of(histories, inputs, predicts, targets, soft_targets)
    candidates = no_candidates() if draw is None else draw(targets)

    grid = pack_sequences(tokens, row_length)
    size = grid.rows * row_length

    def on_grid(values: np.ndarray, empty: int = 0) -> torch.Tensor:
        out = np.full(size, empty, dtype=np.int64)
        out[grid.slots] = values
        return torch.from_numpy(out.reshape(grid.rows, row_length))

    has_tokens = tokens > 0
    users, bags = distinct_bags(USER, histories.users[has_tokens], capacity.users)
    user_bags = np.zeros(sequences, dtype=np.int64)
    user_bags[has_tokens] = bags
    lookups = [items[inputs], targets, candidates.ids, soft_items.ravel()]
    if candidates.every_item:  # then an item's bag is its id
        item_bags, target_candidate = bags_of(ITEM, candidates.ids), targets
    else:
        item_bags, bags = distinct_bags(ITEM, np.concatenate(lookups), capacity.items)
        lookups = np.split(bags, np.cumsum([part.size for part in lookups])[:-1])
        index_of = np.full(capacity.items, -1, dtype=np.int64)
        index_of[lookups[2]] = np.arange(lookups[2].size)
        target_candidate = index_of[lookups[1]]
    input_bags, target_bags, candidate_bags, soft_bags = lookups
    ends = np.cumsum(tokens)
    sequence = np.repeat(np.arange(sequences), tokens)
    return SequenceBatch(
        users=users,
        items=item_bags,
        item_bag=on_grid(input_bags),
        user_bag=on_grid(user_bags[sequence]),
        position=on_grid(np.minimum(positions[inputs], max_position)),
        sequence=on_grid(sequence, empty=-1),
        segment=on_grid(segments[inputs]),
        target_slot=torch.from_numpy(grid.slots[predicts]),
        target_bag=torch.from_numpy(target_bags),
        candidate_bag=torch.from_numpy(candidate_bags),
        candidate_log_q=torch.from_numpy(candidates.log_q),
        soft_bag=torch.from_numpy(soft_bags.reshape(soft_items.shape)),
        soft_weight=torch.from_numpy(soft_weights),
        target_candidate=torch.from_numpy(target_candidate),
        last_slot=torch.from_numpy(grid.slots[ends[tokens > 0] - 1]),
        global_targets=torch.tensor(float(targets.size)),
        histories=histories,
        cursor=cursor or Cursor(),
    )


def positions_of(segments: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Positions [entries] int64: for an interacted entry, the number of interacted entries before it.

    The k-th prompt after it has k more, as if it were the k-th item to come: the model generates at these positions.
    Example: segments 0 1 1 0 0 have the positions 0 1 2 1 2.

    Args:
        segments: [entries] int8 segment ids.
        offsets: [sequences + 1] int64.
    """
    entry = ragged_arange(np.diff(offsets))
    first = np.repeat(offsets[:-1], np.diff(offsets))
    interacted = segments == INTERACTED
    before = np.concatenate([[0], np.cumsum(interacted)])
    interacted_count = before[1:] - before[first]  # interacted entries up to and including this one
    last_interacted = (
        np.maximum.accumulate(np.where(interacted, np.arange(interacted.size), -1)) if interacted.size else entry
    )
    since = np.where(last_interacted >= first, np.arange(interacted.size) - last_interacted, entry + 1)
    return np.where(interacted, interacted_count - 1, interacted_count - 1 + since)


def targets_of(
    histories: Histories, segments: np.ndarray, inputs: np.ndarray, predict_from: PredictFrom
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens predict, [tokens] bool, and their targets, [targets] int64: the next interacted items."""
    interacted = segments == INTERACTED
    interacted_entries = np.flatnonzero(interacted)
    entry = np.flatnonzero(inputs)
    next_index = np.searchsorted(interacted_entries, entry, side="right")
    following = np.append(interacted_entries, -1)[next_index]
    end = np.repeat(histories.offsets[1:], histories.lengths)[entry]
    predicts = (following >= 0) & (following < end)
    if histories.trained is not None:
        predicts &= ~histories.trained[following]
    if predict_from == "interacted":
        predicts &= interacted[entry]
    elif predict_from == "last":
        predicts &= following == entry + 1
    return predicts, histories.items[following[predicts]]


def soft_targets_of(
    histories: Histories, inputs: np.ndarray, predicts: np.ndarray, targets: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The answers that share a target's weight, [targets, answers] int64, and the weight of each, float32.

    A `share` of the target's weight is spread over the answers by the softmax of their scores. An answer that is
    missing or is the target itself has weight 0; the target's id takes its place.
    """
    if not share or histories.answers is None or histories.answer_scores is None:
        return np.zeros((targets.size, 0), dtype=np.int64), np.zeros((targets.size, 0), dtype=np.float32)
    answers = histories.answers[inputs][predicts]
    scores = histories.answer_scores[inputs][predicts]
    valid = (answers >= 0) & (answers != targets[:, None])
    scores = np.where(valid, scores, -np.inf)
    top = scores.max(1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    weights *= share / np.maximum(weights.sum(1, keepdims=True), 1e-30)
    return np.where(valid, answers, targets[:, None]), weights.astype(np.float32)
