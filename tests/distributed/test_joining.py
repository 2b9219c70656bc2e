"""Ranks join a job: which of them share a node is found where no launcher says so, and who does not come is named."""

import os
import socket
import time
from typing import Any

import pytest
import torch.distributed as dist

from recgpt_torchrec.distributed.group import joining
from recgpt_torchrec.distributed.processes import local_world_size, process_group
from recgpt_torchrec.errors import LOST, InputError, StorageError
from tests.distributed.fault_helpers import free_port
from tools.ranks import run_ranks

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(rank: int, world_size: int, port: int, hosts: list[str]) -> tuple[Any, ...]:
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    socket.gethostname = lambda: hosts[rank]
    try:
        with process_group(30.0):
            found = os.environ["LOCAL_RANK"], local_world_size(), os.environ["LOCAL_WORLD_SIZE"]
            dist.barrier()
    except InputError as error:
        return (str(error),)
    return found


def test_ranks_that_share_a_node_are_found_where_no_launcher_says_so():
    """As mpirun or srun start them with RANK and WORLD_SIZE alone; by 4 to a node, tables would be placed wrongly."""
    found = run_ranks(join, 4, free_port(), ["a", "a", "b", "b"])
    assert found == [("0", 2, "2"), ("1", 2, "2"), ("0", 2, "2"), ("1", 2, "2")]


def test_ranks_of_a_node_that_are_not_consecutive_are_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match=r"the ranks of a are not consecutive \(0, 2\); .*srun --distribution=block"):
        joining._place(["a", "b", "a", "b"], 0)
    assert joining._place(["b", "a", "a", "a"], 2) == (1, 3)


def misses(rank: int, world_size: int, port: int, folder: str) -> Any:
    """What rank 0 ends with, which rank 1 never joins."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 1:
        dist.barrier()
        return None
    connected = dist.group.WORLD
    os.dup2(os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT), 2)
    status = None
    try:
        with process_group(1.5):
            pass
    except SystemExit as end:
        status = end.code
    dist.barrier(connected)
    return status


def test_a_rank_that_does_not_join_is_named_in_time(tmp_path):
    assert run_ranks(misses, 2, free_port(), str(tmp_path)) == [LOST, None]
    assert "rank 0 cannot reach the other ranks: rank 1 did not join within 1.5 s" in (tmp_path / "said").read_text()


def refuses(rank: int, world_size: int, port: int, texts: list[str], kind: type[Exception]) -> Any:
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with process_group(30.0):
            error = kind(texts[rank])
            if kind is StorageError:
                error.identity, error.args = texts[rank], (f"{texts[rank]}, {rank} MiB free",)  # type: ignore[attr-defined]
            raise error
    except (InputError, OSError) as error:
        if rank == 0:
            time.sleep(2)  # it serves the store
        return error.is_told  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [InputError, OSError, StorageError])
def test_what_all_ranks_refuse_one_of_them_says(kind):
    assert run_ranks(refuses, 3, free_port(), ["no data", "no data", "row 7 is damaged"], kind) == [False, True, False]
