"""Programs import what they need: heavy libraries are seconds of each start."""

import subprocess
import sys

import pytest

from tests.support import SMALL, stage, walks, write_dataset

TORCHREC = {"torchrec", "fbgemm_gpu", "tensordict", "torch._dynamo"}
"""2 s of a core beside torch."""
SQL = {"duckdb", "ibis", "sqlglot", "pyspark"}
OTHERS = {"faiss", "scipy", "tensorboard", "matplotlib", "torchx"}


def imported(words: list[str], cwd) -> set[str]:
    """Names of the modules that a program has imported when it ends."""
    code = (
        "import sys, runpy; name, *sys.argv[1:] = sys.argv[1:]\n"
        "try: runpy.run_module(name, run_name='__main__')\n"
        "finally: print('MODULES', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stderr.rpartition("MODULES ")[2].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    write_dataset(folder / "data", walks(users=30, items=8), items=8)
    options = {"--data": folder / "data", "--output": folder / "run", **SMALL, "--train.epochs": 1}
    assert stage("pretrain", options) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        ("recgpt_torchrec --help", {"torch", "numpy", "pyarrow"} | TORCHREC | SQL | OTHERS),
        ("recgpt_torchrec.recommend --checkpoint run --data data --history 1,2 --k 2", TORCHREC | SQL | OTHERS),
        ("recgpt_torchrec.report run --output report.html", {"torch.distributed.checkpoint"} | TORCHREC | SQL),
    ],
)
def test_a_light_program_imports_no_heavy_library(words, absent, folder):
    found = imported(words.split(), folder)
    assert not found & absent
    assert "recgpt_torchrec.config.stages" in found or "recgpt_torchrec.cli" in found  # it ran
