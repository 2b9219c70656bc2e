"""What torch's agent, which starts a node's ranks, does otherwise here: the only place that knows its private names."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from recgpt_torchrec.errors import REFUSED

LEAVE_SECONDS = 20.0
"""How long after its ranks have failed a launcher may take to tell the other nodes."""


def renew_store_at_each_start() -> None:
    """Make torchrun create a new store each time it starts the processes.

    torch 2.13 keeps the first store, where a restarted rank finds the address of a process that is gone: "Gloo
    connectFullMesh failed ... Connection refused", seen after a rank was killed while the process group was created.
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives a new store as well, but in the process of rank 0: when that is lost, the
    other ranks can no longer read which rank was, and why.
    """
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    original = DynamicRendezvousHandler.next_rendezvous

    def next_rendezvous(self: Any) -> Any:
        self._bootstrap_store_info = self._shared_tcp_store_server = None
        return original(self)

    DynamicRendezvousHandler.next_rendezvous = next_rendezvous  # type: ignore[method-assign]


def start_no_refused_run_again() -> None:
    """Make torchrun end a job of which a rank was refused: no further start can help.

    torchrun itself starts the processes again after any failure, up to `--max_restarts` times.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    original = LocalElasticAgent._monitor_workers

    def monitor_workers(self: Any, worker_group: Any) -> Any:
        result = original(self, worker_group)
        if any(failure.exitcode == REFUSED for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = monitor_workers  # type: ignore[method-assign]


def leave_in_time(leave: Callable[[int, int], None]) -> None:
    """Make torchrun end soon after its ranks have failed, where it does not start them again.

    It tells the other nodes through the store. Where the store's node is cut off, that waits until the system gives
    the connection up, which took longer than 150 s.

    Args:
        leave: ends the process; takes the number of the first rank that failed, and its exit code.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    original = LocalElasticAgent._monitor_workers

    def monitor_workers(self: Any, worker_group: Any) -> Any:
        result = original(self, worker_group)
        if result.failures and not self._remaining_restarts:
            rank, failure = min(result.failures.items(), key=lambda each: each[1].timestamp)
            timer = threading.Timer(LEAVE_SECONDS, leave, (rank, failure.exitcode))
            timer.daemon = True
            timer.start()
        return result

    LocalElasticAgent._monitor_workers = monitor_workers  # type: ignore[method-assign]


def judge_nodes_by_own_clock() -> None:
    """Make torchrun take a node for lost when it has seen no new heartbeat of it for a while.

    torchrun itself compares the time in a heartbeat, by the clock of the node that sent it, with its own clock: nodes
    whose clocks differ by more than 15 s take each other for lost, and never start.
    """
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _BackendRendezvousStateHolder

    original = _BackendRendezvousStateHolder._sanitize

    def sanitize(self: Any) -> None:
        state, now, current = self._state, time.monotonic(), datetime.now(UTC)
        sent = dict(state.last_heartbeats)
        earlier = getattr(self, "seen_heartbeats", {})
        self.seen_heartbeats = {
            node: earlier[node] if node in earlier and earlier[node][0] == at else (at, now)
            for node, at in sent.items()
        }
        state.last_heartbeats = {
            node: current - timedelta(seconds=now - seen) for node, (_, seen) in self.seen_heartbeats.items()
        }
        original(self)
        state.last_heartbeats = {node: sent[node] for node in state.last_heartbeats}

    _BackendRendezvousStateHolder._sanitize = sanitize  # type: ignore[method-assign]
