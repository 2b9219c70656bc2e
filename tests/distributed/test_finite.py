"""Non-finite steps change no parameter, and are listed with their rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recgpt_torchrec.errors import InputError
from tests.distributed.fault_helpers import GROUPS, ROWS, free_port, train, write_data
from tools import kill_test
from tools.ranks import run_ranks


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path / "data")


def copy_local_parts(model: Any) -> dict[str, torch.Tensor]:
    """Copy this rank's part of every parameter."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        parts = [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        state |= {f"{name}.{number}": part.detach().clone() for number, part in enumerate(parts)}
    return state


def train_with_overflows(
    rank: int, world_size: int, port: int, data: str, output: str, on_host: bool, options: dict[str, Any]
) -> Any:
    """Rank 1's loss overflows in the sixth step, and its gradients alone in the ninth.

    Without `on_host` flags are read as on CUDA: where a loss is logged or a checkpoint is written.
    """
    from recgpt_torchrec.model import waiting
    from recgpt_torchrec.model.dense import Dense
    from recgpt_torchrec.training.trainer import Trainer

    loss_of, count_step = Dense.sum_of_losses, Trainer._count
    calls = iter(range(1, 10_000))
    seen: dict[str, Any] = {"unchanged": [], "users": [], "before": None}

    def loss(self: Dense, h: torch.Tensor, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if not self.training:
            return loss_of(self, h, outputs, batch)
        number = next(calls)
        if rank == 1 and number in (6, 9):
            seen["users"].append(sorted(set(batch.histories.users.tolist())))
        if rank == 1 and number == 9:
            h.register_hook(lambda gradient: gradient * float("inf"))
        return loss_of(self, h, outputs, batch) * (float("inf") if rank == 1 and number == 6 else 1.0)

    def check(self: Trainer, *step: Any) -> None:  # right after each step
        now = copy_local_parts(self.model)
        if self.guard.bad:
            seen["unchanged"].append(all(torch.equal(value, seen["before"][name]) for name, value in now.items()))
        elif seen["before"] is not None:
            assert not all(torch.equal(value, seen["before"][name]) for name, value in now.items())
        seen["before"] = now
        count_step(self, *step)

    if not on_host:
        waiting.WITHOUT_WAITING = ()  # type: ignore[assignment]
    Dense.sum_of_losses = loss  # type: ignore[method-assign]
    Trainer._count = check  # type: ignore[method-assign, assignment]
    try:
        train(rank, port, data, output, **options)
    except InputError as error:
        seen["error"] = str(error)
    return {name: value for name, value in seen.items() if name != "before"}


def users_at(lines: list[dict[str, Any]]) -> list[list[int]]:
    """The users that stand in the rows of each line: the test's dataset has them in order."""

    def first(place: dict[str, Any]) -> int:
        part = int("".join(filter(str.isdigit, Path(place["file"]).stem)))
        return (part * GROUPS + place["row_group"]) * ROWS

    return [sorted(first(place) + row for place in line["rows"] for row in place["rows"]) for line in lines]


@pytest.mark.parametrize("on_host", [True, False])
def test_non_finite_steps_change_no_parameter_and_are_listed_with_their_rows(tmp_path, data, on_host):
    output = tmp_path / "run"
    options = {"non_finite": "skip", "non_finite_limit": 1}
    seen = run_ranks(train_with_overflows, 2, free_port(), data, str(output), on_host, options)
    lines = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rank"], line["not_finite"][0]) for line in lines] == [
        (6, 1, "the loss"),
        (9, 1, "a gradient of the tables' rows"),
    ]
    assert lines[0]["loss"] == "inf" and lines[1]["loss"] is None
    assert users_at(lines) == seen[1]["users"]
    for one in seen:
        assert one["unchanged"] == [True, True]
        assert "step 9: not finite: a gradient of the tables' rows" in one["error"] and "on rank 1" in one["error"]
        assert "row group" in one["error"] and "step-00000008 is complete" in one["error"]
    progress = json.loads((output / "checkpoints/step-00000008/checkpoint.json").read_text())["progress"]
    assert math.isfinite(progress["loss"]) and progress["skipped"] == 1
    saved = kill_test.read_tensors(output).values()
    assert all(torch.isfinite(value).all() for value in saved if value.is_floating_point())


@pytest.mark.parametrize("on_host", [True, False])
def test_by_default_the_first_non_finite_step_ends_the_run(tmp_path, data, on_host):
    options = {"sharding": "data_parallel"}
    seen = run_ranks(train_with_overflows, 2, free_port(), data, str(tmp_path / "run"), on_host, options)
    for one in seen:
        # Where flags are read later, at the checkpoint after step 8, the steps up to there change nothing either.
        assert one["unchanged"] == [True] * (1 if on_host else 3)
        assert "step 6: not finite: the loss" in one["error"] and "--train.non_finite skip" in one["error"]
