"""Ranks that are stopped, lost or killed: the others end in time and name the lost rank, and the run resumes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from recgpt_torchrec import cli
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.distributed import watchdog
from recgpt_torchrec.distributed.processes import process_group
from recgpt_torchrec.distributed.watchdog import Watchdog
from recgpt_torchrec.errors import LOST, STALLED
from tests.distributed.fault_helpers import at_step, free_port, train, write_data
from tools.kill_test import TRAINING
from tools.ranks import RankFailed, run_ranks


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path / "data")


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


@pytest.mark.alone
def test_a_stopped_rank_is_named_by_the_others_and_the_run_ends_within_the_time_limit(tmp_path, data):
    output = tmp_path / "run"
    # Woken by SIGABRT, or by what it reads then; else it would stay.
    with pytest.raises(RankFailed, match=r"rank 1 failed first:\nit died with exit code (-6|70)"):
        run_ranks(stopped_by_the_system, 2, free_port(), data, str(output), timeout=60)
    assert time.time() - float(Path(f"{output}.since").read_text()) < 4 + 1.5
    assert Path(f"{output}.status").read_text() == str(STALLED)
    said = Path(f"{output}.rank0").read_text()
    assert "no progress for 4 s" in said and "rank 1: no heartbeat for" in said
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


@pytest.mark.alone
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
    assert "lost rank 1 (it ended with ValueError; on " in (tmp_path / "rank0").read_text()


def keeps_others_waiting(rank: int, world_size: int, port: int, folder: str) -> tuple[Any, float]:
    """What rank 0 ends with that waits for rank 1, and after how long; two seconds are allowed."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(f"{folder}/rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    status, since, ended = None, 0.0, Path(folder, "ended")
    try:
        with process_group(2.0), Watchdog(folder, stall_seconds=0):
            dist.barrier()
            since = time.monotonic()
            if rank == 0:
                dist.barrier()
            while not ended.exists() and time.monotonic() - since < 10:
                time.sleep(0.1)
    except SystemExit as end:
        status = end.code
    seconds = time.monotonic() - since
    ended.touch()
    return status, seconds


@pytest.mark.parametrize(
    "error",
    [
        "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.77.0.1]:4489",
        "Application timeout caused pair closure",  # of the nodes that are disconnected, after --train.timeout_seconds
        "Timed out waiting 30000ms for recv operation to complete",
    ],
)
def test_an_error_after_the_loss_of_another_rank_is_told_from_one_of_this_rank(error):
    assert watchdog._BROKEN.search(error)
    assert not watchdog._BROKEN.search("shape mismatch")


@pytest.mark.alone
def test_one_collective_operation_takes_no_longer_than_its_time_limit(tmp_path):
    ends = run_ranks(keeps_others_waiting, 2, free_port(), str(tmp_path))
    assert ends[0][0] == LOST and 1.5 < ends[0][1] < 8
    assert "lost the connection to another rank; rank 0 was at: starting" in (tmp_path / "rank0").read_text()


@pytest.mark.alone
def test_a_rank_that_is_killed_ends_the_other_within_seconds_which_says_so(tmp_path, data):
    options = {**TRAINING, "--data": data, "--output": tmp_path / "run", "--train.epochs": 1000}
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
        assert "lost rank 1 (its process ended; on " in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def gloo_threads() -> int:
    names = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
    return sum("gloo" in name for name in names)


@dataclass(kw_only=True)
class NoOptions:
    """A stage without options."""


def is_done(rank: int, world_size: int, port: int) -> tuple[int, int, list[str]]:
    """Threads of gloo during and after a stage whose groups are held in circles, and this program's own after it."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    during = 0

    def stage(config: NoOptions) -> None:
        nonlocal during
        with process_group(30.0), Watchdog(None, 60.0) as watched:
            watched.heartbeats.interval = 0.0  # type: ignore[union-attr] # its thread is mostly in the store
            circle: list[Any] = [dist.new_group()]
            circle.append(circle)
            dist.barrier(circle[0])
            during = gloo_threads()

    sys.argv = ["stage"]
    cli.run(NoOptions, stage, "stage")
    names = [each.name for each in threading.enumerate()]
    return during, gloo_threads(), [name for name in names if name in ("heartbeats", "watchdog", "store")]


def test_a_rank_that_is_done_leaves_no_thread_to_the_end_of_its_interpreter():
    """C++ aborts where a thread comes back to an interpreter that ends: status 134 after the result was there."""
    for during, after, own in run_ranks(is_done, 2, free_port()):
        assert during > 0 and after == 0 and own == []
