"""What a rank may allocate: the machine's free memory or the container's limit, shared by the node's processes."""

import torch

from recgpt_torchrec.distributed import memory

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
