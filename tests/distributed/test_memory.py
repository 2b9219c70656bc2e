"""What a rank may allocate: the machine's free memory or the container's limit, shared by the node's processes."""

import itertools
import socket

import pytest
import torch

from recgpt_torchrec.checkpoints.records import tensors_of
from recgpt_torchrec.checkpoints.state import state_of
from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.bags import tables_of
from recgpt_torchrec.distributed import memory
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.model.recgpt import RecGPT
from tests.support import SMALL, stage, walks, write_dataset
from tools.ranks import run_ranks
from tools.reshard import DIM, ITEMS, USERS, Layout, build_model

CPU = torch.device("cpu")


def test_available_memory_is_shared_by_the_processes_of_a_node(monkeypatch):
    monkeypatch.setattr(memory, "_of_machine", lambda: 1000)
    monkeypatch.setattr(memory, "_of_container", lambda: 2**62)
    assert memory.available_bytes(CPU) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_bytes(CPU) == 250


def test_a_container_limits_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_of_machine", lambda: 10_000)
    assert memory.available_bytes(CPU) == 10_000, "no limit is known"
    for name, text in {"max": "5000\n", "current": "3000\n", "stat": "anon 1000\nfile 2000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_bytes(CPU) == 5000 - 3000 + 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(CPU) == 10_000


SHARDINGS = ["data_parallel", "table_wise", "column_wise", "row_wise"]
OPTIMIZERS = ["rowwise_adagrad", "adagrad", "adam", "sgd"]


def count_bytes(rank: int, world_size: int) -> list[tuple[str, str, int, int]]:
    """Bytes that this rank needs by each plan, and those of the tables and moments that it then has."""
    silence_libraries()
    counted = []
    unsharded = RecGPT(Model(dim=DIM, heads=2, layers=1), Loss(), USERS, ITEMS)
    for sharding, kind in itertools.product(SHARDINGS, OPTIMIZERS):
        model, optimizer = build_model(Layout(world_size, sharding, kind))
        needed = memory.table_bytes(model.plan, unsharded, kind)
        assert not any(where == "host" for _, where in needed)
        state = state_of(model, optimizer)["optimizer"]["state"]
        moments = {name: values for name, values in state.items() if "embedding_bags" in name}
        tensors = tensors_of({"tables": tables_of(model), "moments": moments})
        counted.append((sharding, kind, needed[rank, "device"], sum(each.nbytes for each in tensors if each.dim())))
    return counted


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_plan_tells_how_many_bytes_each_rank_will_hold(ranks):
    for counted in run_ranks(count_bytes, ranks):
        for sharding, kind, needed, held in counted:
            gradients = (USERS + ITEMS) * DIM * 4 if sharding == "data_parallel" else 0
            if kind == "adam" and sharding != "data_parallel":  # on CPU torch updates them, from whole gradients
                gradients = held // 3
            assert needed == held + gradients, (sharding, kind)


def shortages(rank: int, world_size: int, available: list[int]) -> list[memory.Shortage | None]:
    memory.available_bytes = lambda device: available[rank]
    return [memory.find_shortage(needed, CPU) for needed in (10, 20, (1, 25)[rank], (1, 35)[rank])]


def test_ranks_of_a_node_share_its_memory_and_all_know_of_a_shortage():
    for found in run_ranks(shortages, 2, [15, 15]):
        assert [each is None for each in found] == [True, False, True, False]
        assert (found[1].needed, found[1].available, found[3].needed) == (40, 30, 36)
        assert found[1].place == socket.gethostname()


def test_tables_that_do_not_fit_are_refused_before_training(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / "data", walks(40, 30))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3000)
    options = {**SMALL, "--data": tmp_path / "data", "--output": tmp_path / "run"}
    assert stage("pretrain", options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the tables and their optimizer state need " in said and "where 3,000 are available. Use more ranks" in said
    assert not (tmp_path / "run").exists()
