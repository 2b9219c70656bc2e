"""Joins a job: meets the other ranks in the store, and learns who shares a node."""

import os
import socket
from datetime import timedelta
from threading import Event, Timer

import torch.distributed as dist

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.launcher import Launched
from recgpt_torchrec.progress import LOGGER

SAY_S = 10.0
"""Time after which a rank says that it has not found the place where ranks meet, in seconds."""
MAX_LISTED = 16
"""Maximum number of ranks that a message lists."""


class NotJoined(Exception):  # noqa: N818 (what has happened)
    """The store cannot be reached, or ranks did not come in time; the message says which."""


def meet(job: Launched, timeout_s: float) -> dist.Store:
    """Connect to the job's store and wait for the other ranks (collective).

    LOCAL_WORLD_SIZE and LOCAL_RANK, where the launcher has not set them, are set to what the host names of all ranks
    say: where the number of ranks per node is guessed, tables are placed wrongly.

    Args:
        job: what the launcher says of this process.
        timeout_s: how long to wait, in seconds.

    Raises:
        InputError: the ranks of a node are not consecutive, and their launcher has not set LOCAL_WORLD_SIZE.
        NotJoined: the store cannot be reached, or a rank did not come in time.
    """
    limit = timedelta(seconds=timeout_s)
    rank, world_size, host, port = job
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else a launcher serves the store
    found = Event()
    waiting = Timer(SAY_S, _say_waiting, (job, timeout_s, found))
    waiting.daemon = True
    waiting.start()
    try:
        # torch's own way to make it waits for the others too, and does not say which it has waited for.
        store = dist.TCPStore(
            host, port, world_size, is_master=serves, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise NotJoined(" ".join(str(error).split())) from None
    finally:
        found.set()
        waiting.cancel()
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
    return store


def _say_waiting(job: Launched, timeout_s: float, found: Event) -> None:
    """Say where this rank looks for the others, since it has not found the place for a while."""
    try:
        socket.getaddrinfo(job.host, job.port)
        unknown = ""
    except OSError:
        unknown = ", a name that this node cannot resolve"
    if found.is_set():  # while the name was looked up
        return
    LOGGER.info(
        f"rank {job.rank} of {job.world_size} waits for rank 0 at {job.host}:{job.port}{unknown} (MASTER_ADDR and "
        f"MASTER_PORT), {timeout_s:g} s at most"
    )


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
