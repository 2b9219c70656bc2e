"""Signals, stalls, lost ranks, kills and steps that are not finite: every run ends in time, says why, and goes on."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recgpt_torchrec.config import Batch, CheckpointOptions, Loss, Model, Optimizer, Pretrain, Stream, Tables, Train
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training import signals
from recgpt_torchrec.training.checkpoint import Checkpoints
from recgpt_torchrec.training.processes import LOST, process_group
from recgpt_torchrec.training.signals import STOPPED
from recgpt_torchrec.training.watchdog import STALLED, Watchdog
from tests.data.stream_helpers import expected_pairs, pairs
from tests.distributed.launch import RankFailed, run_ranks
from tests.support import walks, write_dataset
from tools import kill_test

ROWS, GROUPS = 8, 2
"""Of a row group, and of a part."""
HISTORIES = walks(200, 30, longest=14)
MAX_LEN, EPOCHS = 10, 2


@pytest.fixture
def data(tmp_path) -> str:
    folder = tmp_path / "data"
    write_dataset(folder, HISTORIES, items=30, rows_per_group=ROWS, groups_per_part=GROUPS)
    return str(folder)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def train(rank: int, port: int, data: str, output: str, **options: Any) -> Any:
    """The stage `pretrain` on this rank, in a process group of its own; returns the status it ends with.

    What it says on standard error is in OUTPUT.rankN.
    """
    from recgpt_torchrec import pretrain

    dist.barrier()
    connected = dist.group.WORLD  # no rank closes its connections under another's collective
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = os.open(f"{output}.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    asynchronous = options.pop("asynchronous", True)
    config = Pretrain(
        data=data,
        output=output,
        model=Model(dim=8, max_len=MAX_LEN, layers=1),
        loss=Loss(negatives=10),
        batch=Batch(tokens=60),
        stream=Stream(workers=options.pop("workers", 0)),
        tables=Tables(sharding=options.pop("sharding", "row_wise")),
        optimizer=Optimizer(warmup_steps=5),
        train=Train(epochs=EPOCHS, **options),
        checkpoint=CheckpointOptions(every_steps=4, asynchronous=asynchronous),
    )
    status = 0
    try:
        pretrain.main(config)
    except SystemExit as end:
        assert isinstance(end.code, int)
        status = end.code
    del connected
    return status


def at_step(number: int, do: Any) -> None:
    """Do something before the step that follows `number` steps."""
    from recgpt_torchrec.training.schedule import Schedule

    course = Schedule.set

    def watched(self: Schedule, steps: int, progress: float) -> float:
        if steps == number:
            do()
        return course(self, steps, progress)

    Schedule.set = watched  # type: ignore[method-assign]


# ----------------------------------------------------------------------------------------------------------- signals


def asked_to_end(rank: int, world_size: int, port: int, data: str, output: str, when: str | None) -> Any:
    from recgpt_torchrec.retrieval.validation import Validation

    if when == "training" and rank == 1:
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if when == "validating" and rank == 0:
        measure = Validation.__call__

        def watched(self: Validation) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGUSR1)
            return measure(self)

        Validation.__call__ = watched  # type: ignore[method-assign]
    return train(rank, port, data, output)


def test_a_signal_on_any_rank_saves_all_of_them_and_the_same_command_goes_on_to_the_same_end(tmp_path, data):
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert run_ranks(asked_to_end, 2, free_port(), data, str(alone), None) == [0, 0]
    assert run_ranks(asked_to_end, 2, free_port(), data, str(stopped), "training") == [STOPPED] * 2
    first = Checkpoints(str(stopped), 2).latest()
    assert first is not None and 6 <= int(first[-8:]) <= 9
    assert run_ranks(asked_to_end, 2, free_port(), data, str(stopped), "validating") == [STOPPED] * 2
    second = Checkpoints(str(stopped), 2).latest()
    assert second is not None and int(second[-8:]) > int(first[-8:])
    assert run_ranks(asked_to_end, 2, free_port(), data, str(stopped), None) == [0, 0]
    assert kill_test.differences(stopped, alone) == []


def recorded(
    rank: int, world_size: int, port: int, data: str, output: str, workers: int, stop: int | None
) -> tuple[int, Counter, list[int]]:
    """Train; the status, what this rank predicted, and the seed of each of its steps.

    The last rank is asked to end before the step that follows `stop` steps.
    """
    from recgpt_torchrec.data import stream
    from recgpt_torchrec.model.recgpt import Dense

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

    stream.made_ahead, Dense.sum_of_losses = in_turn, loss  # type: ignore[method-assign]
    if stop is not None and rank == world_size - 1:
        at_step(stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return train(rank, port, data, output, workers=workers), found, seeds


def test_stopped_and_gone_on_with_other_ranks_and_workers_each_position_is_trained_once_an_epoch(tmp_path, data):
    found: Counter = Counter()
    seeds: list[int] = []
    for ranks, workers, stop in ((2, 2, 3), (1, 3, 9), (3, 1, None)):
        ends = run_ranks(recorded, ranks, free_port(), data, str(tmp_path / "run"), workers, stop)
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
from recgpt_torchrec.training import signals
signals.AGAIN_SECONDS = 0.5
with signals.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    print(signals.received().name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once_unless_it_comes_with_the_first():
    done = subprocess.run([sys.executable, "-c", LISTENER], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("SIGTERM\n", 128 + signal.SIGTERM)


WITHHELD = """
import os, signal, subprocess, sys
from recgpt_torchrec.training import signals
child = (
    "import os, time; from recgpt_torchrec.training import signals; "
    "signals.end_with(os.getppid()); print(flush=True); time.sleep(60)"
)
with signals.withheld():
    loader = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
