"""Opens the encoder of an export to answer requests. Needs torch, NumPy and Arrow, not the trainer."""

import bisect
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.encoder_manifest import EncoderManifest, TablePart
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.storage import filesystem, remote
from recgpt_torchrec.storage.parts import Part, checksum_of
from recgpt_torchrec.texts.commands import command


class Table:
    """Vectors by id in mapped files: what is looked up is read."""

    def __init__(self, parts: list[tuple[int, npt.NDArray[Any]]]) -> None:
        """`parts` are the first id and the vectors [rows, dim] float32 of each file, by rising id; at least one."""
        self.firsts = [first for first, _ in parts]
        self.parts = [vectors for _, vectors in parts]
        self.rows = parts[-1][0] + len(parts[-1][1])

    def of(self, ids: Int64) -> Float32:
        """[n, dim] float32 vectors of `ids` [n] int64; zeros for -1."""
        vectors = np.zeros((len(ids), self.parts[0].shape[1]), np.float32)
        for place, each in enumerate(ids.tolist()):
            if each >= 0:
                number = bisect.bisect_right(self.firsts, each) - 1
                vectors[place] = self.parts[number][each - self.firsts[number]]
        return vectors


@dataclass
class OpenedEncoder:
    """The program of an export's encoder, and the tables beside it.

    Example: `open_encoder(open_export("vectors/mine")).program(items=items, lengths=lengths, users=users)`
    """

    manifest: EncoderManifest
    program: Any
    """A module; its arguments, by name, are `manifest.inputs`."""
    items: Table | None
    """Input vectors of the items; None: inside the program."""
    users: Table | None
    """Vectors of the users; None: inside the program."""

    @torch.no_grad()
    def run(self, arguments: dict[str, Tensor]) -> Tensor:
        """What the program makes of its arguments, in whatever order they are given."""
        result: Tensor = self.program(**{each.name: arguments[each.name] for each in self.manifest.inputs})
        return result


def open_encoder(export: Export) -> OpenedEncoder:
    """Check the files of an export's encoder and load its program. A program can run commands: open those of exports
    that you trust.

    Raises:
        InputError: the export holds none, is on an object store, or a file is missing or damaged.
    """
    encoder = export.manifest.encoder
    if encoder is None:
        raise InputError(
            f"{export.path} holds no encoder; add one: {command('export', {})}, with the options as before and "
            "--encoder.kind auto"
        )
    if remote(export.path):
        raise InputError(f"{export.path}: an encoder is opened from a local folder; copy the export")
    fs, root = filesystem(export.path)
    for part in encoder.files:
        path = f"{root}/{part.path}"
        if not os.path.isfile(path) or os.path.getsize(path) != part.bytes:
            raise _damaged(export, part, f"is missing or has not the {part.bytes} bytes that the manifest promises")
        if checksum_of(fs, path) != part.checksum:
            raise _damaged(export, part, "is damaged: its checksum is not the one that the manifest promises")
    program = encoder.program(".pt2")
    assert program is not None, "checked with the manifest"
    try:
        module = torch.export.load(f"{root}/{program.path}").module()
    except Exception as error:
        raise InputError(
            f"{export.path}: torch {torch.__version__} cannot load {program.path}, which torch {encoder.torch} wrote "
            f"({' '.join(str(error).split())[:200]}); export again with --encoder.kind auto"
        ) from error
    tables = {entity: _open_table(export, root, entity) for entity in ("item", "user")}
    return OpenedEncoder(encoder, module, tables["item"], tables["user"])


def _open_table(export: Export, root: str, entity: str) -> Table | None:
    assert export.manifest.encoder is not None
    parts: list[tuple[int, npt.NDArray[Any]]] = []
    for part in export.manifest.encoder.tables:
        if part.entity == entity:
            parts.append((part.first, _map_vectors(export, root, part)))
    return Table(parts) if parts else None


def _map_vectors(export: Export, root: str, part: TablePart) -> npt.NDArray[Any]:
    try:
        vectors = np.load(f"{root}/{part.path}", mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise _damaged(export, part, f"cannot be read ({error})") from None
    if vectors.shape != (part.rows, export.manifest.dim) or vectors.dtype != np.float32:
        raise _damaged(export, part, f"has {vectors.dtype} numbers of the shape {list(vectors.shape)}")
    return vectors


def _damaged(export: Export, part: Part, reason: str) -> InputError:
    return InputError(
        f"{export.path}: the part {part.path} {reason}; restore the file, or export again with --encoder.kind auto"
    )
