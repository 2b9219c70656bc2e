"""What torch's agent does otherwise here."""

import inspect
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from recgpt_torchrec.launch import agent


class Holder:
    """What `_sanitize` reads of a state holder of torchrun."""

    def __init__(self) -> None:
        self._settings = SimpleNamespace(
            keep_alive_interval=timedelta(seconds=5), keep_alive_max_attempt=3, min_nodes=2
        )
        self._state: Any = dynamic_rendezvous._RendezvousState()
        self.now = 100.0

    def hear(self, **heartbeats: datetime) -> set[str]:
        """Sanitize with the newest heartbeat of each node; returns the nodes that are not lost."""
        self._state.last_heartbeats = dict(heartbeats)
        self._state.participants = dict.fromkeys(heartbeats, 0)
        dynamic_rendezvous._BackendRendezvousStateHolder._sanitize(self)  # type: ignore[arg-type]
        assert all(self._state.last_heartbeats[node] == heartbeats[node] for node in self._state.last_heartbeats)
        return {*self._state.participants}


def test_a_node_is_lost_when_no_new_heartbeat_comes_whatever_its_clock_says(monkeypatch):
    holder_type = dynamic_rendezvous._BackendRendezvousStateHolder
    # A launcher that another test has started in this process has replaced it.
    monkeypatch.setattr(holder_type, "_sanitize", inspect.unwrap(holder_type._sanitize))
    now = datetime.now(UTC)
    behind, ahead = now - timedelta(hours=30), now + timedelta(hours=30)
    assert Holder().hear(behind=behind, ahead=ahead) == {"ahead"}  # torch's own: the node before is taken for lost
    agent.judge_nodes_by_own_clock()
    holder = Holder()
    monkeypatch.setattr(agent.time, "monotonic", lambda: holder.now)
    second = timedelta(seconds=1)
    assert holder.hear(behind=behind, ahead=ahead) == {"behind", "ahead"}
    holder.now += 10
    assert holder.hear(behind=behind + 10 * second, ahead=ahead) == {"behind", "ahead"}
    holder.now += 10
    assert holder.hear(behind=behind + 20 * second, ahead=ahead) == {"behind"}


@pytest.mark.parametrize("reaped", [False, True])
@pytest.mark.parametrize(("code", "restarts", "leaves"), [(3, 0, [(5, 3)]), (3, 1, []), (0, 0, [])])
def test_a_launcher_whose_ranks_have_failed_leaves_although_the_store_does_not_answer(
    monkeypatch, code, restarts, leaves, reaped
):
    """Of an agent of torch that has started a rank, and may have seen its end."""
    rank = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    failures = {5: SimpleNamespace(exitcode=code)} if code else {}
    monkeypatch.setattr(LocalElasticAgent, "_start_workers", lambda self, group: {0: rank.pid})
    monkeypatch.setattr(LocalElasticAgent, "_monitor_workers", lambda self, group: SimpleNamespace(failures=failures))
    monkeypatch.setattr(agent, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(agent, "LOOK_SECONDS", 0.05)
    left: list[Any] = []
    agent.leave_in_time(lambda *end: left.append(end))
    started: Any = SimpleNamespace(_remaining_restarts=restarts)
    group: Any = SimpleNamespace(workers=[SimpleNamespace(local_rank=0, global_rank=5)])
    LocalElasticAgent._start_workers(started, group)
    (thread,) = [each for each in threading.enumerate() if each.name == "leaving"]
    if reaped:
        rank.wait()
        LocalElasticAgent._monitor_workers(started, group)
    thread.join(20)
    assert not thread.is_alive() and left == leaves
    rank.wait()
