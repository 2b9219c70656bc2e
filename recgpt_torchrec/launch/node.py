"""The launcher of a job, run once on each node: torchrun with a fitting number of threads and one line for a failure.

`python -m recgpt_torchrec.launch.node <options of torchrun> -m MODULE <options of MODULE>` differs from `torchrun ...`
in these ways. If `OMP_NUM_THREADS` is not set, each process gets its share of the cores (torchrun gives it one). If a
rank fails, the last line says how; torchrun's own traceback would bury the messages of that rank. A signal that asks
the job to end (SIGTERM, SIGUSR1) is passed on to the ranks, which have time to save, as far as the scheduler allows;
the exit status is then 75, which tells schedulers to try again. What was refused (status 2) is not started again. And
nodes meet at a port that follows from the job's id, where the endpoint's is 0.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from recgpt_torchrec.errors import LOST, REFUSED, STOP_SIGNALS, STOPPED
from recgpt_torchrec.launch.agent import (
    judge_nodes_by_own_clock,
    leave_in_time,
    renew_store_at_each_start,
    start_no_refused_run_again,
)
from recgpt_torchrec.launch.arguments import unpack

LAST_WORDS_SECONDS = 0.3
"""Wait before the exit: torchx's local scheduler copies output every 0.1 s and may lose what is printed at the end."""
SHUTDOWN_SECONDS = 600
"""Default of `--shutdown_timeout`: how long ranks may take to end after a signal. It must not be shorter than the
scheduler's own limit, after which the scheduler kills them."""
QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
"""Where a container finds its share of the cores."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Range of ports from which a job of several nodes takes one."""
RENDEZVOUS = {"last_call_timeout": 15}
"""Defaults of `--rdzv_conf`. A node is lost after 3 heartbeats of 5 s; then the others wait this long for more nodes
before they go on, torch for 30 s."""
HINTS = {
    "SIGKILL": " (is there enough memory? the system kills a process that takes too much)",
    "SIGABRT": " (by another rank, if that rank reported above that the run made no progress)",
}
"""What may have sent a signal that killed a rank, by its name."""


def main() -> None:
    """Run torchrun with this process's arguments, and exit with the status of the first rank that failed."""
    # Else a store that is closed is reported with a stack of C++ for each connection to it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    # This logger's only message, "failed (exitcode: ...)", would repeat the line printed below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # It warns when it cannot close the rendezvous, after the node that serves it has ended.
    logging.getLogger("torch.distributed.elastic.rendezvous.dynamic_rendezvous").setLevel(logging.ERROR)
    renew_store_at_each_start()
    start_no_refused_run_again()
    judge_nodes_by_own_clock()
    args = run.parse_args(guard_arguments(sys.argv[1:]))
    leave_in_time(lambda rank, exit_code: os._exit(report_failed_rank(args.training_script, rank, exit_code)))
    if args.nproc_per_node.isdigit():
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(available_cores(), int(args.nproc_per_node))))
    if args.nnodes != "1" and not args.standalone and args.rdzv_backend == "c10d":
        args.rdzv_endpoint = with_port(args.rdzv_endpoint, args.rdzv_id)
        given = [pair for pair in args.rdzv_conf.split(",") if pair]
        args.rdzv_conf = ",".join([*(f"{name}={value}" for name, value in RENDEZVOUS.items()), *given])
    if "SIGUSR1" not in args.signals_to_handle:
        args.signals_to_handle += ",SIGUSR1"
    if args.shutdown_timeout is None:
        args.shutdown_timeout = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS))
    status = 0
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = report_failed_rank(args.training_script, rank, failure.exitcode)
    except SignalException as asked:
        status = STOPPED if asked.sigval in STOP_SIGNALS else 128 + asked.sigval
        name = signal.Signals(asked.sigval).name
        print(f"{args.training_script} was ended by {name}; exit status {status}", file=sys.stderr, flush=True)
    except RendezvousError as error:
        status = LOST
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"the nodes of the job, which meet at {args.rdzv_endpoint}"
        print(f"{args.training_script} failed: lost {where}: one has ended it, or is gone ({reason})", file=sys.stderr)
    if status == REFUSED:
        forbid_requeue()
    time.sleep(LAST_WORDS_SECONDS)
    sys.exit(status)


def report_failed_rank(module: str, rank: int, exit_code: int) -> int:
    """Print how the first failing rank ended; returns the launcher's exit status.

    Args:
        module: of the stage.
        rank, exit_code: see `describe`.
    """
    status = exit_code if exit_code > 0 else 128 - exit_code
    outcome = "stopped" if status == STOPPED else "failed"
    print(f"{module} {outcome}: {describe(rank, exit_code)}", file=sys.stderr, flush=True)
    return status


def guard_arguments(words: list[str]) -> list[str]:
    """The words with `--` before the module, so that torchrun does not take the module's options for its own, which
    are as they were given to the job (see `arguments`).

    Python 3.11's argparse looks at all words, and torchrun's would call `--event buy` a short form of several options.
    """
    place = words.index("-m") + 1 if "-m" in words else len(words)
    if place == len(words):
        return words
    place += words[place] == "--"
    return [*words[:place], *([] if words[place - 1] == "--" else ["--"]), *map(_whole, words[place:])]


def _whole(word: str) -> str:
    """A word of a job so that the stage gets it as it was given: torchrun reads `$` in its own way as well."""
    return unpack(word).replace("$", "$$")


def with_port(endpoint: str, job_id: str) -> str:
    """The address where nodes meet; the port 0 becomes one that follows from the job's id, the same on every node.

    Two jobs on one node then have different ports, but for 1 pair in 12,000. Linux gives the ports above 32,767 to
    connections.
    """
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{FIRST_PORT + zlib.crc32(job_id.encode()) % PORTS}" if host and port == "0" else endpoint


def forbid_requeue() -> None:
    """Tell Slurm not to start this job again: torchx's script asks for it after any failure (`--max_retries`)."""
    job = os.environ.get("SLURM_HET_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get("TORCHX_MAX_RETRIES", "0") != "0":
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scontrol", "update", f"JobId={job}", "Requeue=0"], capture_output=True, timeout=30)


def describe(rank: int, exit_code: int) -> str:
    """How the first failing rank ended, in words.

    Args:
        rank: its number.
        exit_code: its exit status; if negative, the signal that killed it.
    """
    if exit_code == STOPPED:
        return f"rank {rank} or another received a stop signal; the same command resumes"
    if exit_code >= 0:
        # What all ranks refuse one of them prints, mostly rank 0.
        prefix = f"[{rank}]" if rank == 0 or exit_code != REFUSED else f"[{rank}] or another rank's number"
        return f"rank {rank} ended with exit status {exit_code}; its messages are above, after {prefix}"
    name = signal.Signals(-exit_code).name
    return f"rank {rank} was killed by {name}{HINTS.get(name, '')}"


def threads_per_process(cores: int, processes: int) -> int:
    """Number of threads for each process: an even share of the cores, at least one."""
    return max(1, cores // processes)


def available_cores() -> int:
    """Number of cores this process may use: by its affinity (Slurm, taskset) and its cgroup's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA_FILE.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


if __name__ == "__main__":
    main()
