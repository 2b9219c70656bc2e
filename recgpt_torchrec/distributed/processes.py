"""The process group, from the launcher's environment: one process or many, gloo on CPU, NCCL on CUDA."""

import contextlib
import ctypes
import logging
import os
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from recgpt_torchrec.config.device import Device
from recgpt_torchrec.distributed.devices import choose_device
from recgpt_torchrec.distributed.group.heartbeats import ANSWER_SECONDS, ask_within
from recgpt_torchrec.distributed.group.joining import NotJoined, meet
from recgpt_torchrec.distributed.group.waiting import expected_wait
from recgpt_torchrec.errors import LOST, InputError
from recgpt_torchrec.launcher import own_rank, read_launcher
from recgpt_torchrec.progress import LOGGER, report_failure
from recgpt_torchrec.texts.words import agree

T = TypeVar("T")

SAY_S = 0.2
"""Time that rank 0 has before the others to say what is wrong, in seconds."""
JOIN_S = 600.0
"""Maximum time that ranks wait for each other before the first collective operation, in seconds."""
LONG_WORK_S = 86_400.0
"""Timeout of a collective operation, in seconds, where a rank may be at work for hours while the others wait for it:
ranks build shards of different sizes, and rank 0 alone joins keys. A rank that ends is noticed at once all the same,
and a watchdog ends a run in which nothing progresses."""

_stores: list[dist.Store] = []
"""The store that this process may serve: until it ends, or joins another group."""

KERNELS = 256
"""Number of shapes of matrix products on a CPU whose kernels are kept."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Numbers of glibc's options of `mallopt`."""
LARGEST_KEPT = 32 * 2**20
"""Size up to which tensors are allocated from memory that the process has freed, in bytes; glibc allows no more."""


def silence_libraries() -> None:
    """Silence messages of torch, torchrec and fbgemm that no user can act on; this project's own warnings stay."""
    for name in ("torchrec", "torch.fx", "torch.distributed", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs, with a stack, what it also raises.
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    # Through the root logger: the planner looks for tables that it did not shard, and a checkpoint without metadata is
    # logged with a stack before it is raised.
    silenced = ("Sharding spec not found", "metadata is not found")
    logging.getLogger().addFilter(lambda record: not any(text in record.getMessage() for text in silenced))
    # A failed write of TensorBoard's thread is raised in the main thread as well.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else threading.__excepthook__(args)
    for module in ("torchrec", "torch", "fbgemm_gpu"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
    # Raised where we read a sharded table's shape; it is torchrec that returns ShardedTensors.
    warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor.*")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step's tensors instead of returning it to the system.

    A training step on CPU with 1,536 tokens had 950 page faults, 2 of its 45 ms; now it has about 10.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(TRIM_THRESHOLD, 2**30)


def bound_kernels() -> None:
    """Let oneDNN and torch's layer above it keep kernels for `KERNELS` shapes of matrix products; a number in the
    environment comes before it.

    Every batch has other shapes, and kernels in bf16 on AMX are large: with the libraries' own 1,024 a rank on a CPU
    grew from 1.4 to 4.0 GB in 20 epochs; with 256 in oneDNN alone to 1.8 GB, as fast; with 64 to 1.4 GB, 14% slower.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))  # read at the first product


@contextlib.contextmanager
def process_group(timeout_s: float = LONG_WORK_S, device: Device = "auto") -> Iterator[torch.device]:
    """Join the job's process group within the `with`, and yield this rank's device.

    Without a launcher (no WORLD_SIZE in the environment) the group is this one process.

    Args:
        timeout_s: timeout of one collective operation, in seconds.
        device: to compute on, see `choose_device`.

    Raises:
        InputError: there is no such device, or too few for the processes; or the launcher does not say which processes
            there are.
        SystemExit: with status `LOST`, the other ranks could not be reached.
    """
    silence_libraries()
    keep_freed_memory()
    bound_kernels()
    store: dist.Store = dist.HashStore()
    own, count = 0, 1
    try:
        if (job := read_launcher()) is not None:
            _stores.clear()
            store, own, count = meet(job, min(timeout_s, JOIN_S)), job.rank, job.world_size
            _stores.append(store)
        else:  # left over in the environment, they would make this process one of several that share a node
            for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
    except NotJoined as error:
        _end_alone(error)
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # gloo beside NCCL, for the collectives on the host (see `lockstep`).
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), store=store, rank=own, world_size=count)
    except RuntimeError as error:
        _end_alone(error)
    try:
        yield chosen
    except (InputError, OSError) as error:
        text = getattr(error, "identity", "") or str(error)
        error.is_told = not _is_first_to_say(store, text)  # type: ignore[union-attr]
        raise
    finally:
        # Without this the process aborts at exit.
        dist.destroy_process_group()


def _is_first_to_say(store: dist.Store, text: str) -> bool:
    """Whether no other rank has said so yet; all ranks meet most errors, and rank 0 is to say so for them."""
    key = f"said-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{zlib.crc32(text.encode())}"
    if rank() > 0:
        time.sleep(SAY_S)
    try:
        return ask_within(ANSWER_SECONDS, lambda: store.add(key, 1)) == 1
    except Exception:  # the store is lost with the rank that served it
        return True


def _end_alone(error: Exception) -> NoReturn:
    """End this process, which could not reach the others, with status `LOST`."""
    report_failure(f"rank {own_rank()} cannot reach the other ranks: {' '.join(str(error).split())}")
    raise SystemExit(LOST) from None


def rank() -> int:
    """This process's rank in the job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of the job's processes on this node, which the launcher says or `process_group` has found."""
    if "LOCAL_WORLD_SIZE" not in os.environ and world_size() > 1:
        raise RuntimeError("LOCAL_WORLD_SIZE is not set; join the ranks with process_group, which finds it")
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def log_message(*words: object, sep: str = " ") -> None:
    """Log a message on rank 0, through the logger `recgpt_torchrec`: with time and rank in a job's log file."""
    if rank() == 0:
        LOGGER.info(agree(sep.join(map(str, words))))


def print_result(*words: object, sep: str = " ") -> None:
    """Print a result on rank 0 without time and rank: a table, a summary, what to do next."""
    if rank() == 0:
        print(agree(sep.join(map(str, words))), flush=True)


def gather_objects(value: Any) -> list[Any]:
    """Gather a picklable value from every rank, in order of rank (collective); without a process group, `[value]`."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_first_rank(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `function` on rank 0 while the other ranks wait; its result, or its error, is that of all ranks (collective).

    So what depends on a folder, of which nodes may see an older state, is decided once. Without a process group it just
    runs.

    Args:
        function: its result can be pickled.
        group: whose collective it is; None: the default group.
    """
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        with expected_wait():
            dist.broadcast_object_list(outcome, src=0, group=group)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result