loader.stdout.readline()
subprocess.run(["kill", "-TERM", str(loader.pid)], check=True)
subprocess.run(["kill", "-INT", str(loader.pid)], check=True)
try:
    loader.wait(0.5)
except subprocess.TimeoutExpired:
    print("goes on")
loader.terminate()
print(loader.wait(10))
"""


def test_a_loader_process_ends_by_its_own_rank_and_not_by_who_asks_the_rank_to_end():
    done = subprocess.run([sys.executable, "-c", WITHHELD], capture_output=True, text=True, timeout=60)
    assert done.stdout == "goes on\n0\n", done.stderr


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


def test_the_launcher_passes_signals_on_waits_and_ends_with_the_status_to_try_again(tmp_path):
    (tmp_path / "stand_in.py").write_text(
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(1)\n"
        "    os.write(1, b'saved\\n')\n"  # whole lines, whatever the other rank writes
        "    sys.exit(75)\n"
        f"signal.signal({int(signal.SIGUSR1)}, end)\n"
        "os.write(1, b'ready\\n')\n"
        "time.sleep(100)\n"
    )
    options = ["--standalone", "--nproc_per_node", "2", "-m", "stand_in"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "recgpt_torchrec.node", *options],
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

    from recgpt_torchrec import node

    def fails(options: Any) -> None:
        assert options.shutdown_timeout >= 600 and {"SIGTERM", "SIGUSR1"} <= set(options.signals_to_handle.split(","))
        raise ChildFailedError("stage", {1: ProcessFailure(1, 99, rank_status, "no file")})

    monkeypatch.setattr(run, "run", fails)
    monkeypatch.setattr(node, "a_store_for_each_start", lambda: None)
    monkeypatch.setattr(sys, "argv", ["node", "--nproc_per_node", "2", "-m", "some.stage"])
    with pytest.raises(SystemExit) as end:
        node.main()
    assert end.value.code == status
    assert f"some.stage {'stopped' if status == STOPPED else 'failed'}: rank 1 " in capfd.readouterr().err


def test_signals_are_taken_for_requests_only_where_someone_listens():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.listening():
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


ORPHAN = """
import os, pathlib, sys, time
from recgpt_torchrec.training import signals
from recgpt_torchrec.training.processes import process_group
from recgpt_torchrec.training.watchdog import Watchdog
with process_group(), Watchdog(".", stall_seconds=0), signals.listening():
    said = pathlib.Path("rank" + os.environ["RANK"])
    said.write_text("ready")
    until = time.monotonic() + 60
    while signals.received() is None and time.monotonic() < until:
        time.sleep(0.01)
    said.write_text(str(signals.received()))
