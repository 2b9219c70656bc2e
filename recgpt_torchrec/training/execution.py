"""How the steps of a run are computed: device, precision, attention, loss, compilation. Needs torch alone.

`Execution.choose` resolves every `auto` and refuses what the machine or the model cannot do. What is chosen changes how
fast a step is, and the result only by rounding.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from recgpt_torchrec.config import Loss, Model, Train
from recgpt_torchrec.distributed.processes import run_on_first_rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.dense import Compute
from recgpt_torchrec.model.losses.fused_loss import MAX_DIM, prefers_fused
from recgpt_torchrec.model.peaks import Precision, measured_peak

BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Instructions of a CPU that multiply bfloat16; without them it is 30 times slower than float32."""
SPEEDUP = 1.3
"""How much faster bf16 must be on a CPU for `auto` to choose it: less is lost again in conversions."""
MANY = 2**20
"""Candidates that a loss may have whose number is not an option."""
AMPERE = (8, 0)
"""Compute capability of the first GPUs with TF32 and with flash attention."""
HEAD_DIMS = 8, 256
"""Flash attention takes widths of a head that are multiples of the first and at most the second."""

Attention = Literal["dense", "varlen"]


@dataclass(frozen=True)
class Execution:
    """How steps are computed, with every `auto` resolved.

    Example: `with execution.applied(): train()`
    """

    device: str
    """`cpu` or `cuda`."""
    precision: Precision = "fp32"
    attention: Attention = "dense"
    fused_loss: bool = False
    compile: bool = False
    precision_reason: str = field(default="", compare=False)
    """Why `auto` chose the precision, for the header; empty: it was given."""
    attention_reason: str = field(default="", compare=False)
    """Why `auto` chose dense attention on CUDA."""

    @classmethod
    def choose(
        cls,
        train: Train,
        model: Model,
        loss: Loss,
        device: torch.device,
        output: str | None = None,
        before: str | None = None,
    ) -> "Execution":
        """Choose how to compute the steps of a run (collective: all ranks take rank 0's measurement).

        Args:
            train: options of the run.
            model: options of the decoder.
            loss: options of the loss.
            device: of this rank.
            output: the run's folder; where `auto` measures, a run that resumes keeps what it has chosen before.
            before: checkpoint of the day before, of which a day's run keeps what was chosen; None: there is none.

        Raises:
            InputError: this device or this model cannot do what an option asks for.
        """
        cuda = device.type == "cuda"
        precision, why_precision = _precision(train.precision, device, output, before)
        obstacle = _varlen_obstacle(model, device, precision)
        if train.attention == "varlen" and obstacle:
            raise InputError(f"--train.attention varlen {obstacle[0]}; {obstacle[1]}, or give --train.attention dense")
        attention: Attention = "dense" if train.attention == "dense" or obstacle else "varlen"
        can_fuse = cuda and has_triton()
        if train.fused_loss is True and not can_fuse:
            lacking = "Triton, which is not installed" if cuda else "CUDA, and this run is on the CPU"
            raise InputError(f"--train.fused_loss true needs {lacking}; give --train.fused_loss auto")
        if train.compile:
            _check_compiler(device)
        why_dense = f"varlen {obstacle[0]}" if train.attention == "auto" and cuda and obstacle else ""
        if train.fused_loss is True and model.dim > MAX_DIM:
            raise InputError(
                f"--train.fused_loss true takes --model.dim up to {MAX_DIM}, and it is {model.dim}; give "
                "--train.fused_loss auto"
            )
        fused, crosses = train.fused_loss, loss.crosses_ranks(ranks := world_size())
        if fused is True and crosses:
            raise InputError(
                f"--train.fused_loss true scores the candidates of one rank, and with --loss.candidates "
                f"{loss.candidates} those of all {ranks} ranks count; give --train.fused_loss auto"
            )
        if fused == "auto":
            candidates = loss.negatives if loss.candidates == "sampled" else MANY
            can_fuse = can_fuse and loss.candidates != "bce" and not crosses
            fused = can_fuse and prefers_fused(model.dim, candidates, device, precision)
        return cls(device.type, precision, attention, fused, train.compile, why_precision, why_dense)

    @property
    def compute(self) -> Compute:
        """The part that the model needs to know."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return Compute(dtype, self.fused_loss, self.compile, self.precision == "tf32")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the settings that hold for the whole process within the `with`, and restore the earlier ones.

        Validation and rankings come outside: they are computed in float32.
        """
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        # In bf16 what is left in float32 (its sums, the parts that autocast leaves) may be multiplied in TF32.
        matmul.allow_tf32 = self.device == "cuda" and self.precision != "fp32"
        try:
            yield
        finally:
            matmul.allow_tf32 = before

    def __str__(self) -> str:
        """One line for the header of a run."""
        why_precision, why_dense = (
            f" (auto: {why})" if why else "" for why in (self.precision_reason, self.attention_reason)
        )
        return (
            f"{self.precision}{why_precision}, {self.attention} attention{why_dense}, "
            f"{'fused' if self.fused_loss else 'chunked'} loss{', compiled' if self.compile else ''}"
        )


