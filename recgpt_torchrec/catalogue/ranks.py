"""Ranks of target items among all items, masked and unmasked, from blocks of scores.

A rank counts from 0, in float32, and ties are shared evenly: (items scored higher) + (other items scored equal) / 2. So
a model with equal scores for all items gets the metrics of chance, whatever the order of the ids.

Two protocols, which must not be compared with each other. *Unmasked*: every item competes. *Masked*: the items of the
user's history do not compete (score -inf). A target in that history has an infinite rank then: a miss at every k.

A model has a repeat bias: what is added to the score of an item of the history when it competes (unmasked).
"""

import math

import numpy as np
import torch

from recgpt_torchrec.data.ragged import Ragged

COUNTS = 8
"""Number of counts by user, see `RankCounter`."""


def both_ranks(scores: torch.Tensor, targets: torch.Tensor, history: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked and the unmasked rank of each target among all items, in one pass over the scores.

    Args:
        scores: [users, items] float32; float16 and bfloat16 are refused, as their rounding makes ties. Not modified.
        targets: [users] int64 item ids.
        history: the items of each user that do not compete when masked, in any order, repeats allowed.

    Returns:
        [users] float32 each; inf where the target's score is -inf (masked, or not retrieved by the model).

    Raises:
        ValueError: a score is NaN, or shapes do not match.

    Example: `both_ranks(torch.tensor([[0.1, 0.9, 0.9]]), torch.tensor([2]), Ragged.from_lists([[1]]))` is
    `([0.0], [0.5])`.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [users, items], not {list(scores.shape)}")
    targets = targets.to(scores.device)
    check_ids(targets, scores.shape[1], "targets")
    if len(targets) != len(scores):
        raise ValueError(f"{len(targets)} targets for scores of {len(scores)} users")
    counter = RankCounter(targets, scores.gather(1, targets[:, None])[:, 0], history)
    counter.update(scores)
    return ranks_of(counter.counts)


class RankCounter:
    """Ranks from scores in blocks of items: for a catalogue too large for one matrix, or a sharded one.

    Blocks may come in any order and in several processes: add up `counts` over the processes (all-reduce) before
    `ranks_of`. The targets' scores must come from the same computation as the blocks', or ties are missed.

    Example:
        counter = RankCounter(targets, target_scores, history)
        for first in range(0, items, 65536):
            counter.update(queries @ item_vectors[first : first + 65536].T, first)
        masked, unmasked = ranks_of(counter.counts)
    """

    def __init__(
        self, targets: torch.Tensor, target_scores: torch.Tensor, history: Ragged, bias: torch.Tensor | None = None
    ) -> None:
        """
        Args:
            targets, history: as in `both_ranks`.
            target_scores: [users] float32, with the bias where the target is in the history.
            bias: [users] float32, added to the scores of the history's items when unmasked; None: nothing is.
        """
        device = target_scores.device
        if target_scores.shape != targets.shape or targets.ndim != 1:
            raise ValueError(
                f"targets and target_scores must both be [users], not {list(targets.shape)} and "
                f"{list(target_scores.shape)}"
            )
        _check_scores(target_scores)
        self.targets = targets.to(device)
        self.scores = target_scores
        self.bias = self.scores.new_zeros(len(targets)) if bias is None else bias.to(device)
        self.counts = torch.zeros(COUNTS, len(targets), dtype=torch.int64, device=device)
        """[8, users] int64: how many items score higher than the target without the bias, how many others equal it, and
        how many of each are in the history; whether the target is in the history, and whether its score is -inf (not
        0); how many items of the history score higher with the bias, and how many others equal it."""
        users, items = _distinct_pairs(history, len(targets), device)
        order = items.argsort()  # so that those of a block follow each other
        users, items = users[order], items[order]
        is_target = items == self.targets[users]
        self.counts[4, users[is_target]] = 1
        self.counts[5] = self.scores == -math.inf
        self.history = (users[~is_target], items[~is_target])

    def update(self, scores: torch.Tensor, first: int = 0) -> None:
        """Count one block: `scores` [users, block] float32 of the items `first`, `first + 1`, ..."""
        if scores.ndim != 2 or len(scores) != len(self.targets):
            raise ValueError(f"scores must be [{len(self.targets)}, block], not {list(scores.shape)}")
        _check_scores(scores)
        stop = first + scores.shape[1]
        bound = self.scores[:, None]
        owners, items = self.history
        begin, end = torch.searchsorted(items, torch.tensor([first, stop], device=items.device)).tolist()
        owners, items = owners[begin:end], items[begin:end] - first
        (users,) = torch.nonzero((self.targets >= first) & (self.targets < stop), as_tuple=True)
        for row, compared in enumerate((scores > bound, scores == bound)):
            # The target is excluded by its id, not by its score, which may differ in the last bit from the block's.
            compared[users, self.targets[users] - first] = False
            self.counts[row] += _count_rows(compared)
            self.counts[2 + row].index_add_(0, owners, compared[owners, items].long())
        biased, bounds = scores[owners, items] + self.bias[owners], self.scores[owners]
        self.counts[6].index_add_(0, owners, (biased > bounds).long())
        self.counts[7].index_add_(0, owners, (biased == bounds).long())


def ranks_of(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked and the unmasked ranks, [users] float32 each, of the `counts` [8, users] of all blocks."""
    unseen, seen = counts[:2] - counts[2:4], counts[6:8]
    masked, unmasked = (higher.double() + equal.double() / 2 for higher, equal in (unseen, unseen + seen))
    is_seen, unreachable = counts[4:6] > 0
    return (
        masked.masked_fill(is_seen | unreachable, math.inf).float(),
        unmasked.masked_fill(unreachable, math.inf).float(),
    )


def in_history(targets: torch.Tensor, history: Ragged) -> torch.Tensor:
    """Whether each of `targets` [users] int64, on the host, is in its user's history, [users] bool."""
    is_target = history.values == targets.numpy()[history.owners]
    found = np.bincount(history.owners[is_target], minlength=history.rows) > 0
    return torch.from_numpy(found)


def _check_scores(scores: torch.Tensor) -> None:
    if scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores are {scores.dtype}, whose rounding makes ties: rank in float32, computed in float32")
    # Any NaN makes the sum NaN, but so does inf - inf, hence the second check. One pass, no [users, items] mask.
    if torch.isnan(scores.sum()) and torch.isnan(scores).any():
        users = torch.isnan(scores).reshape(len(scores), -1).any(dim=1).sum().item()
        raise ValueError(f"scores of {users} of {len(scores)} users are NaN; the model has diverged")


def check_ids(ids: torch.Tensor, items: int, name: str) -> None:
    """Raise a ValueError where `ids` are not [n] int64 from 0 to `items` - 1."""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional int64, not {list(ids.shape)} {ids.dtype}")
    if ids.numel() and (ids.min() < 0 or ids.max() >= items):
        raise ValueError(f"{name} run from {ids.min().item()} to {ids.max().item()}, the scores have {items} items")


def _count_rows(mask: torch.Tensor) -> torch.Tensor:
    """Number of True in each row of `mask` [rows, columns], int64."""
    if mask.device.type == "cpu":  # torch sums bools by way of int64: 94 ms against 4 ms for 1,024 x 12,101
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1).astype(np.int64))
    return mask.sum(dim=1)


def _distinct_pairs(history: Ragged, users: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct pairs (user, item) of a ragged history, [pairs] each."""
    values, offsets = (torch.as_tensor(part).to(device) for part in (history.values, history.offsets))
    if offsets.shape != (users + 1,) or offsets[0] != 0 or offsets[-1] != len(values):
        raise ValueError(f"history must have offsets [{users + 1}] from 0 to {len(values)}, its offsets do not fit")
    if not len(values):
        return values, values
    if values.min() < 0:
        raise ValueError(f"history holds the item id {values.min().item()}; ids run from 0")
    owner = torch.repeat_interleave(torch.arange(users, device=device), offsets.diff())
    items = int(values.max()) + 1
    pairs = torch.unique(owner * items + values)
    return pairs // items, pairs % items