"""


def test_ranks_whose_launcher_was_killed_are_asked_to_end(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "recgpt_torchrec.node", "--standalone", "--nproc_per_node", "2", "-m", "orphan"],
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


def test_a_job_says_how_often_torchrun_starts_its_processes_again():
    from recgpt_torchrec import launch

    (role,) = launch.stage("some.module", "--data", "d", j="1x2", max_restarts=7).roles
    assert "-m recgpt_torchrec.node --max_restarts 7 --rdzv_backend c10d" in role.args[1]


@pytest.mark.parametrize(("status", "before", "again"), [(STOPPED, 0, True), (STOPPED, 2, False), (0, 0, False)])
def test_slurm_puts_a_job_that_was_asked_to_end_into_the_queue_again_as_often_as_it_may(
    tmp_path, status, before, again
):
    """The script that torchx gives to Slurm, with stand-ins for Slurm's commands."""
    from torchx.schedulers.slurm_scheduler import create_scheduler

    from recgpt_torchrec import launch

    job = launch.stage("recgpt_torchrec.pretrain", "--data", "d", j="2x2", max_retries=2)
    script = create_scheduler("test").submit_dryrun(job, {"partition": "p"}).request.materialize()
    for name, does in (("srun", f"exit {status}"), ("scontrol", 'echo "$@" > asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": str(before)}
    done = subprocess.run(["bash", "-c", script], env=slurm, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == status
    assert not again or (tmp_path / "asked").read_text() == "requeue 42\n"
    assert again == (tmp_path / "asked").exists()


# ------------------------------------------------------------------------------------------- stalled and lost ranks


def stopped_by_the_system(rank: int, world_size: int, port: int, data: str, output: str) -> Any:
    def stop() -> None:
        Path(f"{output}.since").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def late(status: int) -> None:
        Path(f"{output}.status").write_text(str(status))
        time.sleep(5)  # so that what becomes of the other is seen before

    if rank == 1:
        at_step(6, stop)
    else:
        os._exit = late  # type: ignore[assignment]
    return train(rank, port, data, output, stall_seconds=4, asynchronous=False)


def test_a_rank_that_is_stopped_is_named_by_the_others_and_the_run_ends_in_the_time_that_was_given(tmp_path, data):
    output = tmp_path / "run"
    # Woken by SIGABRT, or by what it reads then; else it would stay.
    with pytest.raises(RankFailed, match=r"rank 1 failed first:\nit died with exit code (-6|70)"):
        run_ranks(stopped_by_the_system, 2, free_port(), data, str(output), timeout=60)
    assert time.time() - float(Path(f"{output}.since").read_text()) < 4 + 1.5
    assert Path(f"{output}.status").read_text() == str(STALLED)
    said = Path(f"{output}.rank0").read_text()
    assert "no progress for 4 s" in said and "rank 1: no sign of life since" in said
    assert re.search(r"it was at: .*, after step \d, on ", said)
    assert "trainer.py" in said and "trainer.py" in (output / "stacks" / "rank-0.txt").read_text()
    assert Checkpoints(str(output), 2).latest() is not None


def suspended(rank: int, world_size: int, folder: str) -> None:
    """Nothing moves for 5.7 s, in 4 of which the system has stopped this process; 3 are allowed."""
    stop = f"sleep 0.5; kill -STOP {os.getpid()}; sleep 4; kill -CONT {os.getpid()}"
    with Watchdog(folder, stall_seconds=3), subprocess.Popen(["sh", "-c", stop]):
        until = time.monotonic() + 5.7
        while time.monotonic() < until:
            time.sleep(0.1)


def test_a_run_that_the_system_suspends_as_a_whole_has_not_stalled(tmp_path):
    run_ranks(suspended, 1, str(tmp_path))


def fails(rank: int, world_size: int, folder: str) -> Any:
    os.dup2(os.open(f"{folder}/rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    status = None
    try:
        with Watchdog(folder, stall_seconds=100):
            if rank == 1:
                raise ValueError("bad luck")
            dist.barrier()
    except ValueError:
        dist.destroy_process_group()
        time.sleep(1)  # the process is there, only its connections are closed
    except SystemExit as end:
        dist.destroy_process_group()
        status = end.code
    return status


def test_a_rank_that_loses_another_says_which_and_why(tmp_path):
    assert run_ranks(fails, 2, str(tmp_path)) == [LOST, None]
    assert "lost rank 1 (it ended with ValueError); rank 0 was at: starting" in (tmp_path / "rank0").read_text()


def keeps_others_waiting(rank: int, world_size: int, port: int, folder: str) -> tuple[Any, float]:
    """What rank 0 ends with that waits for rank 1, and after how long; two seconds are allowed."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(f"{folder}/rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    status, since = None, 0.0
    try:
        with process_group(2.0), Watchdog(folder, stall_seconds=0):
            dist.barrier()
            since = time.monotonic()
            if rank == 0:
                dist.barrier()
            time.sleep(10)
    except SystemExit as end:
        status = end.code
    return status, time.monotonic() - since


def test_one_collective_operation_takes_no_longer_than_the_time_that_was_given(tmp_path):
    ends = run_ranks(keeps_others_waiting, 2, free_port(), str(tmp_path))
    assert ends[0][0] == LOST and 1.5 < ends[0][1] < 8
    assert "lost the connection to another rank; rank 0 was at: starting" in (tmp_path / "rank0").read_text()


def test_a_rank_that_is_killed_ends_the_other_within_seconds_which_says_so(tmp_path, data):
    options = {**kill_test.TRAINING, "--data": data, "--output": tmp_path / "run", "--train.epochs": 1000}
    words = [str(word) for option in options.items() for word in option]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "recgpt_torchrec.pretrain", *words],
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while Checkpoints(str(tmp_path / "run"), 2).latest() is None:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        ranks[1].kill()
        since = time.monotonic()
        _, said = ranks[0].communicate(timeout=60)
        assert time.monotonic() - since < 15
        assert ranks[0].returncode == LOST, said
        assert "lost rank 1 (its process ended); rank 0 was at: " in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


# ------------------------------------------------------------------------------------------------------- not finite


def whole(model: Any) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        parts = [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        state |= {f"{name}.{number}": part.detach().clone() for number, part in enumerate(parts)}
    return state


def overflows(rank: int, world_size: int, port: int, data: str, output: str, options: dict[str, Any]) -> Any:
    """Rank 1's loss overflows in the sixth step, and its gradients alone in the ninth."""
    from recgpt_torchrec.model.recgpt import Dense
    from recgpt_torchrec.training.trainer import Trainer

    loss_of, pipelined = Dense.sum_of_losses, Trainer._check_pipelined
    calls = iter(range(1, 10_000))
    seen: dict[str, Any] = {"unchanged": [], "users": [], "before": None}

    def loss(self: Dense, h: torch.Tensor, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if not self.training:
            return loss_of(self, h, outputs, batch)
        number = next(calls)
        if rank == 1 and number in (6, 9):
            seen["users"].append(sorted(set(batch.sequences.users.tolist())))
        if rank == 1 and number == 9:
            h.register_hook(lambda gradient: gradient * float("inf"))
        return loss_of(self, h, outputs, batch) * (float("inf") if rank == 1 and number == 6 else 1.0)

    def check(self: Trainer) -> None:  # right after each step
        pipelined(self)
        now = whole(self.model)
        if self.guard.found:
            seen["unchanged"].append(all(torch.equal(value, seen["before"][name]) for name, value in now.items()))
        elif seen["before"] is not None:
            assert not all(torch.equal(value, seen["before"][name]) for name, value in now.items())
        seen["before"] = now

    Dense.sum_of_losses = loss  # type: ignore[method-assign]
    Trainer._check_pipelined = check  # type: ignore[method-assign]
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


def test_steps_that_are_not_finite_change_nothing_and_are_named_with_their_rows(tmp_path, data):
    output = tmp_path / "run"
    options = {"non_finite": "skip", "non_finite_limit": 1}
    seen = run_ranks(overflows, 2, free_port(), data, str(output), options)
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
        assert "row group" in one["error"] and "step-00000008 is whole" in one["error"]
    progress = json.loads((output / "checkpoints/step-00000008/checkpoint.json").read_text())["progress"]
    assert math.isfinite(progress["loss"]) and progress["skipped"] == 1
    saved = kill_test.tensors(output).values()
    assert all(torch.isfinite(value).all() for value in saved if value.is_floating_point())


def test_by_default_the_first_step_that_is_not_finite_ends_the_run(tmp_path, data):
    seen = run_ranks(overflows, 2, free_port(), data, str(tmp_path / "run"), {"sharding": "data_parallel"})
    for one in seen:
        assert one["unchanged"] == [True]
        assert "step 6: not finite: the loss" in one["error"] and "--train.non_finite skip" in one["error"]


# ------------------------------------------------------------------------------------------------------------- kills


def test_a_run_whose_ranks_are_killed_goes_on_by_itself_to_the_same_end(tmp_path):
    hits, wrong = kill_test.kill_test(tmp_path, kills=1, per_run=1, epochs=4, seed=2)
    assert wrong == []
    assert hits