def _precision(option: str, device: torch.device, output: str | None, before: str | None) -> tuple[Precision, str]:
    """The precision for an option, and why `auto` chose it."""
    if device.type == "cuda":
        has_bf16, since_ampere = supports_bf16(), torch.cuda.get_device_capability(device) >= AMPERE
        name = torch.cuda.get_device_name(device)
        if option == "bf16" and not has_bf16:
            raise InputError(f"--train.precision bf16: {name} has no bfloat16; give --train.precision fp32")
        if option == "tf32" and not since_ampere:
            raise InputError(f"--train.precision tf32: {name} has no TF32; give --train.precision fp32")
        if option == "auto":
            return ("bf16", f"{name} has it") if has_bf16 else ("fp32", f"{name} has no bfloat16")
    elif option == "tf32":
        raise InputError("--train.precision tf32 needs CUDA, and this run is on the CPU; give --train.precision auto")
    elif option == "auto":
        return run_on_first_rank(lambda: _cpu_precision(output, before))
    return option, ""  # type: ignore[return-value]


def _cpu_precision(output: str | None, before: str | None) -> tuple[Precision, str]:
    """What `auto` chooses on this CPU, and why.

    What is measured may be another value the next time, so a run that resumes keeps what it began with.
    """
    flags = [name for name in BF16_FLAGS if name in cpu_flags()]
    if not flags:
        return "fp32", "the CPU has neither AVX512-BF16 nor AMX"
    from recgpt_torchrec.checkpoints.folder import Checkpoints, read_metadata  # not where torch alone is installed

    newest = None if output is None else Checkpoints(output, keep=0).latest()
    for checkpoint, reason in ((newest, "as the run began"), (before, "as the day before")):
        if checkpoint is not None:
            earlier = read_metadata(checkpoint).get("environment", {}).get("cpu_precision")
            if earlier in ("bf16", "fp32"):
                return earlier, reason
    speedup = measure_bf16_speedup()
    return "bf16" if speedup >= SPEEDUP else "fp32", f"with {flags[-1]} bf16 is {speedup:.1f} times as fast as fp32"


def _varlen_obstacle(model: Model, device: torch.device, precision: Precision) -> tuple[str, str] | None:
    """Why varlen attention is impossible, and what to do; None: it is possible."""
    width = model.dim // model.heads
    multiple, widest = HEAD_DIMS
    if device.type != "cuda":
        return "needs CUDA, and this run is on the CPU", "run on a GPU"
    if precision != "bf16":
        return f"needs bf16, and the precision is {precision}", "give --train.precision bf16"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return f"needs a GPU since Ampere, and this is {torch.cuda.get_device_name(device)}", "use another GPU"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs a newer PyTorch than {torch.__version__}", "install the version of pyproject.toml"
    if model.attention_dropout > 0:
        return f"has no dropout, and it is {model.attention_dropout}", "give --model.attention_dropout 0"
    if width % multiple or width > widest:
        return (
            f"takes heads of a multiple of {multiple} up to {widest}, and dim / heads is {width}",
            "give another --model.heads",
        )
    return None


def _check_compiler(device: torch.device) -> None:
    """Check that torch.compile can make code for the device.

    Raises:
        InputError: a compiler is missing.
    """
    if device.type == "cuda":
        if not has_triton():
            raise InputError("--train.compile true needs Triton, which is not installed; leave it out")
    elif shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        raise InputError(
            f"--train.compile true needs a C++ compiler, and {compiler} is not found; install one, name it in CXX, or "
            "leave the option out"
        )


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def supports_bf16() -> bool:
    """Whether the GPU multiplies bfloat16 itself, without emulation."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_flags() -> set[str]:
    """The instruction sets of the CPU as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def measure_bf16_speedup() -> float:
    """How many times as fast a product is in bf16 as in float32 here (about 0.1 s)."""
    bf16, fp32 = (measured_peak(torch.device("cpu"), name, size=512, seconds=0.03) for name in ("bf16", "fp32"))
    return bf16 / fp32
