import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tools.ranks import RankFailed, run_ranks


def sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, total


def rank_1_fails_while_rank_0_waits(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def rank_1_dies_while_rank_0_waits(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def rank_1_never_comes(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)
    dist.barrier()


def environment(rank: int, world_size: int) -> tuple[str, str, str, int, str]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MINE"], torch.get_num_threads(), os.getcwd()


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: None


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_results_come_back_by_rank_from_a_working_process_group():
    results = run_ranks(sum_of_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(total, torch.tensor([33])) for _, total in results)


def test_ranks_see_torchruns_variables_the_callers_environment_and_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MINE", "yes")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(environment, 2) == [(str(rank), "2", "yes", 1, str(tmp_path)) for rank in range(2)]


def test_a_failing_rank_shows_its_traceback_at_once_while_the_other_hangs():
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed first.*raise KeyError.*the cause") as failure:
        run_ranks(rank_1_fails_while_rank_0_waits, 2, timeout=100)
    assert failure.value.rank == 1
    assert time.monotonic() - started < 50


def test_a_rank_that_dies_without_an_exception_is_named_with_its_exit_code():
    with pytest.raises(RankFailed, match="rank 1 failed first:\nit died with exit code 7"):
        run_ranks(rank_1_dies_while_rank_0_waits, 2, timeout=100)


def test_a_result_that_cannot_be_pickled_is_an_error_and_no_hang():
    with pytest.raises(RankFailed, match="pickle"):
        run_ranks(unpicklable, 1, timeout=100)


@pytest.mark.alone
def test_the_time_limit_kills_every_rank_and_shows_where_each_was(tmp_path):
    run_ranks(sum_of_ranks, 1, 0)  # starts the fork server, whose time must not count in the limit below
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0, 1\] of 2.*rank 1:.*rank_1_never_comes"):
        run_ranks(rank_1_never_comes, 2, tmp_path, timeout=8)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert not any(is_alive(pid) for pid in pids)
