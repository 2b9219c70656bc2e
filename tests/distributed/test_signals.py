"""Runs that are asked to end: they save, end with a status that says so, and resume to the same result."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.config import Stream
from recgpt_torchrec.distributed import signals
from recgpt_torchrec.errors import STOP_SIGNALS, STOPPED
from tests.data.stream_helpers import expected_pairs, pairs
from tests.distributed.fault_helpers import (
    EPOCHS,
    HISTORIES,
    MAX_LEN,
    at_step,
    free_port,
    train,
    write_data,
)
from tools import kill_test
from tools.ranks import run_ranks


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path / "data")


def train_until_signal(rank: int, world_size: int, port: int, data: str, output: str, when: str | None) -> Any:
    from recgpt_torchrec.evaluation.validation import Validation

    if when == "training" and rank == 1:
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if when == "validating" and rank == 0:
        measure = Validation.__call__

        def watched(self: Validation) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGUSR1)
            return measure(self)

        Validation.__call__ = watched  # type: ignore[method-assign]
    return train(rank, port, data, output)


def test_a_signal_on_any_rank_saves_the_run_and_the_same_command_resumes_to_the_same_result(tmp_path, data):
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert run_ranks(train_until_signal, 2, free_port(), data, str(alone), None) == [0, 0]
    assert run_ranks(train_until_signal, 2, free_port(), data, str(stopped), "training") == [STOPPED] * 2
    first = Checkpoints(str(stopped), 2).latest()
    # Sent after step 5; a busy machine may hand it over a few steps of 10 ms later.
    assert first is not None and 6 <= int(first[-8:]) <= 14
    assert run_ranks(train_until_signal, 2, free_port(), data, str(stopped), "validating") == [STOPPED] * 2
    second = Checkpoints(str(stopped), 2).latest()
    assert second is not None and int(second[-8:]) >= int(first[-8:])  # the same where an epoch ended with it
    assert run_ranks(train_until_signal, 2, free_port(), data, str(stopped), None) == [0, 0]
    assert kill_test.find_differences(stopped, alone) == []


def train_and_record(
    rank: int, world_size: int, port: int, data: str, output: str, workers: int, stop: int | None
) -> tuple[int, Counter, list[int]]:
    """Train; the status, what this rank predicted, and the seed of each of its steps.

    The last rank is asked to end before the step that follows `stop` steps.
    """
    from recgpt_torchrec.data import stream
    from recgpt_torchrec.model.dense import Dense

    def in_turn(source: Callable[[int], Iterator[Any]], settings: Stream) -> Iterator[Any]:
        """What loader processes make, without them: a rank of this test may start none."""
        left = [source(worker) for worker in range(max(1, settings.workers))]
        while left:
            for one in list(left):
                batch = next(one, None)
                if batch is None:
                    left.remove(one)
                else:
                    yield batch

    loss_of = Dense.sum_of_losses
    found: Counter = Counter()
    seeds = []

    def loss(self: Dense, h: torch.Tensor, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if self.training:
            found.update(pairs(batch))
            seeds.append(torch.initial_seed())
        return loss_of(self, h, outputs, batch)

    stream.prefetch, Dense.sum_of_losses = in_turn, loss  # type: ignore[method-assign]
    if stop is not None and rank == world_size - 1:
        at_step(stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return train(rank, port, data, output, workers=workers), found, seeds


def test_a_run_resumed_with_other_ranks_and_workers_trains_each_target_once_an_epoch(tmp_path, data):
    found: Counter = Counter()
    seeds: list[int] = []
    for ranks, workers, stop in ((2, 2, 3), (1, 3, 9), (3, 1, None)):
        ends = run_ranks(train_and_record, ranks, free_port(), data, str(tmp_path / "run"), workers, stop)
        assert [status for status, _, _ in ends] == [0 if stop is None else STOPPED] * ranks
        for _, mine, drawn in ends:
            assert mine
            found += mine
            seeds += drawn
    once = expected_pairs(HISTORIES, "newest", MAX_LEN)
    assert found == Counter({pair: EPOCHS * times for pair, times in once.items()})
    assert len(set(seeds)) == len(seeds), "dropout falls alike in two steps or on two ranks"


LISTENER = """
import os, signal, sys, time
from recgpt_torchrec.distributed import signals
signals.AGAIN_SECONDS = 0.5
with signals.handle_stop_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    print(signals.received_signal().name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once_unless_it_comes_with_the_first():
    done = subprocess.run([sys.executable, "-c", LISTENER], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("SIGTERM\n", 128 + signal.SIGTERM)


WITHHELD = """
import os, signal, subprocess, sys
from recgpt_torchrec.data import loading
child = (
    "import os, time; from recgpt_torchrec.data import loading; "
    "loading.end_with_process(os.getppid()); print(flush=True); time.sleep(60)"
)
with loading.block_stop_signals():
    loader = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
loader.stdout.readline()
subprocess.run(["kill", "-TERM", str(loader.pid)], check=True)
subprocess.run(["kill", "-INT", str(loader.pid)], check=True)
try:
    loader.wait(0.5)
except subprocess.TimeoutExpired:
    print("still running")
loader.terminate()
print(loader.wait(10))
"""


def test_a_loader_process_is_ended_by_its_rank_and_not_by_a_stop_signal():
    done = subprocess.run([sys.executable, "-c", WITHHELD], capture_output=True, text=True, timeout=60)
    assert done.stdout == "still running\n0\n", done.stderr


def test_a_signal_to_all_processes_of_a_run_ends_it_as_one_to_its_ranks_does_and_leaves_none(tmp_path, data):
    """Slurm's way: loader processes, and what they are forked from, get it as well."""
    options = {**kill_test.TRAINING, "--data": data, "--output": tmp_path / "run", "--train.epochs": 1000}
    words = [str(word) for option in {**options, "--stream.workers": 2}.items() for word in option]
    command = [sys.executable, "-m", "recgpt_torchrec.pretrain", *words]
    with open(tmp_path / "said", "w+") as said:
        run = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while Checkpoints(str(tmp_path / "run"), 2).latest() is None:
                assert time.monotonic() < deadline and run.poll() is None, Path(said.name).read_text()
                time.sleep(0.1)
            os.killpg(run.pid, signal.SIGTERM)
            assert run.wait(60) == STOPPED, Path(said.name).read_text()
            assert "Everything is saved in" in Path(said.name).read_text()
            deadline = time.monotonic() + 20
            with pytest.raises(ProcessLookupError):
                while time.monotonic() < deadline:
                    os.killpg(run.pid, 0)
                    time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def test_the_launcher_forwards_signals_waits_and_ends_with_the_status_to_try_again(tmp_path):
    (tmp_path / "stand_in.py").write_text(
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(1)\n"
        "    os.write(1, b'saved\\n')\n"  # whole lines, also while the other rank writes
        "    sys.exit(75)\n"
        f"signal.signal({int(signal.SIGUSR1)}, end)\n"
        "os.write(1, b'ready\\n')\n"
        "time.sleep(100)\n"
    )
    options = ["--standalone", "--nproc_per_node", "2", "-m", "stand_in"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "recgpt_torchrec.launch.node", *options],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        launcher.send_signal(signal.SIGUSR1)
        said, _ = launcher.communicate(timeout=60)
        assert (said, launcher.returncode) == ("saved\n" * 2, STOPPED)
    finally:
        launcher.kill()


@pytest.mark.parametrize(("rank_status", "status"), [(STOPPED, STOPPED), (2, 2), (-signal.SIGKILL, 137)])
def test_the_launcher_ends_with_the_status_of_the_rank_that_failed_and_gives_the_others_time_to_save(
    monkeypatch, capfd, rank_status, status
):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from recgpt_torchrec.launch import node

    def fails(options: Any) -> None:
        assert options.shutdown_timeout >= 600 and {"SIGTERM", "SIGUSR1"} <= set(options.signals_to_handle.split(","))
        raise ChildFailedError("stage", {1: ProcessFailure(1, 99, rank_status, "no file")})

    monkeypatch.setattr(run, "run", fails)
    monkeypatch.setattr(node, "renew_store_at_each_start", lambda: None)
    monkeypatch.setattr(sys, "argv", ["node", "--nproc_per_node", "2", "-m", "some.stage"])
    with pytest.raises(SystemExit) as end:
        node.main()
    assert end.value.code == status
    assert f"some.stage {'stopped' if status == STOPPED else 'failed'}: rank 1 " in capfd.readouterr().err


def test_signals_request_a_stop_only_where_they_are_handled():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with signals.handle_stop_signals():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


ORPHAN = """
import os, pathlib, sys, time
from recgpt_torchrec.distributed import signals
from recgpt_torchrec.distributed.processes import process_group
from recgpt_torchrec.distributed.watchdog import Watchdog
with process_group(), Watchdog(".", stall_seconds=0), signals.handle_stop_signals():
    said = pathlib.Path("rank" + os.environ["RANK"])
    said.write_text("ready")
    until = time.monotonic() + 60
    while signals.received_signal() is None and time.monotonic() < until:
        time.sleep(0.01)
    said.write_text(str(signals.received_signal()))
"""


def test_ranks_whose_launcher_was_killed_are_asked_to_end(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "recgpt_torchrec.launch.node", "--standalone", "--nproc_per_node", "2", "-m", "orphan"],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"},
        cwd=tmp_path,
    )

    def said() -> list[str]:
        return [path.read_text() for path in tmp_path.glob("rank*")]

    try:
        until = time.monotonic() + 60
        while said() != ["ready"] * 2 and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        launcher.kill()
        asked = [str(signal.SIGTERM)] * 2
        while said() != asked and time.monotonic() < until:
            time.sleep(0.05)
        assert said() == asked
    finally:
        launcher.kill()


def test_a_job_sets_how_often_torchrun_restarts_its_processes():

    from recgpt_torchrec.launch import job

    (role,) = job.make_job("some.module", "--data", "d", j="1x2", max_restarts=7).roles
    assert "-m recgpt_torchrec.launch.node --max_restarts 7 --rdzv_backend c10d" in role.args[1]


@pytest.mark.parametrize(("status", "before", "again"), [(STOPPED, 0, True), (STOPPED, 2, False), (0, 0, False)])
def test_slurm_requeues_a_job_that_was_asked_to_end_up_to_its_limit(tmp_path, status, before, again):
    """The script that torchx gives to Slurm, with stand-ins for Slurm's commands."""
    from torchx.schedulers.slurm_scheduler import create_scheduler

    from recgpt_torchrec.launch import job

    app = job.make_job("recgpt_torchrec.pretrain", "--data", "d", j="2x2", max_retries=2)
    script = create_scheduler("test").submit_dryrun(app, {"partition": "p"}).request.materialize()
    for name, does in (("srun", f"exit {status}"), ("scontrol", 'echo "$@" > asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(before)}
    done = subprocess.run(["bash", "-c", script], env=slurm, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == status
    assert not again or (tmp_path / "asked").read_text() == "requeue 42\n"
    assert again == (tmp_path / "asked").exists()
