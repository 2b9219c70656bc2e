"""The process group of a run: one process or many, gloo on CPU or NCCL on CUDA, from the launcher's environment."""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from recgpt_torchrec.errors import LOST
from recgpt_torchrec.progress import LOGGER


def silence_libraries() -> None:
    """Silence what torch, torchrec and fbgemm say at every start that no user can act on; warnings of ours stay."""
    for name in ("torchrec", "torch.fx", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs with a stack what it raises as well.
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    # The planner's "Sharding spec not found" comes through the root logger: it looks for tables that it did not shard.
    logging.getLogger().addFilter(lambda record: "Sharding spec not found" not in record.getMessage())
    # TensorBoard's thread raises what it cannot write in the main thread as well.
    threading.excepthook = lambda of: None if isinstance(of.exc_value, OSError) else threading.__excepthook__(of)
    for module in ("torchrec", "torch", "fbgemm_gpu"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
    # It names the line of ours that reads a sharded table's shape; torchrec gives these tables out.
    warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor.*")


@contextlib.contextmanager
def process_group(timeout_s: float = 600.0) -> Iterator[torch.device]:
    """Join the job's process group for the length of the `with`, and yield this rank's device.

    Without a launcher (no WORLD_SIZE in the environment) the group is this one process.

    Args:
        timeout_s: seconds that a rank waits for the others in one collective operation.
    """
    silence_libraries()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store = None
    if "WORLD_SIZE" not in os.environ:
        store = dist.HashStore()
    # gloo beside NCCL carries the host-side agreement on batches.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    single: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1} if store is not None else {}
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **single)
    except RuntimeError as error:  # what else is wrong is a ValueError
        what = " ".join(str(error).split())
        print(f"rank {os.environ.get('RANK', 0)} did not find the other ranks: {what}", file=sys.stderr, flush=True)
        raise SystemExit(LOST) from None
    try:
        yield device
    finally:
        # Without this the process aborts after its work is done.
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank in the job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log_message(*words: object, sep: str = " ") -> None:
    """Say on rank 0 what is done, through the logger `recgpt_torchrec`: with time and rank in a job's log file."""
    if rank() == 0:
        LOGGER.info(sep.join(map(str, words)))


def print_result(*words: object, sep: str = " ") -> None:
    """Print a result on rank 0, as it is: a table, a summary, what to do next."""
    if rank() == 0:
        print(*words, sep=sep, flush=True)


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, by rank (collective); without a process group, the one there is."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_first_rank(function: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Run `function` on rank 0 while the others wait, and raise its error on all ranks (collective, in `group`).

    Without a process group, just run it.
    """
    failed: list[Exception | None] = [None]
    if rank() == 0:
        try:
            function()
        except Exception as error:
            failed[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(failed, src=0, group=group)
    if failed[0] is not None:
        raise failed[0]
