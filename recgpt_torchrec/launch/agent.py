"""What torch's agent, which starts a node's ranks, does otherwise here: the only place that knows its private names."""

from typing import Any

from recgpt_torchrec.errors import REFUSED


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
