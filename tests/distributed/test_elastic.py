"""A job of one to two nodes loses one, goes on with the other, and with two again, and trains everything once."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from recgpt_torchrec.errors import STOPPED
from tests.distributed.fault_helpers import free_port
from tests.support import stage
from tools import elastic
from tools.ranks import run_ranks


def undisturbed(rank: int, world_size: int, port: int, folder: str) -> int:
    dist.barrier()
    connected = dist.group.WORLD
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = stage("pretrain", elastic.options_of(Path(folder), "undisturbed"))
    del connected
    return status


@pytest.mark.alone
def test_a_run_that_loses_a_node_and_gets_another_trains_each_target_once_an_epoch(tmp_path):
    happened, said, trained, wanted = elastic.run(tmp_path)
    assert [text for text, _ in happened] == [
        "two ranks train",
        "one rank goes on",
        "the job has ended, status 0 and 0",
    ], said
    assert trained == wanted and sum(wanted.values()) > 1000
    assert said.count("Stopped after step") == 2 and f"exit status {STOPPED}" not in said
    assert "rank 1: the launcher is gone; stopping the run" in said
    on = [line.split("Training on ")[1].split(",")[0] for line in said.splitlines() if "Training on" in line]
    assert on == ["2 ranks", "1 rank", "2 ranks"]
    assert run_ranks(undisturbed, 2, free_port(), str(tmp_path)) == [0, 0]
    # Steps end where a node was lost or came, so that batches are others.
    assert elastic.last_loss(tmp_path, "run") == pytest.approx(elastic.last_loss(tmp_path, "undisturbed"), abs=0.1)
