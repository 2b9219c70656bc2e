"""Joins a job: reads the launcher's environment, meets the other ranks in the store, and learns who shares a node."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from recgpt_torchrec.errors import InputError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets beside WORLD_SIZE. Without LOCAL_RANK and LOCAL_WORLD_SIZE they are found from host names."""
OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""In which variable launchers that do not set WORLD_SIZE tell the number of processes."""
MAX_LISTED = 16
"""Maximum number of ranks that a message lists."""


class NotJoined(Exception):  # noqa: N818 (what has happened)
    """The store cannot be reached, or ranks did not come in time; the message says which."""


def is_launched() -> bool:
    """Whether a launcher has started this process as one of a job's ranks.

    Raises:
        InputError: one has started several processes and does not tell them of each other, or not enough.
    """
    if "WORLD_SIZE" in os.environ:
        if missing := [name for name in NEEDED if not os.environ.get(name)]:
            raise InputError(
                f"WORLD_SIZE is set, but not {' and '.join(missing)}; start the stage with torchrun, which sets all of "
                "them, or unset WORLD_SIZE to run one process"
            )
        return True
    for name, launcher in OTHER_LAUNCHERS.items():
        if (count := os.environ.get(name, "1")) not in ("", "0", "1"):
            raise InputError(
                f"{launcher} started {count} processes ({name}), but without WORLD_SIZE each would do all the work; "
                "start torchrun, once per node (srun --ntasks-per-node=1 torchrun ...), or set WORLD_SIZE, RANK, "
                "MASTER_ADDR and MASTER_PORT"
            )
    return False


def meet(timeout_s: float) -> tuple[dist.Store, int, int]:
    """Connect to the job's store and wait for the other ranks (collective).

    LOCAL_WORLD_SIZE and LOCAL_RANK, where the launcher has not set them, are set to what the host names of all ranks
    say: where the number of ranks per node is guessed, tables are placed wrongly.

    Args:
        timeout_s: how long to wait, in seconds.

    Returns:
        The store, this process's rank, and the number of ranks.

    Raises:
        InputError: the ranks of a node are not consecutive, and their launcher has not set LOCAL_WORLD_SIZE.
        NotJoined: the store cannot be reached, or a rank did not come in time.
    """
    limit = timedelta(seconds=timeout_s)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else a launcher serves the store
    try:
        # torch's own way to make it waits for the others too, and does not say which it has waited for.
        store = dist.TCPStore(
            host, port, world_size, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise NotJoined(" ".join(str(error).split())) from None
    keys = [f"joined/{each}" for each in range(world_size)]
    try:
        store.set(keys[rank], socket.gethostname())
        store.wait(keys, limit)
        hosts = [host.decode() for host in store.multi_get(keys)]
    except RuntimeError as error:
        raise NotJoined(_describe_missing(store, keys, timeout_s, error)) from None
    local_rank, local_world_size = _place(hosts, rank)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(local_world_size))
    return store, rank, world_size


def _describe_missing(store: dist.Store, keys: list[str], timeout_s: float, error: RuntimeError) -> str:
    try:
        missing = [str(each) for each, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        missing = []
    if not missing:
        return " ".join(str(error).split())
    listed = ", ".join(missing[:MAX_LISTED]) + (f" and {len(missing) - MAX_LISTED} more" * (len(missing) > MAX_LISTED))
    return f"rank {listed} did not join within {timeout_s:g} s"


def _place(hosts: list[str], rank: int) -> tuple[int, int]:
    """The number of a rank on its host, and how many ranks the host has.

    Args:
        hosts: of each rank.
        rank: whose place is asked for.

    Raises:
        InputError: the ranks of a host are not consecutive, and LOCAL_WORLD_SIZE is not set.
    """
    here = [each for each, host in enumerate(hosts) if host == hosts[rank]]
    if "LOCAL_WORLD_SIZE" not in os.environ and here[-1] - here[0] >= len(here):
        raise InputError(
            f"the ranks of {hosts[rank]} are not consecutive ({', '.join(map(str, here[:MAX_LISTED]))}); start "
            "processes node by node (srun --distribution=block, mpirun --map-by slot), or start them with torchrun"
        )
    return here.index(rank), len(here)
