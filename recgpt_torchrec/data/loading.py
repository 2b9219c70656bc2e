"""Prefetches batches in a thread or in loader processes, which hand each over as one block of shared memory."""

import contextlib
import io
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import queue
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from recgpt_torchrec.config import Stream
from recgpt_torchrec.errors import STOP_SIGNALS, InputError
from recgpt_torchrec.storage import is_full

T = TypeVar("T")
SOCKET, LONGEST_SOCKET = "pymp-12345678/listener-12345678", 107
"""What multiprocessing names a socket within the folder of temporary files, and the bytes that such a path may have."""


def prefetch(source: Callable[[int], Iterator[T]], settings: Stream) -> Iterator[T]:
    """The batches of `source`, prefetched and taken from its workers in turn.

    Args:
        source: returns the batches of a worker, given its number; it is pickled for loader processes.
        settings: the number of workers, 0 for a thread that is worker 0, and of batches that each keeps ready.

    Raises:
        InputError: raised by a worker, after all batches that it made before; or a loader process was killed.
    """
    pins = torch.cuda.is_initialized()  # a process that computes on CPU does not begin to use a GPU for this
    if settings.workers == 0:
        batches = source(0)
        yield from prefetch_in_thread(map(pin, batches) if pins else batches, settings.prefetch)
        return
    # A fork server imports once and forks clean processes for each epoch. Forking this process, with its process group
    # and thread pools, is not safe; spawning would import torch again each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([source.__module__])
    make_socket_folder()
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
        generator=torch.Generator(),  # the seed of workers, which draw nothing, is not drawn from that of dropout
    )
    received = _receive(loader, pins)
    try:
        yield from prefetch_in_thread(received, 1) if pins else received
    except OSError as error:
        if not is_full(error):
            raise
        raise _explain_shared_memory(error) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"a loader process ended before its work was done ({error}); if memory is short, give fewer "
            "--stream.workers, a smaller --stream.prefetch, or --stream.workers 0"
        ) from None


def make_socket_folder() -> None:
    """Make the folder of the sockets by which processes hand each other files, in /tmp where TMPDIR is too long.

    The path of a socket has 107 bytes at most, and a job's TMPDIR on a cluster may have more. Does nothing where the
    folder is there already.
    """
    chosen = tempfile.tempdir
    if len(os.fsencode(os.path.join(tempfile.gettempdir(), SOCKET))) > LONGEST_SOCKET:
        tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = chosen


def _receive(messages: Iterable["Block | InputError"], pins: bool) -> Iterator[Any]:
    """The values that loader processes sent; an error is raised."""
    for message in messages:
        if isinstance(message, InputError):
            raise message
        yield (message.copy(_pinned_memory) if pins else message).unpack()


@dataclass(frozen=True)
class Block:
    """A value whose tensors and arrays lie in one tensor, so that it moves to another process by one file descriptor,
    and to page-locked memory by one copy.

    To take over a batch of 2,048 tokens takes 2 ms, of 32,768 tokens 4; with a file descriptor for each of the 17
    tensors it took 7.5 and 13.6 (20 and 29 where other processes were busy).
    """

    memory: torch.Tensor
    """[bytes] uint8."""
    arrays: list[tuple[int, int]]
    """Where the content of each array starts and stops."""
    rest: bytes
    """The value without the content of tensors and arrays, pickled."""

    @classmethod
    def pack(cls, value: Any, allocate: Callable[[int], torch.Tensor]) -> "Block":
        """Copy a value into the memory that `allocate` returns for a number of bytes, [bytes] uint8."""
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        memory = allocate(pickler.size)
        bytes_ = memory.numpy()
        for start, content in pickler.contents:
            bytes_[start : start + content.size] = content
        return cls(memory, pickler.arrays, file.getvalue())

    def copy(self, allocate: Callable[[int], torch.Tensor]) -> "Block":
        """The same in other memory."""
        return replace(self, memory=allocate(self.memory.numel()).copy_(self.memory))

    def unpack(self) -> Any:
        """The value; its tensors and arrays are views of the memory."""
        view: memoryview = self.memory.numpy().data
        return _Unpickler(self.memory, self.rest, [view[start:stop] for start, stop in self.arrays]).load()


class _Pickler(pickle.Pickler):
    """Pickles a value without the content of its tensors and arrays, and gives each a place in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._add_array)
        self.contents: list[tuple[int, np.ndarray]] = []
        """Place and bytes of each tensor and array."""
        self.arrays: list[tuple[int, int]] = []
        self.size = 0

    def _add(self, content: np.ndarray) -> tuple[int, int]:
        start = -(-self.size // 64) * 64  # of a cache line
        self.size = start + content.size
        self.contents.append((start, content))
        return start, self.size

    def _add_array(self, buffer: pickle.PickleBuffer) -> None:
        self.arrays.append(self._add(np.asarray(buffer.raw())))

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        return *self._add(value.contiguous().numpy().reshape(-1).view(np.uint8)), value.dtype, value.shape


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote in this program's own process, never a file.

    Tensors share the memory's storage: with that the allocator of page-locked memory knows how long a copy to the GPU
    still reads it.
    """

    def __init__(self, memory: torch.Tensor, rest: bytes, arrays: list[memoryview]) -> None:
        super().__init__(io.BytesIO(rest), buffers=arrays)
        self.memory = memory

    def persistent_load(self, place: Any) -> torch.Tensor:
        start, stop, dtype, shape = place
        return self.memory[start:stop].view(dtype).view(shape)


def _explain_shared_memory(error: Exception) -> InputError:
    """The error where loader processes find no shared memory for their batches or queues."""
    return InputError(
        f"loader processes have too little shared memory ({' '.join(str(error).split())}); give more to /dev/shm "
        "(docker run --shm-size, in Kubernetes an emptyDir of medium Memory), fewer --stream.workers or a smaller "
        "--stream.prefetch, or --stream.workers 0"
    )


def _shared_memory(size: int) -> torch.Tensor:
    try:
        storage = torch.UntypedStorage._new_shared(max(size, 1))
    except (OSError, RuntimeError) as error:
        if not is_full(error):
            raise
        raise _explain_shared_memory(error) from None
    return torch.empty(0, dtype=torch.uint8).set_(storage)[:size]


def _pinned_memory(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def pin(value: T) -> T:
    """A copy whose tensors lie in one piece of page-locked memory, from which a GPU copies while the host runs on."""
    return Block.pack(value, _pinned_memory).unpack()


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
            for value in self.source(info.id):
                yield Block.pack(value, _shared_memory)
        except InputError as error:
            yield error  # yielded like a batch: raised here, it would reach the user inside a traceback


def prefetch_in_thread(source: Iterator[T], prefetch: int) -> Iterator[T]:
    """The batches of `source`, prefetched by a thread of this process; its errors are raised here.

    Making a batch of 2,048 tokens takes 1 ms, one of 32,768 tokens 6, reading included. To take one over from a loader
    process takes 2 and 4 ms, and a second per epoch to start: it pays off with large batches.
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
