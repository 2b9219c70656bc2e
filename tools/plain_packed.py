"""The plain loop of `plain_padded.py` with histories packed end to end, so that hardly any slot is padding.

    python -m tools.plain_packed DATASET_FOLDER --threads 1

What a careful user writes next: rows of 64 slots filled by first fit, and a block-diagonal causal mask through
`F.scaled_dot_product_attention`. Everything else, the batch's 256 users too, is as in the padded loop.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.plain_padded import (
    DIM,
    DROPOUT,
    HEADS,
    LENGTH,
    NEGATIVES,
    USERS,
    TrainingData,
    measure,
    shared_negatives_loss,
)

SLOTS = 64
"""Slots of a row."""


def pack(lengths: list[int]) -> tuple[int, list[int]]:
    """First fit: the number of rows, and the first slot of each sequence in the flattened rows.

    Example: `pack([40, 30, 24])` is `(2, [0, 64, 40])`.
    """
    room: list[int] = []
    starts = []
    for length in lengths:
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(SLOTS)
        starts.append(row * SLOTS + SLOTS - room[row])
        room[row] -= length
    return len(room), starts


class Block(nn.Module):
    """A transformer block with the norms after the residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)
        self.norm_attention, self.norm_feed = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[rows, SLOTS, DIM] -> the same; `mask` [rows, 1, SLOTS, SLOTS] is True where a token may look."""
        q, k, v = (
            part.view(*x.shape[:2], HEADS, DIM // HEADS).transpose(1, 2) for part in self.qkv(x).split(DIM, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=DROPOUT if self.training else 0.0)
        x = self.norm_attention(x + self.dropout(self.out(attended.transpose(1, 2).reshape(x.shape))))
        return self.norm_feed(x + self.dropout(self.down(F.gelu(self.up(x)))))


class PackedModel(nn.Module):
    """Item, user and position embeddings, and one block, on packed rows."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.items, self.users = nn.Embedding(items, DIM), nn.Embedding(users, DIM)
        self.positions = nn.Embedding(LENGTH, DIM)
        for table in (self.items, self.users, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.norm, self.dropout, self.block = nn.LayerNorm(DIM), nn.Dropout(DROPOUT), Block()

    def forward(self, items: Tensor, users: Tensor, positions: Tensor, sequences: Tensor) -> Tensor:
        """All [rows, SLOTS]; `sequences` numbers the histories, -1 in empty slots -> [rows, SLOTS, DIM]."""
        mask = (sequences[:, :, None] == sequences[:, None, :]).tril()[:, None]
        x = self.items(items) + self.users(users) + self.positions(positions)
        return self.block(self.dropout(self.norm(x)), mask)


class PackedLoop:
    """Trains on batches of packed histories.

    Example: `PackedLoop(TrainingData("runs/beauty/data")).run(40)`
    """

    def __init__(self, data: TrainingData, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.data, self.rng = data, np.random.default_rng(seed)
        self.model = PackedModel(data.user_count, data.item_count)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []

    def run(self, steps: int) -> int:
        """Train for some steps, at most one pass over shuffled histories; returns the number of targets."""
        order = self.rng.permutation(len(self.data.histories))
        return sum(self._step(order[start : start + USERS]) for start in range(0, len(order), USERS)[:steps])

    def _step(self, chosen: np.ndarray) -> int:
        histories = [self.data.histories[number] for number in chosen]
        lengths = [len(history) - 1 for history in histories]
        rows, starts = pack(lengths)
        first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
        positions = np.arange(sum(lengths)) - first
        slots = np.repeat(starts, lengths) + positions

        def place(values: np.ndarray, empty: int = 0) -> Tensor:
            grid = np.full(rows * SLOTS, empty)
            grid[slots] = values
            return torch.from_numpy(grid.reshape(rows, SLOTS))

        negatives = self.rng.choice(self.data.item_count, min(NEGATIVES, self.data.item_count), replace=False)
        targets = torch.from_numpy(np.concatenate([history[1:] for history in histories]))
        hidden = self.model(
            place(np.concatenate([history[:-1] for history in histories])),
            place(np.repeat(self.data.users[chosen], lengths)),
            place(positions),
            place(np.repeat(np.arange(len(histories)), lengths), -1),
        )
        outputs = hidden.flatten(0, 1)[torch.from_numpy(slots)]
        loss = shared_negatives_loss(outputs, targets, torch.from_numpy(negatives), self.model.items)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        return len(targets)


if __name__ == "__main__":
    measure(PackedLoop, "Trains on packed histories in plain PyTorch, and prints targets per second.")
