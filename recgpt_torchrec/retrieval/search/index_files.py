"""Files of FAISS indexes: written as a stream with checksums; opened memory-mapped, or read whole from a store.

What FAISS 1.15 maps with IO_FLAG_MMAP_IFC: the vectors of flat, of HNSW and beside the codes of IVF-PQ, and the graph
of HNSW; of IVF and IVF-PQ the lists of vectors and codes. It reads the rest: clusters, codebooks, and of HNSW the
levels and offsets (12 bytes per item). IO_FLAG_MMAP alone maps the lists of IVF only.

FAISS believes what a file says, and a wrong number in a graph ends the process. So the bytes are checked against the
manifest's checksums before FAISS sees them, in threads: about 1.8 GB/s per core.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.index_manifest import BLOCK_BYTES, IndexManifest, IndexShard
from recgpt_torchrec.retrieval.search.index import FAISS, Shard
from recgpt_torchrec.storage import filesystem, raise_storage_failure, remote
from recgpt_torchrec.texts.commands import command

READ_BYTES = 2**20
"""Bytes of a local file that a thread reads at once: they are still in its cache when their checksum is computed."""
TYPES = {
    "flat": (FAISS.IndexFlatIP, FAISS.IndexFlat),
    "hnsw": (FAISS.IndexHNSWFlat,),
    "ivf": (FAISS.IndexIVFFlat,),
    "ivf_pq": (FAISS.IndexRefineFlat,),
}
"""Classes of FAISS, by kind."""


def write_shard(export: str, path: str, index: Any, first: int) -> IndexShard:
    """Write a FAISS index; readers see the whole file or none.

    Args:
        export: folder of the export.
        path: of the file, relative to that folder.
        index: of FAISS; its rows are the items from `first` on.
        first: id of its first item.

    Raises:
        OSError: it cannot be written.
    """
    fs, root = filesystem(export)
    file = f"{root}/{path}"
    fs.create_dir(os.path.dirname(file), recursive=True)
    temporary = file if remote(export) else f"{file}.tmp"
    with fs.open_output_stream(temporary, compression=None) as stream:
        sink = _Checksums(stream)
        writer = FAISS.PyCallbackIOWriter(sink.write, BLOCK_BYTES)
        FAISS.write_index(index, writer)
        del writer  # it hands over what it holds
        sink.end()
    if temporary != file:
        fs.move(temporary, file)
    return IndexShard(path=path, first=first, stop=first + index.ntotal, bytes=sink.size, checksums=sink.checksums)


def open_shards(export: str, index: IndexManifest, shards: list[IndexShard], dim: int) -> list[Shard]:
    """Open shards of the index in an export.

    Args:
        export: folder of the export.
        index: what its manifest says.
        shards: those to open.
        dim: length of the vectors.

    Raises:
        InputError: a file is missing, damaged, or not the index that the manifest promises.
    """
    opened = []
    for shard in shards:
        found = _open(export, shard, index.kind)
        expected = (shard.stop - shard.first, dim, FAISS.METRIC_INNER_PRODUCT)
        if not isinstance(found, TYPES[index.kind]) or (found.ntotal, found.d, found.metric_type) != expected:
            raise damaged(export, shard.path, index.kind, "is not the index that the manifest promises")
        opened.append(Shard(found, index.kind, index.parameters, shard.first))
    return opened


def damaged(export: str, path: str, kind: str, reason: str) -> InputError:
    """The error for a shard that cannot be used."""
    return InputError(
        f"{export}: the shard {path} {reason}; restore the file, or build the index again with "
        f"{command('index', {'export': export, 'index.kind': kind})}"
    )


def _open(export: str, shard: IndexShard, kind: str) -> Any:
    fs, root = filesystem(export)
    file = f"{root}/{shard.path}"
    info = fs.get_file_info(file)
    if info.type != pyarrow.fs.FileType.File:
        raise damaged(export, shard.path, kind, "is missing")
    if info.size != shard.bytes:
        raise damaged(
            export, shard.path, kind, f"is damaged: it has {info.size} bytes, the manifest promises {shard.bytes}"
        )
    content = None
    try:
        if fs.type_name == "local":
            checksums = _checksums_of_file(file, shard.bytes)
        else:
            with fs.open_input_stream(file, compression=None) as stream:
                content = stream.read_buffer(shard.bytes)
            blocks = memoryview(content)
            checksums = [
                f"{zlib.crc32(blocks[start : start + BLOCK_BYTES]):08x}" for start in range(0, shard.bytes, BLOCK_BYTES)
            ]
    except OSError as error:
        raise_storage_failure(error, file)
        raise damaged(export, shard.path, kind, f"cannot be read ({error})") from None
    wrong = [number for number, pair in enumerate(zip(checksums, shard.checksums, strict=True)) if pair[0] != pair[1]]
    if wrong:
        where = f"bytes {wrong[0] * BLOCK_BYTES} to {min((wrong[0] + 1) * BLOCK_BYTES, shard.bytes) - 1}"
        raise damaged(export, shard.path, kind, f"is damaged: {where} have another checksum than the manifest promises")
    try:
        if content is None:
            return FAISS.read_index(file, FAISS.IO_FLAG_MMAP_IFC)
        return FAISS.deserialize_index(np.frombuffer(content, np.uint8))
    except RuntimeError as error:
        raise damaged(export, shard.path, kind, f"cannot be read by FAISS ({str(error).splitlines()[0]})") from None


class _Checksums:
    """Passes bytes on to a stream, and computes the crc32 of each block."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.size, self.crc = stream, 0, 0
        self.checksums: list[str] = []

    def write(self, data: bytes) -> None:
        """Write bytes."""
        self.stream.write(data)
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self.crc = zlib.crc32(part, self.crc)
            self.size += len(part)
            if self.size % BLOCK_BYTES == 0:
                self._close_block()
            view = view[len(part) :]

    def end(self) -> None:
        """Close the last block."""
        if self.size % BLOCK_BYTES:
            self._close_block()

    def _close_block(self) -> None:
        self.checksums.append(f"{self.crc:08x}")
        self.crc = 0


def _checksums_of_file(file: str, size: int) -> list[str]:
    """crc32 of each block of a local file, in as many threads as FAISS has."""

    def read(start: int) -> str:
        crc, left, buffer = 0, min(BLOCK_BYTES, size - start), memoryview(bytearray(READ_BYTES))
        with Path(file).open("rb", buffering=0) as stream:
            stream.seek(start)
            while left and (count := stream.readinto(buffer[:left])):
                crc = zlib.crc32(buffer[:count], crc)
                left -= count
        return f"{crc:08x}"

    with ThreadPoolExecutor(max(1, FAISS.omp_get_max_threads())) as pool:
        return list(pool.map(read, range(0, size, BLOCK_BYTES)))
