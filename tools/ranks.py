"""Run a function as the ranks of a real process group, with a time limit and the first failing rank's traceback."""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SIGNAL_ALLOWANCE_SECONDS = 10
"""A rank whose parent was killed ends itself this many seconds after the time limit."""
DEATH_SECONDS = 0.2
"""How long after a rank raised the death of another one, which may be its cause, is waited for."""
JOINING = "while the ranks joined: "
"""Prefix of the error of a rank that failed before its function was called."""

# Ranks are forked from one process that has imported these modules: their import, about 8 s, is not repeated per rank.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.utils.tensorboard",
        "torchrec.distributed.model_parallel",
        "torchrec.distributed.train_pipeline",
        "recgpt_torchrec.training.session",
    ]
)


class RankFailed(Exception):  # noqa: N818 (names the rank that failed)
    """A rank raised or died. `rank` is the first that did; the message holds its traceback."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed first:\n{reason}")
        self.rank = rank


class NotJoined(RankFailed):
    """A rank could not join the process group; its function was not called yet."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` processes joined in a gloo process group.

    Each process is new, has one thread, this process's working directory and environment, and torchrun's variables for
    its rank. When this returns or raises, all of them have ended.

    Args:
        function: a function at the top level of a module
        world_size: number of ranks
        args: further arguments; like the results, they must be picklable
        timeout: time limit in seconds, the start of the processes included

    Returns:
        The return value of each rank, by rank.

    Raises:
        RankFailed: a rank raised an exception or died; the other ranks are killed at once.
        TimeoutError: not all ranks finished in time; the message holds each unfinished rank's stack.
    """
    for _ in range(2):  # gloo sometimes closes a connection while ranks join, before the function is called
        with contextlib.suppress(NotJoined):
            return _run(function, world_size, args, timeout)
    return _run(function, world_size, args, timeout)


def _run(function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(world_size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            stack.enter_context(receiver)
            environment = dict(os.environ) | _rank_environment(rank, world_size)
            call = (function, rank, world_size, args)
            process = CONTEXT.Process(
                target=_rank_main, args=(call, sender, folder, environment, os.getcwd(), timeout), daemon=True
            )
            with one_thread_environment():
                process.start()
            stack.callback(_end, process)
            sender.close()
            ranks.append((process, receiver))
        return _collect(ranks, deadline, timeout, Path(folder))


def _collect(ranks: list[tuple[Any, Connection]], deadline: float, timeout: float, folder: Path) -> list[Any]:
    """Return the results by rank, or raise the error of the rank that failed first."""
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    results: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            unfinished = sorted(waiting.values())
            stacks = "".join(_stack(rank, ranks[rank][0], folder) for rank in unfinished)
            raise TimeoutError(f"ranks {unfinished} of {len(ranks)} were not done after {timeout} s\n{stacks}")
        failures = []  # among failures received together, the earliest is reported
        while ready:
            for receiver in ready:
                assert isinstance(receiver, Connection)
                rank = waiting.pop(receiver)
                try:
                    when, error, result = pickle.loads(receiver.recv_bytes())
                except EOFError:  # what other ranks raise is its consequence, and may be told first
                    ranks[rank][0].join(5)
                    when, error, result = -math.inf, f"it died with exit code {ranks[rank][0].exitcode}", None
                results[rank] = result
                if error is not None:
                    failures.append((when, rank, error))
            is_raised = failures and min(failures)[0] > -math.inf  # its cause may be a death that is told after it
            ready = wait(list(waiting), timeout=DEATH_SECONDS) if is_raised and waiting else []
        if failures:
            _, rank, error = min(failures)
            raise (NotJoined if error.startswith(JOINING) else RankFailed)(rank, error)
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    call: tuple[Callable[..., Any], int, int, tuple[Any, ...]],
    sender: Connection,
    folder: str,
    environment: dict[str, str],
    working_directory: str,
    timeout: float,
) -> None:
    """Run one rank: join the group, call the function, and send its result or error."""
    function, rank, world_size, args = call
    signal.alarm(int(timeout) + SIGNAL_ALLOWANCE_SECONDS)
    stack_file = open(_stack_file(Path(folder), rank), "w")  # noqa: SIM115 (faulthandler writes to it until the end)
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(working_directory)
    error = result = None
    joined = False
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        joined = True
        result = function(rank, world_size, *args)
        if dist.is_initialized():
            dist.barrier()  # no rank closes its connections during another's collective
            dist.destroy_process_group()
        message = pickle.dumps((time.monotonic(), None, result))
    except BaseException:
        error = ("" if joined else JOINING) + traceback.format_exc()
        message = pickle.dumps((time.monotonic(), error, None))
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(message)
    os._exit(0 if error is None else 1)  # at once: the destructors of a broken group may hang


def _rank_environment(rank: int, world_size: int) -> dict[str, str]:
    environment = {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = (
            "lo"  # the host name may resolve to an address the machine does not listen on
        )
    return environment


@contextlib.contextmanager
def one_thread_environment() -> Any:
    """Set OMP_NUM_THREADS to 1 while the fork server may start: it must never have a pool of threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def _stack(rank: int, process: Any, folder: Path) -> str:
    """Return the stack of an unfinished rank."""
    path = _stack_file(folder, rank)
    if path.exists():
        os.kill(process.pid, signal.SIGUSR1)
        give_up = time.monotonic() + 2
        while not path.read_text() and time.monotonic() < give_up:
            time.sleep(0.05)
    return f"rank {rank}:\n{path.read_text() if path.exists() else '  not started yet'}\n"


def _end(process: Any) -> None:
    """Kill the process if it still runs, and wait for its end."""
    process.kill()
    process.join()
