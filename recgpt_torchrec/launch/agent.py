"""What torch's agent, which starts a node's ranks, does otherwise here: the only place that knows its private names."""

import functools
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from recgpt_torchrec.errors import REFUSED

LEAVE_SECONDS = 20.0
"""How long after its ranks have failed a launcher may take to tell the other nodes."""
LOOK_SECONDS = 1.0
"""Time between two looks at whether a rank has ended."""


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

    It asks the job's store every 0.1 s for news, and first of all tells it that it ends. Where the store's node is cut
    off, no answer comes and no error: torchrun was still there 150 s after its ranks had ended.

    Args:
        leave: ends the process; takes the number of a rank that failed, and its exit code.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    original, monitor = LocalElasticAgent._start_workers, LocalElasticAgent._monitor_workers

    def start_workers(self: Any, worker_group: Any) -> Any:
        self.rank_failures = {}
        pids = original(self, worker_group)
        ranks = {pids[worker.local_rank]: worker.global_rank for worker in worker_group.workers}
        threading.Thread(target=_leave_after, args=(self, ranks, leave), daemon=True, name="leaving").start()
        return pids

    def monitor_workers(self: Any, worker_group: Any) -> Any:
        result = monitor(self, worker_group)
        self.rank_failures = {rank: failure.exitcode for rank, failure in result.failures.items()}
        return result

    LocalElasticAgent._start_workers = start_workers  # type: ignore[method-assign]
    LocalElasticAgent._monitor_workers = monitor_workers  # type: ignore[method-assign]


def _leave_after(agent: Any, ranks: dict[int, int], leave: Callable[[int, int], None]) -> None:
    """Wait until all ranks have ended, and `LEAVE_SECONDS` more; then leave, if one failed and none is started again.

    Args:
        agent: of torch.
        ranks: the number of each rank by its process.
        leave: see `leave_in_time`.
    """
    ended: dict[int, int] = {}
    while len(ended) < len(ranks):
        time.sleep(LOOK_SECONDS)
        for pid in ranks.keys() - ended.keys():
            try:  # without reaping it, which is torch's part
                state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # torch has seen its end
                ended[pid] = 0
                continue
            if state is not None:
                ended[pid] = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
    time.sleep(LEAVE_SECONDS)
    failed = agent.rank_failures or {ranks[pid]: code for pid, code in ended.items() if code}
    if failed and not agent._remaining_restarts:
        leave(min(failed), failed[min(failed)])


def judge_nodes_by_own_clock() -> None:
    """Make torchrun take a node for lost when it has seen no new heartbeat of it for a while.

    torchrun itself compares the time in a heartbeat, by the clock of the node that sent it, with its own clock: nodes
    whose clocks differ by more than 15 s take each other for lost, and never start.
    """
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _BackendRendezvousStateHolder

    original = _BackendRendezvousStateHolder._sanitize

    @functools.wraps(original)
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
