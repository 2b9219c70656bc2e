"""Reads a checkpoint's `.metadata` and tensors without running code from them, and without believing their sizes.

torch.distributed.checkpoint writes `.metadata` as a pickle, and a pickle may call any function. Here it is read by an
unpickler that knows the opcodes and classes of such a file and nothing else; then every size and path is compared with
the files in the folder, so that nothing is allocated, and no file opened, because a damaged or hostile file says so.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType
from typing import IO, Any, ClassVar

import pyarrow.fs
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StorageReaderTransforms
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.names import current_name

METADATA_BYTES = 2**26
"""Maximum size of `.metadata`. An entry takes 100 to 400 bytes: enough for the shards of some thousand ranks."""
DIMENSIONS = 8
"""Maximum number of dimensions of a tensor."""
RECORD_OVERHEAD = 2**16
"""Maximum number of bytes that a tensor's record has beside its values; torch.save writes about 1,600."""


class UnsafeCheckpoint(ValueError):  # noqa: N818 (says what the checkpoint is)
    """A checkpoint holds something that torch.distributed.checkpoint does not write for tensors."""


# ------------------------------------------------------------------------------------------------------- .metadata


# No message shows, and no dict hashes, an object of unknown type: tuples nested in each other would take for ever.


def _make_size(values: Any = None) -> torch.Size:
    is_size = type(values) is tuple and len(values) <= DIMENSIONS
    if not is_size or not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise UnsafeCheckpoint("the size of a tensor is no size")
    return torch.Size(values)


def _make_layout(name: Any = None) -> torch.layout:
    if type(name) is not str or name != "torch.strided":
        raise UnsafeCheckpoint("the layout of a tensor is not torch.strided")
    return torch.strided


def _make_memory_format(code: Any = None) -> _MEM_FORMAT_ENCODING:
    if type(code) is not int or code not in range(3):
        raise UnsafeCheckpoint("the memory format of a tensor is unknown")
    return _MEM_FORMAT_ENCODING(code)


def _get_member(kind: Any = None, name: Any = None) -> _MEM_FORMAT_ENCODING:
    if kind is not _make_memory_format or type(name) is not str or name not in _MEM_FORMAT_ENCODING.__members__:
        raise UnsafeCheckpoint("it asks for an attribute that is no memory format")
    return _MEM_FORMAT_ENCODING[name]


