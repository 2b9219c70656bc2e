"""How steps are computed: what auto chooses on each machine, and what is refused; torch.cuda is replaced."""

import importlib.util
import json
import shutil
from typing import Any

import pytest
import torch

from recgpt_torchrec.checkpoints.folder import METADATA
from recgpt_torchrec.config import Loss, Model, Train
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training import execution
from recgpt_torchrec.training.execution import Execution
from tools.ranks import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NO_DROPOUT = Model(attention_dropout=0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that says what the machine is; by default a GPU like an H100 with Triton, a CPU without bf16."""

    def be(
        *,
        bf16: bool = True,
        capability: tuple[int, int] = (9, 0),
        triton: bool = True,
        varlen: bool = True,
        flags: set[str] = frozenset({"avx2"}),  # type: ignore[assignment]
        speedup: float = 0.0,
    ) -> None:
        lacking = {"triton": not triton, "torch.nn.attention.varlen": not varlen}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacking[name] else name)
        monkeypatch.setattr(execution, "supports_bf16", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X1")
        monkeypatch.setattr(
            execution, "prefers_fused", lambda dim, n, device, precision: precision == "bf16" and dim < 200
        )
        monkeypatch.setattr(execution, "cpu_flags", lambda: set(flags))
        monkeypatch.setattr(execution, "measure_bf16_speedup", lambda: speedup)

    be()
    return be


def choose(device: torch.device, model: Model = NO_DROPOUT, **train: Any) -> Execution:
    return Execution.choose(Train(**train), model, Loss(), device)


def test_auto_on_a_gpu_is_everything_that_it_can_do(machine: Any) -> None:
    assert choose(CUDA) == Execution("cuda", "bf16", "varlen", True, False)
    assert str(choose(CUDA)) == "bf16 (auto: NVIDIA X1 has it), varlen attention, fused loss"
    with_dropout = choose(CUDA, Model(attention_dropout=0.5))
    assert with_dropout == Execution("cuda", "bf16", "dense", True)
    assert "dense attention (auto: varlen has no dropout, and it is 0.5)" in str(with_dropout)
    assert choose(CUDA, precision="fp32").attention == choose(CUDA, precision="tf32").attention == "dense"
    assert choose(CUDA, Model(dim=12, heads=3, attention_dropout=0)).attention == "dense"  # heads of 4
    assert not choose(CUDA, Model(dim=256, attention_dropout=0)).fused_loss  # chunks are faster
    assert choose(CUDA, Model(dim=256, attention_dropout=0), fused_loss=True).fused_loss
    assert not Execution.choose(Train(), Model(), Loss(candidates="bce"), CUDA).fused_loss
    machine(varlen=False, triton=False)
    assert choose(CUDA) == Execution("cuda", "bf16", "dense", False)
    machine(bf16=False, capability=(7, 0))
    assert choose(CUDA) == Execution("cuda", "fp32", "dense", False)


def test_on_several_ranks_the_fused_loss_is_for_negatives_that_all_have(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "world_size", lambda: 2)
    assert choose(CUDA).fused_loss
    for loss in (Loss(candidates="all"), Loss(candidates="in_batch"), Loss(negatives_across_ranks="different")):
        assert not Execution.choose(Train(), NO_DROPOUT, loss, CUDA).fused_loss
        with pytest.raises(InputError, match=f"candidates {loss.candidates} those of all 2 ranks count; give --train"):
            Execution.choose(Train(fused_loss=True), NO_DROPOUT, loss, CUDA)


def test_what_is_given_is_taken(machine: Any) -> None:
    given = choose(CUDA, precision="fp32", attention="dense", fused_loss=False, compile=True)
    assert given == Execution("cuda", "fp32", "dense", False, True)
    assert str(given) == "fp32, dense attention, chunked loss, compiled"
    assert choose(CPU, precision="bf16").precision == "bf16"  # slow on this CPU, but the user's choice


@pytest.mark.parametrize(
    ("flags", "speedup", "precision", "why"),
    [
        ({"avx2", "avx512f"}, 9.0, "fp32", "the CPU has neither AVX512-BF16 nor AMX"),
        ({"avx512_bf16"}, 1.3, "bf16", "with avx512_bf16 bf16 is 1.3 times as fast as fp32"),
        ({"avx512_bf16", "amx_bf16"}, 1.29, "fp32", "with amx_bf16 bf16 is 1.3 times as fast as fp32"),
        ({"amx_bf16"}, 4.0, "bf16", "with amx_bf16 bf16 is 4.0 times as fast as fp32"),
    ],
)
def test_auto_on_a_cpu_measures_only_where_its_flags_promise_something(
    machine: Any, flags: set[str], speedup: float, precision: Any, why: str
) -> None:
    machine(flags=flags, speedup=speedup)
    chosen = choose(CPU, Model())
    assert chosen == Execution("cpu", precision) and chosen.precision_reason == why


def test_this_cpu_has_flags_and_its_speedup_is_a_number() -> None:
    assert "avx2" in execution.cpu_flags() or "fpu" in execution.cpu_flags() or not execution.cpu_flags()
    assert 0 < execution.measure_bf16_speedup() < 1000


@pytest.mark.parametrize(
    ("device", "train", "model", "message"),
    [
        (CPU, {"attention": "varlen"}, NO_DROPOUT, "--train.attention varlen needs CUDA"),
        (CUDA, {"attention": "varlen", "precision": "fp32"}, NO_DROPOUT, "needs bf16, .*--train.precision bf16"),
        (CUDA, {"attention": "varlen"}, Model(), "has no dropout, and it is 0.5; give --model.attention_dropout 0"),
        (CUDA, {"attention": "varlen"}, Model(dim=12, heads=3, attention_dropout=0), "dim / heads is 4"),
        (
            CUDA,
            {"fused_loss": True},
            Model(dim=1024, attention_dropout=0),
            "takes --model.dim up to 512, and it is 1024",
        ),
        (CPU, {"fused_loss": True}, NO_DROPOUT, "--train.fused_loss true needs CUDA"),
        (CPU, {"precision": "tf32"}, NO_DROPOUT, "--train.precision tf32 needs CUDA"),
    ],
)
def test_what_cannot_be_is_refused(
    machine: Any, device: torch.device, train: dict[str, Any], model: Model, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        choose(device, model, **train)


def test_what_an_old_gpu_or_a_bare_installation_cannot_do_is_refused(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(bf16=False, capability=(7, 5), triton=False, varlen=False)
    for train, message in (
        ({"precision": "bf16"}, "NVIDIA X1 has no bfloat16"),
        ({"precision": "tf32"}, "NVIDIA X1 has no TF32"),
        ({"fused_loss": True}, "needs Triton, which is not installed"),
        ({"compile": True}, "--train.compile true needs Triton"),
    ):
        with pytest.raises(InputError, match=message):
            choose(CUDA, **train)
    machine(varlen=False)
    with pytest.raises(InputError, match="needs a newer PyTorch"):
        choose(CUDA, attention="varlen")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "some-compiler")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler, and some-compiler is not found"):
        choose(CPU, compile=True)


@pytest.mark.parametrize("before", [False, True])
def test_settings_of_the_process_hold_within_training_alone(before: bool) -> None:
    matmul = torch.backends.cuda.matmul
    at_first, matmul.allow_tf32 = matmul.allow_tf32, before
    for chosen, within in (
        (Execution("cuda", "fp32"), False),
        (Execution("cuda", "tf32"), True),
        (Execution("cuda", "bf16"), True),
        (Execution("cpu", "fp32"), False),
    ):
        with pytest.raises(KeyError), chosen.applied():  # an error in training restores them as well
            assert matmul.allow_tf32 is within
            raise KeyError
        assert matmul.allow_tf32 is before
    matmul.allow_tf32 = at_first


def test_a_resumed_run_keeps_what_was_measured_when_it_began(machine: Any, tmp_path: Any) -> None:
    machine(flags={"avx512_bf16"}, speedup=8.7)
    assert Execution.choose(Train(), NO_DROPOUT, Loss(), CPU, str(tmp_path)).precision == "bf16"
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / METADATA).write_text(json.dumps({"environment": {"cpu_precision": "bf16"}}))
    machine(flags={"avx512_bf16"}, speedup=1.1)
    resumed = Execution.choose(Train(), NO_DROPOUT, Loss(), CPU, str(tmp_path))
    assert (resumed.precision, resumed.precision_reason) == ("bf16", "as the run began")
    assert Execution.choose(Train(), NO_DROPOUT, Loss(), CPU, str(tmp_path / "new")).precision == "fp32"
    next_day = Execution.choose(Train(), NO_DROPOUT, Loss(), CPU, str(tmp_path / "new"), str(checkpoint))
    assert (next_day.precision, next_day.precision_reason) == ("bf16", "as the day before")


def choose_on_a_rank(rank: int, world_size: int) -> tuple[str, str]:
    execution.cpu_flags = lambda: {"amx_bf16"} if rank == 0 else set()
    execution.measure_bf16_speedup = lambda: 2.0 if rank == 0 else 0.1
    chosen = Execution.choose(Train(), Model(), Loss(), CPU)
    return chosen.precision, chosen.precision_reason


def test_all_ranks_take_the_first_ones_measurement() -> None:
    assert run_ranks(choose_on_a_rank, 2) == [("bf16", "with amx_bf16 bf16 is 2.0 times as fast as fp32")] * 2
