"""Stops or kills a rank of every stage on two nodes, and looks at what becomes of the others.

    OMP_NUM_THREADS=1 python -m tools.stage_faults --folder faults

Each stage runs on two ranks without a launcher, which would end the others of its node. When rank 1 has reached a phase
it is killed, stopped (SIGSTOP), or made to hang. The table shows the seconds until both had ended, their statuses, and
what was said of the culprit. Then the same command is given again; its result must be the undisturbed one, bit for bit.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tools.ranks import CONTEXT, one_thread_environment
from tools.small_run import SMALL
from tools.stage_process import digest, run_stage

PHASES = {
    "pretrain": "a training step",
    "generate_prompts": "generating prompts",
    "prompt_tune": "a training step",
    "evaluate": "ranking users",
    "export": "encoding items and users",
    "index": "building the index",
    "retrieve": "searching",
}
"""The stages, in the order in which each finds what it reads, and the phase in which something happens to each."""
NEEDS = {
    "generate_prompts": ["pretrain"],
    "prompt_tune": ["pretrain", "generate_prompts"],
    "evaluate": ["pretrain"],
    "export": ["pretrain"],
    "index": ["pretrain", "export"],
    "retrieve": ["pretrain", "export"],
}
"""The stages whose results each stage reads."""
FAULTS = ("killed", "stopped", "hangs")
SECONDS = 180
"""Maximum time of one run."""
STALL_SECONDS = 20
"""Of the run to which something happens."""
CULPRIT = re.compile(r"(lost rank 1 \([^)]*\)|rank 1: (?!no progress)[^\n]*)")


def options_of(stage: str, folder: Path, output: Path, stall_seconds: float = 600) -> dict[str, Any]:
    """The command line of a stage, which reads what the stages before it have written to `folder`."""
    data, run, prompts = folder / "data", folder / "pretrain", folder / "generate_prompts"
    training = {**SMALL, "--train.stall_seconds": stall_seconds, "--saving.every_steps": 4, "--train.epochs": 6}
    training |= {"--train.precision": "fp32"}
    reads: dict[str, dict[str, Any]] = {
        "pretrain": {"--data": data, **training},
        "generate_prompts": {"--data": data, "--checkpoint": run, "--batch_users": 8},
        "prompt_tune": {
            **{name: value for name, value in training.items() if not name.startswith("--model")},
            "--data": prompts,
            "--checkpoint": run,
        },
        "evaluate": {"--data": data, "--checkpoint": run, "--batch.tokens": 60},
        "export": {"--data": data, "--checkpoint": run, "--batch.tokens": 60},
        "index": {"--export": output, "--index.kind": "hnsw"},
        "retrieve": {"--export": folder / "export", "--data": data, "--k": 5, "--index": "exact"},
    }
    stalls = {} if "--train.stall_seconds" in reads[stage] else {"--stall_seconds": stall_seconds}
    written = {} if stage == "index" else {"--output": f"{output}.json" if stage == "evaluate" else output}
    return {**reads[stage], **stalls, **written}


def do_at_phase(watchdog: Any, phase: str, fault: str) -> None:
    """Do something to this process once it has reached a phase; runs in a thread."""
    while watchdog.current_status().phase != phase:
        time.sleep(0.0003)
    os.write(2, f"now: {time.time()}\n".encode())
    if fault == "hangs":
        # The main thread waits for ever where it would next meet the others; heartbeats go on.
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast_object_list"):
            setattr(dist, name, lambda *_, **more: threading.Event().wait())
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)


def rank_main(stage: str, words: list[str], fault: str, environment: dict[str, str], said: str) -> None:
    """Run a stage as one rank, with the thread that does something to rank 1."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= environment
    from recgpt_torchrec.distributed import watchdog

    if environment["RANK"] == "1" and fault != "none":
        threading.Thread(target=do_at_phase, args=(watchdog, PHASES[stage], fault), daemon=True).start()
    status = run_stage(stage, dict(zip(words[::2], words[1::2], strict=True)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass
class End:
    """How a job ended."""

    statuses: list[int]
    """Of the ranks; negative: by a signal."""
    seconds: float
    """From the fault, or else from the start."""
    said: list[str]


def launch(stage: str, options: dict[str, Any], fault: str = "none") -> End:
    """Run a stage on two ranks, forked from a process that has imported all of it."""
    words = [str(word) for option in options.items() for word in option]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1]), "WORLD_SIZE": "2"}
    job |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    since = time.time()
    with tempfile.TemporaryDirectory() as folder, one_thread_environment():
        files = [f"{folder}/rank{rank}" for rank in range(2)]
        ranks = [
            CONTEXT.Process(target=rank_main, args=(stage, words, fault, {**job, "RANK": str(rank)}, files[rank]))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(SECONDS)
        finally:
            ended = time.time()
            for process in ranks:
                process.kill()
                process.join()
        said = [Path(file).read_text(errors="replace") for file in files]
    happened = re.search(r"now: ([\d.]+)", "".join(said))
    seconds = ended - (float(happened.group(1)) if happened else since)
    return End([process.exitcode or 0 for process in ranks], seconds, said)


def digest_of(stage: str, output: Path) -> str:
    """A hash of a stage's result, wherever it is."""
    with contextlib.chdir(output.parent if stage == "evaluate" else output):
        return digest(f"{output.name}.json" if stage == "evaluate" else ".")


def run_faults(folder: Path, stages: list[str], faults: list[str]) -> list[str]:
    """Run every stage once undisturbed, and once for each fault; returns the lines of the table."""
    from tools.small_run import walks, write_dataset

    write_dataset(folder / "data", walks(400, 60, shortest=3, longest=14), items=60, rows_per_group=8)
    lines = []
    needed = {*stages, *(each for stage in stages for each in NEEDS.get(stage, []))}
    for stage in [each for each in PHASES if each in needed]:
        alone = folder / ("export" if stage == "index" else stage)
        undisturbed = launch(stage, options_of(stage, folder, alone))
        assert undisturbed.statuses == [0, 0], undisturbed.said
        for fault in faults if stage in stages else []:
            output = folder / f"{stage}-{fault}"
            if stage == "index":
                first = launch("export", options_of("export", folder, output))
                assert first.statuses == [0, 0], first.said
            end = launch(stage, options_of(stage, folder, output, STALL_SECONDS), fault)
            again = launch(stage, options_of(stage, folder, output))
            results = [digest_of(stage, each) for each in (output, alone)]
            named = next(
                (
                    found.group(1)
                    for text in sorted(end.said, key=lambda text: "lost rank 1" not in text)
                    if (found := CULPRIT.search(text))
                ),
                "nobody",
            )
            result = "equal" if again.statuses == [0, 0] and results[0] == results[1] else "DIFFERS"
            text = f"{stage:17}{fault:9}{end.seconds:6.1f} s  {end.statuses!s:11} {result:8} {named}"
            print(text, flush=True)
            lines.append(text)
            (folder / f"{stage}-{fault}.said").write_text(json.dumps([end.__dict__, again.__dict__], indent=1))
    return lines


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(PHASES))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS))
    parser.add_argument("--folder", type=Path, help="folder that keeps what was said; must not exist")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        lines = run_faults(folder, options.stages, options.faults)
    return any("DIFFERS" in line or line.endswith("nobody") or "[0, 0]" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
