"""A run with the settings of the paper and its authors' code is a plain loop: table by table, weight by weight."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from recgpt_torchrec import cli
from recgpt_torchrec.config import Pretrain
from tests.distributed.training_helpers import STEPS, Case, Trained, make_batches, train
from tests.support import items_of
from tools.ranks import run_ranks

DIM, HEADS, RATE, BETAS = 8, 2, 0.01, (0.9, 0.999)


class PaperCase(Case):
    """`configs/original.yaml`, small, without dropout and at a higher rate."""

    @property
    def config(self) -> Pretrain:
        file = Path(__file__).parents[2] / "configs/original.yaml"
        given = cli.parse(Pretrain, "pretrain", ["--config", str(file), "--data", "", "--output", ""])
        tables = replace(given.tables, lr=RATE, user_lr=RATE, init_std=0.5, user_init_std=0.5)
        return replace(
            super().config,
            model=replace(given.model, dim=DIM, max_len=8, dropout=0),
            loss=given.loss,
            tables=tables,
            optimizer=replace(given.optimizer, lr=RATE),
        )


CASE = PaperCase("data_parallel", "adam", "bce")


def plain_block(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """One decoder block on a single sequence [length, dim], head by head."""

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]

    def norm(name: str, values: Tensor) -> Tensor:
        centred = values - values.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    q, k, v = linear("qkv", x).chunk(3, -1)
    heads = []
    for head in range(HEADS):
        part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        scores = q[:, part] @ k[:, part].t() / math.sqrt(DIM)
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    x = norm("norm_attention", x + linear("out", torch.cat(heads, -1)))
    return norm("norm_feed", x + linear("down", linear("up", x).clamp(min=0)))


def train_plainly(start: Trained) -> tuple[dict[str, Tensor], list[float]]:
    """The tables and weights after the same batches, and the loss of each."""
    weights = {
        name: value.clone().requires_grad_() for name, value in {**start.tables_before, **start.dense_before}.items()
    }
    block = {name.removeprefix("decoder.blocks.0."): value for name, value in weights.items() if "blocks.0." in name}
    adam = torch.optim.Adam(weights.values(), lr=RATE, betas=BETAS)
    losses = []
    for batch in make_batches(CASE, 0, 1):
        negatives = items_of(batch)[batch.candidate_bag].tolist()
        total, targets = torch.zeros(()), 0
        histories = batch.histories
        each = torch.from_numpy(histories.items).split(histories.lengths.tolist())
        for user, items in zip(histories.users.tolist(), each, strict=True):
            if len(items) < 2:
                continue
            h = weights["item"][items[:-1]] + weights["user"][user]
            h = plain_block(h + weights["decoder.position.weight"][: len(items) - 1], block)
            for output, target in zip(h, items[1:].tolist(), strict=True):
                total = total - F.logsigmoid(output @ weights["item"][target])
                negative = negatives[targets % len(negatives)]
                if negative != target:
                    total = total - F.logsigmoid(-(output @ weights["item"][negative]))
                targets += 1
        loss = total / targets
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {name: value.detach() for name, value in weights.items()}, losses


def test_a_run_with_the_papers_settings_is_a_plain_loop() -> None:
    (ours,) = run_ranks(train_on_one_rank, 1)
    assert set(ours.tables_before) == {"user", "item"}
    assert 0.3 < ours.tables_before["user"].std() < 0.7
    assert not [name for name in ours.dense_before if "norm_in" in name or "mean" in name or "forgetting" in name]
    wanted, losses = train_plainly(ours)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(losses), rtol=2e-5, atol=0)
    for name, value in {**ours.tables, **ours.dense}.items():
        before = {**ours.tables_before, **ours.dense_before}[name]
        assert (value - before).abs().max() > 2 * RATE, name
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-4, msg=name)


def train_on_one_rank(rank: int, world_size: int) -> Trained:
    return train(CASE, rank, world_size)