def _make_path(*parts: Any) -> str:
    return "/".join(str(part) for part in parts if type(part) is str)  # only a note of where it was written


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _make_size,
    ("torch.serialization", "_get_layout"): _make_layout,
    (_MEM_FORMAT_ENCODING.__module__, _MEM_FORMAT_ENCODING.__name__): _make_memory_format,
    # Members of an enum are written as getattr(kind, name) by Python 3.11.0 to 3.11.3, that of Debian 12 among them.
    **{(module, "getattr"): _get_member for module in ("builtins", "__builtin__")},
    **{
        (module, f"{kind}Path"): _make_path for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")
    },
}
"""Functions that `.metadata` may call, by module and name, and what is called in their place."""
CLASSES: dict[tuple[str, str], type] = {
    (each.__module__, each.__name__): each
    for each in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        _StorageInfo,
    )
}
"""Classes whose objects it may hold: dataclasses, made without a call and filled field by field."""
DTYPES: dict[tuple[str, str], torch.dtype] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
KNOWN: dict[tuple[str, str], Any] = {**CLASSES, **FUNCTIONS, **DTYPES}
OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK GLOBAL STACK_GLOBAL NEWOBJ REDUCE BUILD
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE BINFLOAT
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
""".split()
"""Names of the opcodes that such files consist of, in any protocol from 2 on."""


class _MetadataUnpickler(pickle._Unpickler):
    """Unpickles `.metadata`, and nothing else.

    It derives from the unpickler in Python: that in C makes room for as many memo entries as one opcode asks for.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise UnsafeCheckpoint(f"it names {module[:80]}.{name[:80]}, which belongs in no checkpoint")

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not any(kind is each for each in CLASSES.values()) or arguments != ():
            raise UnsafeCheckpoint("it makes an object in a way that no checkpoint does")
        self.append(object.__new__(kind))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not any(function is each for each in FUNCTIONS.values()) or type(arguments) is not tuple:
            raise UnsafeCheckpoint("it calls a function that no checkpoint does")
        self.append(function(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        kind = type(target)
        if kind is TensorProperties:
            kinds = [type(value) for value in state] if type(state) is tuple else []
            if kinds != [torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool]:
                raise UnsafeCheckpoint("the properties of a tensor are no properties")
            return target.__setstate__(state)
        names = {field.name for field in fields(kind)} if kind in CLASSES.values() else set()
        if type(state) is not dict or not state.keys() <= names:
            raise UnsafeCheckpoint(f"it fills an object of type {kind.__name__} in a way that no checkpoint does")
        if kind is MetadataIndex:  # which dicts hash
            kinds = [type(state.get(name)) for name in ("fqn", "offset", "index")]
            if kinds[0] is not str or kinds[1] not in (torch.Size, NoneType) or kinds[2] not in (int, NoneType):
                raise UnsafeCheckpoint("the index of a tensor is no index")
        target.__dict__.update(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or not all(type(key) in (str, MetadataIndex) for key in items[::2]):
            raise UnsafeCheckpoint("a key is neither a name nor the index of a tensor")
        target.update(zip(items[::2], items[1::2], strict=True))


for _name in OPCODES:
    _opcode = getattr(pickle, _name)[0]
    _MetadataUnpickler.dispatch[_opcode] = getattr(
        _MetadataUnpickler, f"load_{_name.lower()}", pickle._Unpickler.dispatch[_opcode]
    )


def unpickle_metadata(data: bytes) -> Metadata:
    """Unpickle the content of `.metadata`; no function is called but those that make a size, a layout and a path.

    Raises:
        UnsafeCheckpoint: it is damaged, or no such file.
    """
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except UnsafeCheckpoint:
        raise
    except KeyError as error:
        raise UnsafeCheckpoint(f"it is damaged, or another kind of pickle (opcode {error})") from None
    except Exception as error:  # damaged bytes can raise almost anything
        raise UnsafeCheckpoint(f"it is damaged ({type(error).__name__}: {str(error)[:200]})") from None
    if type(metadata) is not Metadata:
        raise UnsafeCheckpoint("it is another kind of pickle")
    return metadata


def check_metadata(metadata: Metadata, files: Mapping[str, int]) -> Metadata:
    """Check what `.metadata` says against the files of its folder, and keep what reading tensors needs.

    Entries that are no tensors are dropped: torch would unpickle them, and this program writes none. Tensors get the
    names that they have now.

    Args:
        metadata: as unpickled; its fields may hold anything.
        files: size in bytes of each file in the folder, by name.

    Raises:
        UnsafeCheckpoint: a tensor is described wrongly or incompletely, or does not lie where it should.
    """
    tensors, places = vars(metadata).get("state_dict_metadata"), vars(metadata).get("storage_data")
    if type(tensors) is not dict or type(places) is not dict:
        raise UnsafeCheckpoint("it lists no tensors")
    promised, known = 0, {}
    kept: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        if type(name) is not str:
            raise UnsafeCheckpoint("a tensor has no name")
        if type(tensor) is BytesStorageMetadata:
            continue
        values = vars(tensor) if type(tensor) is TensorStorageMetadata else {}
        size, chunks, properties = (values.get(field) for field in ("size", "chunks", "properties"))
        if type(size) is not torch.Size or type(chunks) is not list or type(properties) is not TensorProperties:
            raise UnsafeCheckpoint(f"{name} is no tensor")
        numbers = 0
        for chunk in chunks:
            offsets, sizes = _check_chunk(name, size, chunk)
            index = MetadataIndex(current_name(name), offsets)
            if index in kept:
                raise UnsafeCheckpoint(f"{name} has two parts at {list(offsets)}")
            numbers += math.prod(sizes)
            kept[index] = place = _check_place(name, places.get(MetadataIndex(name, offsets)), files)
            width = math.prod(sizes) * properties.dtype.itemsize
            if not width <= place.length <= width + RECORD_OVERHEAD:
                raise UnsafeCheckpoint(f"{name} has {width:,} bytes at {list(offsets)}, its file {place.length:,}")
            promised += place.length
        if numbers != math.prod(size):
            raise UnsafeCheckpoint(f"{name} has {math.prod(size):,} numbers, its parts {numbers:,}")
        known[current_name(name)] = tensor
    if promised > sum(files.values()):
        raise UnsafeCheckpoint(f"its tensors have {promised:,} bytes, the files {sum(files.values()):,}")
    return Metadata(known, storage_data=kept, storage_meta=StorageMeta())


def _check_chunk(name: str, size: torch.Size, chunk: Any) -> tuple[torch.Size, torch.Size]:
    values = vars(chunk) if type(chunk) is ChunkStorageMetadata else {}
    offsets, sizes = values.get("offsets"), values.get("sizes")
    if (
        not (type(offsets) is type(sizes) is torch.Size)
        or not len(offsets) == len(sizes) == len(size)
        or any(start + length > end for start, length, end in zip(offsets, sizes, size, strict=True))
    ):
        raise UnsafeCheckpoint(f"a part of {name} is no part of it")
    return offsets, sizes


def _check_place(name: str, place: Any, files: Mapping[str, int]) -> _StorageInfo:
    values = vars(place) if type(place) is _StorageInfo else {}
    path, start, length = (values.get(field) for field in ("relative_path", "offset", "length"))
    if type(path) is not str or type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise UnsafeCheckpoint(f"{name} lies nowhere")
    if "/" in path or "\\" in path or path in ("", ".", ".."):
        raise UnsafeCheckpoint(f"{name} lies in {path[:80]!r}, which is not a file of the folder")
    if path not in files:
        raise FileNotFoundError(f"{path} is missing")
    if start + length > files[path]:
        raise UnsafeCheckpoint(f"{path} has {files[path]:,} bytes, and {name} ends after {start + length:,}")
    if values.get("transform_descriptors"):
        raise UnsafeCheckpoint(f"{name} is transformed")
    return _StorageInfo(path, start, length)


# --------------------------------------------------------------------------------------------------------- reading


class SafeReader(dcp.FileSystemReader):
    """A reader of torch.distributed.checkpoint that runs nothing that it reads, and verifies the tensors' checksums."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.folder = path
        self.transforms = _RecordVerifier()
        if storage.remote(path):
            streams: Any = storage.Streams(path)
            self.fs, self.path = streams, path

    # Not named `kwargs`: torch would then try a file for each rank, which this program does not write.
    def read_metadata(self, *_: Any, **ignored: Any) -> Metadata:
        """Read and check `.metadata`.

        Raises:
            UnsafeCheckpoint: it is damaged, hostile, or does not fit the files beside it.
            OSError: it does not exist, or cannot be read.
        """
        fs, root = storage.filesystem(self.folder)
        infos = fs.get_file_info(pyarrow.fs.FileSelector(root))
        files = {info.base_name: info.size for info in infos if info.type == pyarrow.fs.FileType.File}
        if ".metadata" not in files:
            raise FileNotFoundError(f"{self.folder}/.metadata is missing")
        if files[".metadata"] > METADATA_BYTES:
            raise UnsafeCheckpoint(f".metadata has {files['.metadata']:,} bytes, more than {METADATA_BYTES:,}")
        try:
            return check_metadata(unpickle_metadata(storage.read(f"{self.folder}/.metadata")), files)
        except UnsafeCheckpoint as error:
            raise UnsafeCheckpoint(f".metadata: {error}") from None


class _RecordVerifier(_StorageReaderTransforms):
    """Verifies a tensor's record before torch.load reads it: an uncompressed ZIP archive, a checksum per member."""

    def transform_load_stream(self, read_item: Any, transform_descriptors: Any, raw_stream: IO[bytes]) -> IO[bytes]:
        """The stream of one tensor, verified, at its beginning.

        Raises:
            BadZipFile: a checksum differs, which torch.load ignores; or the archive would unpack to more than it is.
        """
        content = io.BytesIO(raw_stream.read(-1))  # so that a store is read once
        name = read_item.storage_index.fqn
        if content.getvalue()[:4] != b"PK\x03\x04":  # torch.load would read another format
            raise zipfile.BadZipFile(f"{name} is not a record of torch.save")
        with zipfile.ZipFile(content) as records:
            members = records.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise zipfile.BadZipFile(f"{name} is compressed, which torch.save does not do")
            if sum(member.file_size for member in members) > content.getbuffer().nbytes:
                raise zipfile.BadZipFile(f"the members of {name} overlap")
            if (damaged := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"{name}: the checksum of {damaged} differs")
        content.seek(0)
        return content


class TensorPlanner(DefaultLoadPlanner):
    """Plans the reading of tensors, and refuses anything else, which torch would unpickle.

    It calls `on_read` with the number of values of each record that it read.
    """

    def __init__(self, on_read: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self.on_read = on_read

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """A part of a tensor is read."""
        self.on_read(tensor.numel())

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse an entry that is not a tensor.

        Raises:
            UnsafeCheckpoint: always.
        """
        raise UnsafeCheckpoint(f"{read_item.dest_index.fqn} is no tensor")
