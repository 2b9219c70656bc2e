"""Next-item training as a user writes it in plain PyTorch: padded histories, nn.Embedding, dense Adam.

    python -m tools.plain_padded DATASET_FOLDER --threads 1

The model is that of configs/beauty.yaml as far as a plain loop has it: width, length, one block, dropout, user vectors;
the loss has 3,000 shared negatives. Needs torch, numpy and pyarrow only, so that nothing of this project speeds it
up. Prints targets per second as JSON lines.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM = 64
HEADS = 2
LENGTH = 50
"""Maximum number of tokens of a history."""
DROPOUT = 0.5
NEGATIVES = 3000
"""Negatives of a batch, shared by its targets."""
USERS = 256
"""Histories in a batch."""


class TrainingData:
    """The training part of a dataset: of each user all but the last two items, and of these the newest."""

    def __init__(self, folder: str) -> None:
        table = pq.read_table(Path(folder) / "sequences", columns=["user_id", "item_ids"])
        users, lists = table["user_id"].to_numpy(), table["item_ids"].combine_chunks()
        values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        self.user_count, self.item_count = int(users.max()) + 1, int(values.max()) + 1
        ends = zip(offsets[:-1], offsets[1:], strict=True)
        histories = [values[start : max(start, stop - 2)][-(LENGTH + 1) :] for start, stop in ends]
        trained = [number for number, history in enumerate(histories) if len(history) > 1]
        self.histories: list[np.ndarray] = [histories[number] for number in trained]
        """Item ids of each user, oldest first, at least two."""
        self.users: np.ndarray = users[trained]
        """[histories] user ids."""


class Block(nn.Module):
    """A transformer block with the norms after the residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, dropout=DROPOUT, batch_first=True)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.norm_attention, self.norm_feed = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[users, LENGTH, DIM] -> the same; `mask` [LENGTH, LENGTH] is True where a token may not look."""
        attended, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        x = self.norm_attention(x + self.dropout(attended))
        return self.norm_feed(x + self.dropout(self.down(F.gelu(self.up(x)))))


class PaddedModel(nn.Module):
    """Item, user and position embeddings, and one block."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, DIM, padding_idx=items)
        self.users, self.positions = nn.Embedding(users, DIM), nn.Embedding(LENGTH, DIM)
        for table in (self.items, self.users, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.norm, self.dropout, self.block = nn.LayerNorm(DIM), nn.Dropout(DROPOUT), Block()
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        """[users, LENGTH] item ids, padded at the end, and [users] user ids -> [users, LENGTH, DIM]."""
        x = self.items(items) + self.users(users)[:, None] + self.positions.weight
        return self.block(self.dropout(self.norm(x)), self.mask)


def shared_negatives_loss(h: Tensor, targets: Tensor, negatives: Tensor, table: nn.Embedding) -> Tensor:
    """Mean cross-entropy of each target among itself and the shared negatives, [].

    Args:
        h: [targets, DIM] outputs.
        targets: [targets] item ids.
        negatives: [negatives] item ids.
        table: the item embeddings.
    """
    positive = (h * table(targets)).sum(1, keepdim=True)
    scores = (h @ table(negatives).t()).masked_fill(negatives == targets[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([positive, scores], 1), torch.zeros_like(targets))


class PaddedLoop:
    """Trains on batches of padded histories.

    Example: `PaddedLoop(TrainingData("runs/beauty/data")).run(40)`
    """

    def __init__(self, data: TrainingData, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.data, self.rng = data, np.random.default_rng(seed)
        self.model = PaddedModel(data.user_count, data.item_count)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []

    def run(self, steps: int) -> int:
        """Train for some steps, at most one pass over shuffled histories; returns the number of targets."""
        order = self.rng.permutation(len(self.data.histories))
        return sum(self._step(order[start : start + USERS]) for start in range(0, len(order), USERS)[:steps])

    def _step(self, chosen: np.ndarray) -> int:
        inputs = np.full((len(chosen), LENGTH), self.data.item_count)
        targets = np.full((len(chosen), LENGTH), -1)
        for row, number in enumerate(chosen):
            history = self.data.histories[number]
            inputs[row, : len(history) - 1], targets[row, : len(history) - 1] = history[:-1], history[1:]
        negatives = self.rng.choice(self.data.item_count, min(NEGATIVES, self.data.item_count), replace=False)
        wanted = torch.from_numpy(targets)
        is_target = wanted >= 0
        hidden = self.model(torch.from_numpy(inputs), torch.from_numpy(self.data.users[chosen]))
        loss = shared_negatives_loss(
            hidden[is_target], wanted[is_target], torch.from_numpy(negatives), self.model.items
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return int(is_target.sum())


def measure(make_loop: type, description: str, arguments: list[str] | None = None) -> None:
    """Run a loop as a program: warm up, then print targets/s of some steps, several times."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", help="folder of the dataset")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loop = make_loop(TrainingData(options.data))
    loop.run(5)
    for _ in range(options.rounds):
        since = time.perf_counter()
        targets = loop.run(options.steps)
        rate = targets / (time.perf_counter() - since)
        print(
            json.dumps({"loop": make_loop.__name__, "targets_s": round(rate), "threads": options.threads}), flush=True
        )


if __name__ == "__main__":
    measure(PaddedLoop, "Trains on padded histories in plain PyTorch, and prints targets per second.")
