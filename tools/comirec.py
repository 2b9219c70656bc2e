"""ComiRec (Cen et al. 2020, arXiv 2005.09347) in plain PyTorch, trained within its minutes.

For `tools/compare_recbole.py`, as RecBole has no ComiRec:

    python tools/comirec.py JOB.json

JOB.json is a `tools.budgeted.Job`. Several interests per user, by self-attention (SA) or dynamic routing (DR); an
item's score is the largest inner product with an interest, which is what controllable aggregation gives with
lambda = 0. As published: 64 dimensions, 4 interests, Adam 1e-3, batches of 256 users with a random target each, sampled
softmax with 10 log-uniform negatives per target (https://github.com/THUDM/ComiRec, its settings for histories of 50).
Other than there, a target needs one item before it instead of four, since histories are shorter here.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recgpt_torchrec.data.ragged import Ragged  # noqa: E402
from tools import budgeted  # noqa: E402

SETTINGS: dict[str, Any] = {
    "dim": 64,
    "length": 50,
    "interests": 4,
    "batch_users": 256,
    "negatives": 10,
    "learning_rate": 0.001,
}
MODELS = {"ComiRec-SA": "SA", "ComiRec-DR": "DR"}
ROUTING_STEPS = 3
USERS = 256
"""Scored at once."""


def main() -> None:
    """Train, measure, and write the result."""
    job = budgeted.Job.read(sys.argv[1])
    torch.manual_seed(job.seed)
    settings = SETTINGS | job.options
    training = budgeted.read_part(job.log, "training")
    counts = np.bincount(training.history.values, minlength=job.items)
    shape = {name: settings[name] for name in ("dim", "length", "interests")}
    model = ComiRec(job.items, routing=MODELS[job.model], **shape)
    batches = TargetDraws(training.history, settings["batch_users"], settings["length"], job.seed)
    negatives = LogUniform(counts, settings["negatives"] * settings["batch_users"])
    optimizer = torch.optim.Adam(model.parameters(), settings["learning_rate"])
    budget = budgeted.Budget(job, batches.per_epoch)

    def train_epoch(epoch: int) -> None:
        model.train()
        for _ in range(batches.per_epoch):
            history, lengths, targets = batches.draw()
            budget.tick(len(targets))
            optimizer.zero_grad()
            interests = model(history, lengths)
            sampled_softmax(model, interests, targets, *negatives.draw()).backward()
            optimizer.step()

    def score(split: str) -> budgeted.Scored:
        part = budgeted.read_part(job.log, split)
        model.eval()
        for start in range(0, part.users.size, USERS):
            rows = np.arange(start, min(start + USERS, part.users.size))
            yield part.users[rows], model.score(*pad(part.history.take(rows), settings["length"]))

    result = budgeted.train(budget, model, train_epoch, score)
    budgeted.write_result(job, budget, model, result | {"options": settings})


class ComiRec(nn.Module):
    """Interests of users by self-attention or dynamic routing.

    Example: `ComiRec(100, routing="DR").score(torch.tensor([[5, 6, 0]]), torch.tensor([2]))` is [1, 100].
    """

    def __init__(self, items: int, *, routing: str, dim: int = 64, length: int = 50, interests: int = 4) -> None:
        """`length`: of the longest history; `routing`: "SA" or "DR"."""
        super().__init__()
        self.routing, self.interests, self.length = routing, interests, length
        self.items = nn.Parameter(nn.init.xavier_uniform_(torch.empty(items, dim)))
        if routing == "SA":
            self.positions = nn.Parameter(nn.init.xavier_uniform_(torch.empty(length, dim)))
            self.hidden = nn.Linear(dim, 4 * dim)
            self.heads = nn.Linear(4 * dim, interests)
            for layer in (self.hidden, self.heads):  # as TensorFlow's dense layers begin
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        else:
            self.bilinear = nn.Parameter(torch.randn(length, interests, dim, dim))

    def forward(self, history: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The interests of users.

        Args:
            history: [users, n] int64, the oldest item first, filled up at the end with any item; n at most `length`.
            lengths: [users] int64, at least 1.

        Returns:
            [users, interests, dim].
        """
        filled = torch.arange(history.shape[1]) < lengths[:, None]
        embedded = nn.functional.embedding(history, self.items) * filled[..., None]
        return self.attend(embedded, filled) if self.routing == "SA" else self.route(embedded, filled)

    def attend(self, embedded: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """Self-attentive extraction (section 3.2): each interest is a mean of the history's items."""
        scores = self.heads(torch.tanh(self.hidden(embedded + self.positions[: embedded.shape[1]])))
        weights = scores.masked_fill(~filled[..., None], -math.inf).softmax(dim=1)
        return weights.transpose(1, 2) @ embedded

    def route(self, embedded: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
        """Dynamic routing (section 3.2, algorithm 1): an interest is a capsule; gradients pass its last step alone."""
        votes = torch.einsum("und,nked->ukne", embedded, self.bilinear[: embedded.shape[1]])
        logits = votes.new_zeros(votes.shape[:3])
        for step in range(ROUTING_STEPS):
            last = step == ROUTING_STEPS - 1
            weights = logits.softmax(dim=1) * filled[:, None]  # an item divides itself among the interests
            capsules = squash((weights[:, :, None] @ (votes if last else votes.detach())).squeeze(2))
            if not last:
                logits = logits + (votes.detach() @ capsules[..., None]).squeeze(3)
        return capsules

    @torch.no_grad()
    def score(self, history: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[users, items] float32: each item's largest inner product with an interest. Args as in `forward`."""
        interests = self(history, lengths)
        scores = interests[:, 0] @ self.items.T
        for each in range(1, self.interests):
            torch.maximum(scores, interests[:, each] @ self.items.T, out=scores)
        return scores


def squash(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., dim] with lengths n made n^2 / (1 + n^2)."""
    norm = vectors.square().sum(-1, keepdim=True)
    return vectors * norm / (1 + norm) / (norm + 1e-9).sqrt()


def sampled_softmax(
    model: ComiRec, interests: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor, expected: torch.Tensor
) -> torch.Tensor:
    """Mean softmax loss of the targets against negatives, for the interest nearest to each target.

    Args:
        interests: [users, interests, dim].
        targets: [users] int64.
        negatives: [n] int64, distinct, for all users; one that is a user's target does not compete there.
        expected: [items] float32 expected counts of each item among the negatives, by which scores are corrected.
    """
    own = model.items[targets]
    of_interests = (interests @ own[:, :, None]).squeeze(2)
    chosen = of_interests.argmax(dim=1)
    interest = interests[torch.arange(len(targets)), chosen]
    # TensorFlow corrects the target's score too.
    target_scores = (interest * own).sum(1) - expected[targets].log()
    scores = interest @ model.items[negatives].T - expected[negatives].log()
    scores = scores.masked_fill(negatives == targets[:, None], -math.inf)
    return nn.functional.cross_entropy(
        torch.cat([target_scores[:, None], scores], dim=1), torch.zeros(len(targets), dtype=torch.int64)
    )


class LogUniform:
    """Draws distinct negatives, more of the popular ones: P(rank) = log((rank + 2) / (rank + 1)) / log(items + 1)."""

    def __init__(self, counts: np.ndarray, draws: int) -> None:
        """`counts` [items] in training, which order the items; those without any are not drawn."""
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        ranks = np.arange(order.size)
        probability = np.log((ranks + 2) / (ranks + 1)) / math.log(order.size + 1)
        self.order, self.cumulated, self.draws = torch.from_numpy(order), torch.from_numpy(probability).cumsum(0), draws
        expected = torch.zeros(counts.size, dtype=torch.float64)
        expected[self.order] = -torch.expm1(draws * torch.log1p(-torch.from_numpy(probability)))
        self.expected = expected.float()
        """[items] float32: probability that an item is among the negatives."""

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct items of `draws` draws, and `expected`."""
        places = torch.searchsorted(self.cumulated, torch.rand(self.draws, dtype=torch.float64), right=True)
        return self.order[places.clamp_(max=self.order.numel() - 1).unique()], self.expected


class TargetDraws:
    """Draws batches of users, with a random target of each and the history before it."""

    def __init__(self, histories: Ragged, users: int, length: int, seed: int) -> None:
        self.length, self.random = length, np.random.default_rng(seed)
        lengths = np.diff(histories.offsets)
        self.starts, self.lengths = histories.offsets[:-1][lengths > 1], lengths[lengths > 1]
        self.values, self.users = histories.values, min(users, self.lengths.size)
        self.per_epoch = max(1, math.ceil((self.lengths - 1).sum() / max(self.users, 1)))
        """Batches that hold as many targets as there are."""

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """History [users, length] and lengths [users] as `ComiRec.forward` takes them, and targets [users]."""
        rows = self.random.choice(self.lengths.size, self.users, replace=False)
        places = self.random.integers(1, self.lengths[rows])
        stops = self.starts[rows] + places
        starts = np.maximum(self.starts[rows], stops - self.length)
        pieces = [self.values[start:stop] for start, stop in zip(starts, stops, strict=True)]
        before = Ragged.from_lengths(np.concatenate(pieces), stops - starts)
        return *pad(before, self.length), torch.from_numpy(self.values[stops])


def pad(histories: Ragged, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The newest `length` items of each history as [users, n] int64, filled up with 0, and the lengths [users]."""
    starts, stops = np.maximum(histories.offsets[:-1], histories.offsets[1:] - length), histories.offsets[1:]
    lengths = stops - starts
    grid = np.zeros((lengths.size, lengths.max(initial=1)), np.int64)
    places = starts[:, None] + np.arange(grid.shape[1])
    filled = places < stops[:, None]
    grid[filled] = histories.values[places[filled]]
    return torch.from_numpy(grid), torch.from_numpy(lengths)


if __name__ == "__main__":
    main()
