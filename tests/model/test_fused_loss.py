"""The fused softmax loss: parity in a process of its own, what its kernels need of a GPU, and when it is taken."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from recgpt_torchrec.model.losses.fused_loss import picoseconds_per_logit, prefers_fused, shared_bytes, tiles

NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
LIMITS = {90: 227, 80: 163}
"""Shared memory of a program in KB, by compute capability: H100 and A100."""


@NO_TRITON
def test_the_kernels_compute_the_loss_on_this_machine():
    """On a CUDA device if there is one, else in Triton's interpreter."""
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/fused_loss_parity.py"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@NO_TRITON
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "capability, dim, kind", [(90, 64, "half"), (90, 512, "half"), (80, 512, "tf32"), (90, 64, "ieee")]
)
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(capability, dim, kind):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from recgpt_torchrec.model.losses import fused_loss_kernels as kernels

    precision, itemsize, dtype = ("tf32", 2, "bf16") if kind == "half" else (kind, 4, "fp32")
    width, rows, columns, warps, stages = tiles(dim, itemsize, precision)
    constants: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns, "DIM": width, "PRECISION": precision}
    constants["GRADIENT"] = True
    types = {"h": f"*{dtype}", "candidates": f"*{dtype}", "target_index": "*i64"}
    types |= dict.fromkeys(("targets", "count", "dim", "per_split"), "i32") | dict.fromkeys(constants, "constexpr")
    for kernel in (kernels.attend, kernels.gather):
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: types.get(name, "*fp32") for name in names},
            {name: value for name, value in constants.items() if name in names},
            {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name) != "constexpr"},
        )
        made = compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages})
        assert ("mma" in made.asm["ptx"]) == (kind != "ieee"), "tensor cores"
        assert made.metadata.shared <= shared_bytes(dim, itemsize, precision), kernel
        assert made.metadata.shared <= LIMITS[capability] * 1024


@pytest.mark.parametrize("itemsize, precision", [(2, "tf32"), (2, "ieee"), (4, "tf32"), (4, "ieee")])
@pytest.mark.parametrize("dim", [1, 16, 17, 48, 64, 65, 128, 192, 256, 320, 512])
def test_blocks_hold_the_vectors_and_fit_an_h100(dim, itemsize, precision):
    width, rows, columns, *_ = tiles(dim, itemsize, precision)
    assert dim <= width < max(2 * dim, 17) and width & (width - 1) == 0
    assert min(rows, columns) >= 16 and shared_bytes(dim, itemsize, precision) <= LIMITS[90] * 1024


def test_the_estimate_is_the_docstrings():
    """32,768 targets and candidates: 2.1 ms against 3.2 at dim 64, 9 against 6 at dim 512."""
    logits = 2**30 * 1e-9
    for dim, fused, chunked in ((64, 2.1, 3.2), (512, 9.0, 6.0)):
        one, other = (each * logits for each in picoseconds_per_logit(dim, 2**15, 2**15))
        assert one == pytest.approx(fused, rel=0.05) and other == pytest.approx(chunked, rel=0.1)


def test_it_is_taken_for_narrow_vectors_on_gpus_that_can(monkeypatch):
    class H100:
        major, shared_memory_per_block_optin = 9, 227 * 1024

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setattr("recgpt_torchrec.model.losses.fused_loss.find_spec", lambda name: object())
    cuda = torch.device("cuda")
    assert prefers_fused(64, 32768, cuda) and prefers_fused(128, 3000, cuda) and prefers_fused(64, 32768, cuda, "tf32")
    assert not prefers_fused(512, 32768, cuda), "the loss in chunks is estimated to be faster"
    assert not prefers_fused(64, 32768, cuda, "fp32"), "no tensor cores"
    assert not prefers_fused(64, 32768, torch.device("cpu"))
    H100.shared_memory_per_block_optin = 48 * 1024
    assert not prefers_fused(128, 32768, cuda)
    H100.major, H100.shared_memory_per_block_optin = 7, 227 * 1024
    assert not prefers_fused(64, 32768, cuda)
    H100.major = 9
    monkeypatch.setattr("recgpt_torchrec.model.losses.fused_loss.find_spec", lambda name: None)
    assert not prefers_fused(64, 32768, cuda)


def test_a_machine_without_triton_imports_all_but_the_kernels():
    program = (
        "import sys; sys.modules |= dict.fromkeys(('triton', 'torchrec', 'pyarrow'))\n"
        "from recgpt_torchrec.model.losses import fused_loss\n"
        "from recgpt_torchrec.model import segmented, varlen\n"
        "try: from recgpt_torchrec.model.losses import fused_loss_kernels\n"
        "except ImportError: print('without')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.stdout == "without\n", done.stderr
