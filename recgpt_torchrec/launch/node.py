"""What runs once on each node of a job: torchrun, with threads that fit the machine and one line when a rank fails.

`python -m recgpt_torchrec.launch.node <options of torchrun> -m MODULE <options of MODULE>` is `torchrun ...` with three
differences. Where `OMP_NUM_THREADS` is not set, each process gets its share of the cores (torchrun gives it one).
Where torchrun ends with its own traceback, which buries what the failed rank said, this ends with one line.
And a signal that asks the job to end (SIGTERM, SIGUSR1) is passed on to the ranks, which then have the time they need
to save, as far as the scheduler gives it; the status is 75 then, which tells schedulers to try again.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from recgpt_torchrec.errors import REFUSED, STOP_SIGNALS, STOPPED

LAST_WORDS_SECONDS = 0.3
"""torchx's local scheduler copies output every 0.1 s and may lose what came after the last copy before the exit."""
SHUTDOWN_SECONDS = 600
"""How long ranks that were asked to end may take, unless `--shutdown_timeout` says so: schedulers have their own limit
and kill what is left, so this one must not be shorter."""
HINTS = {
    "SIGKILL": " (is there enough memory? the system kills what takes too much)",
    "SIGABRT": " (by another rank, if that said above that nothing moved any more)",
}


def main() -> None:
    """Run torchrun on this process's arguments; exit with the status of the first rank that failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Its one message, "failed (exitcode: ...)", is what the line below says.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    renew_store_at_each_start()
    args = run.parse_args(sys.argv[1:])
    if args.nproc_per_node.isdigit():
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(available_cores(), int(args.nproc_per_node))))
    if "SIGUSR1" not in args.signals_to_handle:
        args.signals_to_handle += ",SIGUSR1"
    if args.shutdown_timeout is None:
        args.shutdown_timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS))
    status = 0
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        how = "stopped" if status == STOPPED else "failed"
        print(f"{args.training_script} {how}: {describe(rank, failure.exitcode)}", file=sys.stderr, flush=True)
    except SignalException as asked:
        status = STOPPED if asked.sigval in STOP_SIGNALS else 128 + asked.sigval
        name = signal.Signals(asked.sigval).name
        print(f"{args.training_script} ended by {name}; its status is {status}", file=sys.stderr, flush=True)
    time.sleep(LAST_WORDS_SECONDS)
    sys.exit(status)


def renew_store_at_each_start() -> None:
    """Let torchrun make a new store each time that it starts the processes.

    torch 2.13 keeps the first one, and a rank that was started again then finds the address of a process that is gone:
    "Gloo connectFullMesh failed ... Connection refused", seen after a rank was killed while the group was made.
    """
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    meet = DynamicRendezvousHandler.next_rendezvous

    def next_rendezvous(self: Any) -> Any:
        self._bootstrap_store_info = self._shared_tcp_store_server = None
        return meet(self)

    DynamicRendezvousHandler.next_rendezvous = next_rendezvous  # type: ignore[method-assign]


def describe(rank: int, exit_code: int) -> str:
    """How the first failing rank ended, in words; a negative `exit_code` is the signal that killed it."""
    if exit_code == STOPPED:
        return f"rank {rank} or another was asked to end by a signal; the same command goes on"
    if exit_code >= 0:
        who = f"[{rank}]" if rank == 0 or exit_code != REFUSED else f"[{rank}] or [0]"  # rank 0 says what options lack
        return f"rank {rank} ended with exit status {exit_code}; what it said stands above, behind {who}"
    name = signal.Signals(-exit_code).name
    return f"rank {rank} was killed by {name}{HINTS.get(name, '')}"


def threads_per_process(cores: int, processes: int) -> int:
    """The even share of `cores`, at least one."""
    return max(1, cores // processes)


def available_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: by its affinity (Slurm, taskset) and by its cgroup's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


if __name__ == "__main__":
    main()
