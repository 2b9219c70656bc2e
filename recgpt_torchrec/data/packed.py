"""`PackedBatch`: packed histories as the dense part of the model reads them. Each distinct id is one bag.

Needs torch and numpy, neither torchrec nor Arrow: `data/batch.py` adds what the tables look up.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from recgpt_torchrec.data.candidates import Candidates, no_candidates
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.features import compute_features
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.packing import lay_end_to_end, pack_sequences
from recgpt_torchrec.data.ragged import Int64, ragged_arange
from recgpt_torchrec.data.targets import PredictFrom, SoftShares, positions_of, soft_targets_of, targets_of

Layout = Literal["grid", "row"]
"""grid: rows of equal length, several sequences in each, for dense attention. row: one row that holds all sequences end
to end, for attention that is given where each begins."""


MOST_ITEM_KEYS = 64
"""Maximum number of keys that a batch's item bags are dealt to."""

IDS_ALONE = Inputs()

HARD = SoftShares()

LAST_ID = np.iinfo(np.int64).max
"""Larger than any id."""


@dataclass(frozen=True)
class Capacity:
    """Number of bags that a batch has room for, equal on all ranks (row-wise sharding needs that); see `data.bags`."""

    users: int
    items: int
    item_keys: int = 1
    """Number of keys that the item bags are dealt to; that of the model that looks them up."""

    @classmethod
    def of(cls, users: int, items: int, item_keys: int | None = None) -> "Capacity":
        """Room for users and items, dealt to `item_keys` keys; None: so many that few bags are empty."""
        if item_keys is None:
            item_keys = -(-items // max(users, -(-items // MOST_ITEM_KEYS)))
        return cls(users, items, item_keys)

    @property
    def stride(self) -> int:
        """Number of bags per key."""
        return max(self.users, -(-self.items // self.item_keys))


@dataclass(frozen=True)
class FixedShape:
    """Sizes that every batch is padded to, so that a compiled model meets one shape."""

    tokens: int
    """Slots, and targets."""
    sequences: int
    candidates: int


class DistinctIds(NamedTuple):
    """The ids to look up, in the order of their bags."""

    users: Int64
    """[distinct users] int64."""
    items: Int64
    """[distinct items] int64 of histories, targets, soft targets and candidates."""


@dataclass(kw_only=True)
class PackedBatch:
    """A packed batch. Slots are [rows, row_length], one row in the layout `row`; empty slots have `sequence` -1."""

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
    features: torch.Tensor | None = None
    """[features, rows, row_length] int64, see `data.inputs.features`; None: the model reads none."""
    target_slot: torch.Tensor
    """[targets] int64: flat index of the slot whose output predicts the target; 0 in padding."""
    target_bag: torch.Tensor
    """[targets] int64: bag of the target; 0 in padding."""
    candidate_bag: torch.Tensor
    """[candidates] int64: bags that every target is scored against; 0 in padding."""
    candidate_log_q: torch.Tensor
    """[candidates] float32: log of the expected count of the candidate among those drawn (0: always a candidate); inf
    in padding, so that nothing is scored against it."""
    soft_bag: torch.Tensor
    """[targets, answers] int64: bags of the answers that share a target's weight, its soft targets."""
    soft_weight: torch.Tensor
    """[targets, answers] float32: weight of each; the target itself keeps the rest of its own."""
    target_candidate: torch.Tensor
    """[targets] int64: index of the target among the candidates, where it is no negative; -1: not among them."""
    target_item: torch.Tensor | None = None
    """[targets] int64 item ids, -1 in padding; None: candidates are not shared by ranks."""
    candidate_item: torch.Tensor | None = None
    """[candidates] int64 item ids, ascending, the largest int64 in padding; None as above."""
    candidates_first: bool = False
    """Whether `candidate_bag` is 0, 1, ..."""
    most_targets: int = 0
    """Largest number of targets of a rank in this step; `distributed.lockstep` sets it."""
    target_weight: torch.Tensor | None
    """[targets] float32: factor of each target's loss, 0 for padding; None: 1, and nothing is padded."""
    last_slot: torch.Tensor
    """[sequences] int64: flat index of the slot of each sequence's newest token; 0 in padding. Sequences without tokens
    are left out, here and in `cu_seqlens`."""
    cu_seqlens: torch.Tensor | None
    """[sequences + 1] int32, layout `row`: the first slot of each sequence, and the end of the last, which padding
    repeats; slots from there on belong to no sequence. A batch without sequences has one without slots. None: grid."""
    max_seqlen: int
    """Number of tokens of the longest sequence, or of the longest that any batch may hold where shapes are fixed."""
    targets: int
    """Number of targets, without padding."""
    global_targets: torch.Tensor
    """[] float32: sum of the weights of this step's targets on all ranks; the loss is their weighted mean. It is this
    rank's until `distributed.lockstep` sets it."""

    def _tensors(self) -> dict[str, Any]:
        """What is moved with the batch, by field name."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """A copy on `device`."""
        return replace(self, **{n: v.to(device=device, non_blocking=non_blocking) for n, v in self._tensors().items()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors."""
        for value in self._tensors().values():
            value.record_stream(stream)

    def pin_memory(self) -> Self:
        """A copy in page-locked host memory."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})


def pack_histories(
    histories: Histories,
    *,
    row_length: int,
    capacity: Capacity,
    predict: bool,
    predict_from: PredictFrom = "every",
    last_target: bool = False,
    max_position: int | None = None,
    soft_shares: SoftShares = HARD,
    negatives: npt.NDArray[np.bool_] | None = None,
    draw: Callable[[Int64], Candidates] | None = None,
    inputs: Inputs = IDS_ALONE,
    hidden: npt.NDArray[np.bool_] | None = None,
    layout: Layout = "grid",
    pad: FixedShape | None = None,
) -> tuple[PackedBatch, DistinctIds]:
    """Pack histories into slots, and number the distinct ids that they, their targets and the candidates hold.

    Args:
        histories: at most `row_length` entries each (one more where `predict`); may be empty.
        row_length: slots of a grid row; in the layout `row` only the length of the longest sequence.
        capacity: maximum number of distinct ids.
        predict: whether there are targets: every entry but the last is a token that predicts the next interacted entry
            (segment 0). Otherwise all entries are tokens and nothing is predicted.
        predict_from: which tokens predict where prompts precede the target: the `interacted` one before them, the
            `last` one before the target, or `every` one.
        last_target: whether only the last target of each history is predicted.
        max_position: largest position, which all later tokens share; None: `row_length` - 1.
        soft_shares: of a target's weight that go to answers and neighbours, where `histories` has them.
        negatives: [items] bool: whether an item is ever a negative, else no answer either; None: all are.
        draw: returns the candidates for the targets [targets] int64; None: there are none.
        inputs: what the model reads beside ids; of that its features are here.
        hidden: [entries] bool: after which the event type asked for is hidden; None: after none.
        layout: how tokens lie in slots.
        pad: sizes that the tensors are padded to, in the layout `row`; None: they are as large as needed.

    Raises:
        ValueError: a history does not fit a row, or there are more distinct ids, tokens, sequences or candidates than
            there is room for.
    """
    max_position = row_length - 1 if max_position is None else max_position
    lengths, items = histories.lengths, histories.items
    if predict:
        is_token = np.ones(items.size, dtype=bool)
        is_token[histories.offsets[1:][lengths > 0] - 1] = False
        token_entries, tokens = np.flatnonzero(is_token), np.maximum(lengths - 1, 0)
        predicting, target_entries = targets_of(histories, token_entries, predict_from, last_target)
    else:
        token_entries, tokens = np.arange(items.size), lengths
        predicting = target_entries = np.zeros(0, dtype=np.int64)
    targets = items.take(target_entries)
    soft_items, soft_weights = soft_targets_of(histories, token_entries, predicting, targets, soft_shares, negatives)
    weights = None if histories.weights is None else histories.weights.take(target_entries)
    if weights is not None:
        soft_weights *= weights[:, None]
    candidates = no_candidates() if draw is None else draw(targets)

    if layout == "grid":
        grid = pack_sequences(tokens, row_length)
    else:
        grid = lay_end_to_end(tokens, row_length, slots=None if pad is None else pad.tokens)
    has_tokens = np.flatnonzero(tokens)
    sequence = np.repeat(np.arange(lengths.size), tokens)
    users, bags = number_distinct("user", histories.users.take(has_tokens), capacity.users)
    user_bags = np.zeros(lengths.size, dtype=np.int64)
    user_bags[has_tokens] = bags

    used = np.zeros(items.size, dtype=bool)
    used[token_entries] = used[target_entries] = True
    used_entries = np.flatnonzero(used)
    used_items, soft = items.take(used_entries), soft_items.ravel()
    if candidates.bags is not None:
        candidate_bags = candidates.bags
        both = np.concatenate([used_items, soft])
        ids, bags = number_behind("item", both, candidates.ids, capacity.items)
        entry_bags, soft_bags = np.split(bags, [used_items.size])
    else:
        both = np.concatenate([used_items, candidates.ids, soft])
        ids, bags = number_distinct("item", both, capacity.items)
        ends = np.cumsum([used_items.size, candidates.ids.size])
        entry_bags, candidate_bags, soft_bags = np.split(bags, ends)
    if entry_bags.size < items.size:
        used_bags, entry_bags = entry_bags, np.zeros(items.size, dtype=np.int64)
        entry_bags[used_entries] = used_bags
    target_bags = entry_bags.take(target_entries)
    if candidates.bags is not None:
        target_candidate = np.where(target_bags < candidates.ids.size, target_bags, -1)
    else:
        index_of = np.full(ids.size, -1, dtype=np.int64)
        index_of[candidate_bags] = np.arange(candidate_bags.size)
        target_candidate = index_of.take(target_bags)

    if histories.segments is None:
        position, segments = ragged_arange(tokens), None
    else:
        position, segments = positions_of(histories).take(token_entries), histories.segments.take(token_entries)
    features = compute_features(inputs, histories, token_entries, hidden)
    seqlens = tokens[has_tokens]
    ends = np.cumsum(seqlens)
    # Padded to these sizes, or as they are.
    pad_targets, pad_sequences, pad_candidates = (
        (None,) * 3 if pad is None else (pad.tokens * predict, pad.sequences, pad.candidates)
    )
    total = float(targets.size) if weights is None else float(weights.sum(dtype=np.float64))
    if weights is None and pad_targets is not None:
        weights = np.ones(targets.size, np.float32)
    cu_seqlens = None
    if layout == "row":
        bounds = np.concatenate([[0], ends if ends.size else [0]]).astype(np.int32)
        cu_seqlens = _tensor(bounds, None if pad_sequences is None else pad_sequences + 1, bounds[-1])
    batch = PackedBatch(
        item_bag=grid.put(entry_bags.take(token_entries)),
        user_bag=grid.put(user_bags.take(sequence)),
        position=grid.put(np.minimum(position, max_position)),
        sequence=grid.put(sequence, empty=-1),
        segment=grid.put(segments),
        features=None if features is None else torch.stack([grid.put(values) for values in features]),
        target_slot=_tensor(grid.slots.take(predicting), pad_targets),
        target_bag=_tensor(target_bags, pad_targets),
        candidate_bag=_tensor(candidate_bags, pad_candidates),
        candidate_log_q=_tensor(candidates.log_q, pad_candidates, np.inf),
        soft_bag=_tensor(soft_bags.reshape(soft_items.shape), pad_targets),
        soft_weight=_tensor(soft_weights, pad_targets),
        target_candidate=_tensor(target_candidate, pad_targets, -1),
        target_item=_tensor(targets, pad_targets, -1) if candidates.shared else None,
        candidate_item=_tensor(candidates.ids, pad_candidates, LAST_ID) if candidates.shared else None,
        candidates_first=candidates.bags is not None,
        most_targets=targets.size,
        target_weight=None if weights is None else _tensor(weights, pad_targets),
        last_slot=_tensor(grid.slots[ends - 1], pad_sequences),
        cu_seqlens=cu_seqlens,
        max_seqlen=row_length if pad is not None else int(seqlens.max(initial=0)),
        targets=targets.size,
        global_targets=torch.tensor(total),
    )
    return batch, DistinctIds(users, ids)


def number_distinct(name: str, ids: Int64, capacity: int) -> tuple[Int64, Int64]:
    """The distinct ids of `ids` [n] int64, ascending, and each one's index among them, [n] int64.

    Raises:
        ValueError: there are more than `capacity`.
    """
    distinct, index = np.unique(ids, return_inverse=True)
    if distinct.size > capacity:
        raise ValueError(f"{distinct.size} distinct {name} ids in a batch with room for {capacity}")
    return distinct, index.astype(np.int64, copy=False)


def number_behind(name: str, ids: Int64, range_ids: Int64, capacity: int) -> tuple[Int64, Int64]:
    """Number distinct ids where those of a range come first: `range_ids` [n] int64 are consecutive.

    Returns:
        The range's ids and the other distinct ones behind them, and the index of each of `ids` [m] int64 among them.

    Raises:
        ValueError: there are more than `capacity`.
    """
    index = ids - (range_ids[0] if range_ids.size else 0)
    (outside,) = np.nonzero((index < 0) | (index >= range_ids.size))
    if not outside.size:
        return range_ids, index
    others, index[outside] = number_distinct(name, ids.take(outside), capacity - range_ids.size)
    index[outside] += range_ids.size
    return np.concatenate([range_ids, others]), index


def _tensor(values: np.ndarray, size: int | None = None, empty: float = 0) -> torch.Tensor:
    """The values [n, ...] as a tensor, padded with `empty` to [size, ...]; None: n."""
    if size is None or size == len(values):
        return torch.from_numpy(values)
    if len(values) > size:
        raise ValueError(f"{len(values)} values do not fit a tensor that is padded to {size}")
    padded = np.full((size, *values.shape[1:]), empty, dtype=values.dtype)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
