"""What the GPU check measures: the presets of configs/, and random batches of their sizes. Needs torch alone.

The dense part of the model is given random vectors in place of rows that tables look up.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.candidates import Candidates
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity, FixedShape, PackedBatch, pack_histories
from recgpt_torchrec.model.flops import Flops, attended_pairs, step_flops
from recgpt_torchrec.training.execution import Execution

CONFIGS = Path(__file__).parents[2] / "configs"
ITEMS = 1_000_000
"""Catalogue that histories and candidates are drawn from."""


@dataclass(frozen=True)
class Preset:
    """A model and the size of its batches."""

    name: str
    model: Model
    loss: Loss
    tokens: int
    """Tokens per batch."""
    items: int = ITEMS

    @classmethod
    def load(cls, name: str) -> "Preset":
        """Read a preset from configs/NAME.yaml."""
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        return cls(name, Model(**values["model"]), Loss(**values["loss"]), values["batch"]["tokens"])

    def toy(self) -> "Preset":
        """The same at a size that a CPU computes in no time; heads stay of a width that flash attention takes.

        One block and no dropout, so that all toys are one model: a compiler for the CPU takes half a minute for it, and
        keeps what it made.
        """
        model = replace(self.model, dim=32, heads=2, layers=1, max_len=20)
        toy = replace(self, model=model, loss=replace(self.loss, negatives=64), tokens=256, items=5000)
        return toy.small(256)

    def small(self, tokens: int) -> "Preset":
        """The same without dropout and with fewer tokens: for comparing ways of computing it."""
        model = replace(self.model, dropout=0.0, attention_dropout=0.0, user_dropout=0.0)
        loss = replace(self.loss, negatives=min(self.loss.negatives, 2 * tokens))
        return replace(self, model=model, loss=loss, tokens=min(tokens, self.tokens))

    @property
    def capacity(self) -> Capacity:
        """Bags of a batch."""
        return Capacity(self.max_sequences, self.tokens + self.max_sequences + self.loss.negatives)

    @property
    def max_sequences(self) -> int:
        """Maximum number of sequences in a batch."""
        return max(1, self.tokens // 4)


@dataclass
class Inputs:
    """A batch, and the vectors that its bags stand for."""

    batch: PackedBatch
    users: torch.Tensor
    """[user bags, dim] float32."""
    items: torch.Tensor
    """[item bags, dim] float32."""
    flops: Flops
    """Operations of a training step on it."""


def make_inputs(preset: Preset, execution: Execution, device: torch.device, seed: int = 0) -> Inputs:
    """Draw a batch, the same for the same seed however it is laid out.

    Histories have between a tenth of and the whole maximum length, all lengths equally likely.
    """
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (room := preset.tokens - sum(lengths)) > 0:
        lengths.append(min(room, int(rng.integers(max(1, preset.model.max_len // 10), preset.model.max_len + 1))))
    lengths = lengths[: preset.max_sequences]
    entries = np.array(lengths) + 1
    histories = Histories(
        users=np.arange(len(lengths)),
        items=rng.integers(0, preset.items, entries.sum()),
        offsets=np.concatenate([[0], np.cumsum(entries)]),
    )
    count = min(preset.loss.negatives, preset.items)
    log_q = np.full(count, np.log(count / preset.items), dtype=np.float32)
    candidates = Candidates(rng.choice(preset.items, count, replace=False), log_q)
    is_row = execution.attention == "varlen"
    # Attention on a grid would need a mask of all pairs of slots in a single row.
    fixed = FixedShape(preset.tokens, preset.max_sequences, count) if is_row and execution.compile else None
    batch, _ = pack_histories(
        histories,
        row_length=preset.model.max_len if is_row else max(64, preset.model.max_len),
        capacity=preset.capacity,
        predict=True,
        max_position=preset.model.max_len - 1,
        draw=lambda targets: candidates,
        layout="row" if is_row else "grid",
        pad=fixed,
    )
    flops = step_flops(
        preset.model,
        preset.loss,
        tokens=sum(lengths),
        targets=batch.targets,
        candidates=count,
        attended=attended_pairs(lengths),
    )
    generator = torch.Generator().manual_seed(seed)
    users, items = (
        torch.randn(size, preset.model.dim, generator=generator).mul_(0.1).to(device)
        for size in (preset.capacity.users, preset.capacity.items)
    )
    return Inputs(batch.to(device), users, items, flops)
