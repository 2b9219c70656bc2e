"""Runs a stage in a process of its own, forked from this one, with limits of time and memory.

What stages import is imported once, before the first fork: a case of `tools/fuzz.py` then takes a fraction of a second.
"""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""Time limit of one process."""
MEMORY = 6 * 2**30
"""Bytes of address space that it may use beyond what it starts with."""


def preload() -> None:
    """Import what stages import, so that processes forked from this one need not; no thread may be started."""
    for name in (
        "ibis.backends.sql.compilers",
        "jsonargparse",
        "pyarrow.dataset",
        "recgpt_torchrec.cli",
        "recgpt_torchrec.preparation.pipeline",
        "recgpt_torchrec.evaluation.baselines",
        "recgpt_torchrec.evaluation.list_quality",
        "recgpt_torchrec.evaluation.recall_paths",
        "recgpt_torchrec.evaluation.validation",
        "recgpt_torchrec.prompts.prompting",
        "recgpt_torchrec.retrieval.search.searching",
        "recgpt_torchrec.training.session",
        "torch.utils.tensorboard",
        "torchrec.distributed.train_pipeline",
        "tools.small_run",
    ):
        importlib.import_module(name)
    if importlib.util.find_spec("pandas"):  # which Arrow imports when an array becomes numpy's, if it is installed
        importlib.import_module("pandas")


def run_stage(stage: str, options: dict[str, Any]) -> int:
    """Run a stage in this process as its command line would; returns its exit status."""
    from recgpt_torchrec import cli
    from recgpt_torchrec.config import Pretrain
    from recgpt_torchrec.config.stages import STAGES, module_of

    sys.argv = [stage, *(str(word) for option in options.items() for word in option)]
    try:
        if stage == "parse":
            cli.parse(Pretrain, "recgpt_torchrec.pretrain")
        else:
            cli.run(STAGES[stage].config, importlib.import_module(module_of(stage)).main, module_of(stage))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def digest(path: str) -> str:
    """A hash of a stage's result: what a user would take from it, without times and paths."""
    import pyarrow.parquet as pq

    if not os.path.exists(path):
        return "none"
    if path.endswith(".json"):
        values: Any = json.loads(Path(path).read_text())["results"]
    elif os.path.exists(f"{path}/checkpoints"):
        newest = sorted(glob.glob(f"{path}/checkpoints/step-*"))[-1]
        names = sorted(glob.glob(f"{newest}/*.distcp"))
        values = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names]
        values.append([os.path.basename(newest), json.loads(Path(path, "best.json").read_text())])
    else:
        files = sorted(glob.glob(f"{path}/*/*.parquet"))
        values = [[name, pq.read_table(name, use_threads=False).to_pylist()] for name in files]
    return hashlib.sha256(repr(values).encode()).hexdigest()


@dataclass
class End:
    """How a process ended."""

    status: int | None
    """None: it was killed at the time limit; negative: by a signal."""
    text: str
    """What it said."""
    digest: str = ""


def run_in_process(folder: Path, function: Callable[[], int], result: str, seconds: float = SECONDS) -> End:
    """Run a function in a forked process with limits of time and memory, in `folder`."""
    said, found = folder.with_suffix(".text"), folder.with_suffix(".digest")
    process = os.fork()
    if not process:
        try:
            os.setsid()
            os.chdir(folder)
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # a test may have replaced them
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            status = function()
            if status == 0:
                found.write_text(digest(result))
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    deadline = time.monotonic() + seconds
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, code = os.waitpid(process, os.WNOHANG)
        if not ended:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # also what it may have started
    if not ended:
        os.waitpid(process, 0)
    text = said.read_text(errors="replace") if said.exists() else ""
    return End(os.waitstatus_to_exitcode(code) if ended else None, text, found.read_text() if found.exists() else "")
