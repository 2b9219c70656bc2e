"""Stages that do not train end in time too when a rank is stopped, and are not taken for stalled while they compute."""

import ast
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from recgpt_torchrec.config.stages import STAGES, module_of
from recgpt_torchrec.distributed import watchdog
from recgpt_torchrec.distributed.watchdog import Watchdog, watched_group
from recgpt_torchrec.errors import STALLED
from tests.distributed.fault_helpers import free_port
from tests.support import SMALL, stage
from tools.ranks import RankFailed, run_ranks
from tools.small_run import walks, write_dataset

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_joins_a_process_group_only_with_a_watchdog(name):
    tree = ast.parse((ROOT / f"{module_of(name).replace('.', '/')}.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert ("process_group" in called) == ("Watchdog" in called)
    assert not {"process_group", "watched_group"} <= called


def stops_in_a_stage(rank: int, world_size: int, port: int, folder: str, options: dict[str, Any]) -> Any:
    """The stage `evaluate`, of which rank 1 is stopped by the system while it ranks users."""
    dist.barrier()
    connected = dist.group.WORLD
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.dup2(os.open(f"{folder}/rank{rank}", os.O_WRONLY | os.O_CREAT), 2)
    report = watchdog.report_phase

    def stop(phase: str, step: int | None = None) -> None:
        report(phase, step)
        if phase == "ranking users" and rank == 1:
            time.sleep(1)  # until a heartbeat says so
            Path(folder, "since").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)

    def late(status: int) -> None:
        Path(folder, "status").write_text(f"{status} {time.time()}")
        time.sleep(5)  # so that what becomes of the other is seen before

    watchdog.report_phase = stop
    if rank == 0:
        os._exit = late  # type: ignore[assignment]
    status = stage("evaluate", options)
    del connected
    return status


@pytest.mark.alone
def test_a_stage_whose_rank_is_stopped_ends_in_time_names_it_and_leaves_no_result(tmp_path):
    write_dataset(tmp_path / "data", walks(60, 20, longest=9), items=20)
    run = {"--data": tmp_path / "data", "--output": tmp_path / "run", **SMALL, "--train.epochs": 1}
    assert stage("pretrain", run) == 0
    options = {"--data": tmp_path / "data", "--checkpoint": tmp_path / "run", "--output": tmp_path / "test.json"}
    words = {name: str(value) for name, value in {**options, "--stall_seconds": 4}.items()}
    with pytest.raises(RankFailed, match=r"rank 1 failed first:\nit died with exit code (-6|70)"):
        run_ranks(stops_in_a_stage, 2, free_port(), str(tmp_path), words, timeout=60)
    status, ended = (tmp_path / "status").read_text().split()
    assert int(status) == STALLED
    assert float(ended) - float((tmp_path / "since").read_text()) < 4 + 1.5
    said = (tmp_path / "rank0").read_text()
    assert re.search(r"rank 1: no heartbeat for \d s; it was at: ranking users, after step 0, on ", said)
    assert not (tmp_path / "test.json").exists()


def works_beside_a_stopped_rank(rank: int, world_size: int, port: int) -> None:
    """Rank 0 makes progress all the time, and so would wait for the lost rank only at the end of its work."""
    connected = dist.group.WORLD
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with watched_group(stall_seconds=3):
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            watchdog.beat()
            time.sleep(0.05)
    del connected


@pytest.mark.alone
def test_a_rank_that_works_for_hours_does_not_hide_that_another_is_stopped():
    since = time.monotonic()
    with pytest.raises(RankFailed, match=r"it died with exit code (-6|70)"):
        run_ranks(works_beside_a_stopped_rank, 2, free_port(), timeout=40)
    assert time.monotonic() - since < 20


def computes(rank: int, world_size: int, seconds: float) -> str:
    """One long computation on rank 1 without a report of progress, for which rank 0 waits; one second is allowed."""
    with Watchdog(None, stall_seconds=1.5):
        if rank == 1:
            with watchdog.phase("building", computes=True):
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    sum(range(1000))
        dist.barrier()
    return "done"


@pytest.mark.alone
def test_cpu_time_is_progress_of_a_rank_that_computes_and_of_those_that_wait_for_it():
    assert run_ranks(computes, 2, 4.0) == ["done", "done"]
