"""Prefetches batches in a thread or in loader processes."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from recgpt_torchrec.config import Stream
from recgpt_torchrec.errors import STOP_SIGNALS, InputError

T = TypeVar("T")


def prefetch(source: Callable[[int], Iterator[T]], settings: Stream) -> Iterator[T]:
    """The batches of `source`, prefetched and taken from its workers in turn.

    Args:
        source: returns the batches of a worker, given its number; it is pickled for loader processes.
        settings: the number of workers, 0 for a thread that is worker 0, and of batches that each keeps ready.

    Raises:
        InputError: raised by a worker, after all batches that it made before; or a loader process was killed.
    """
    if settings.workers == 0:
        yield from prefetch_in_thread(source(0), settings.prefetch)
        return
    # A fork server imports once and forks clean processes for each epoch. Forking this process, with its process group
    # and thread pools, is not safe; spawning would import torch again each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([source.__module__])
    with block_stop_signals():
        multiprocessing.resource_tracker.ensure_running()  # it unblocks SIGTERM
    with block_stop_signals():
        multiprocessing.forkserver.ensure_running()
    loader = DataLoader(
        _Worker(source),
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for value in loader:
            if isinstance(value, InputError):
                raise value
            yield value
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"a loader process ended before its work was done ({error}); if memory is short, give fewer "
            "--stream.workers, a smaller --stream.prefetch, or --stream.workers 0"
        ) from None


class _Worker(IterableDataset):
    """The batches of one loader process, by its worker id."""

    def __init__(self, source: Callable[[int], Iterator[Any]]) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        parent = multiprocessing.parent_process()
        assert info is not None and parent is not None and parent.pid is not None
        end_with_process(parent.pid)
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        pa.set_io_thread_count(2)
        try:
            yield from self.source(info.id)
        except InputError as error:
            yield error  # yielded like a batch: raised here, it would reach the user inside a traceback


def prefetch_in_thread(source: Iterator[T], prefetch: int) -> Iterator[T]:
    """The batches of `source`, prefetched by a thread of this process; its errors are raised here.

    Making a batch of 2,048 tokens takes 5 ms, most of it in numpy and Arrow without the interpreter lock. A loader
    process takes longer (20 ms) to hand a batch over, and a second per epoch to start: it pays off with large batches.
    """
    ready: queue.Queue[Any] = queue.Queue(prefetch)
    stopped = threading.Event()

    def put(value: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in source:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="read-ahead")
    thread.start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()


@contextlib.contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block the stop signals and Ctrl-C in processes that are started within the `with`.

    Loader processes have nothing to save and are needed until their rank ends, so a signal that asks the rank to stop
    must not end them first. They and their children call `end_with_process`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_process(process: int) -> None:
    """End this process, started under `block_stop_signals`, on a stop signal that `process` sends, and no other."""

    def wait() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != process:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="signals").start()
