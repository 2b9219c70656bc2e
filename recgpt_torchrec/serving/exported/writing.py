"""Writes the encoder of a model into its export: the program, and the tables that it does not hold itself."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.fs
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.vectors import BLOCK_BYTES
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.checkpoints.trained import Trained
from recgpt_torchrec.config import Encoder
from recgpt_torchrec.data.bags import ITEM, USER
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, log_message, rank, run_on_first_rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.tabled.base import NONE, Vectors, unwrapped, unwrapped_dense
from recgpt_torchrec.retrieval.exports.additions import commit_addition, new_folder
from recgpt_torchrec.retrieval.exports.encoder_manifest import Argument, EncoderManifest, TablePart
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.serving.exported.encoder import FullEncoder, StepEncoder, Tower
from recgpt_torchrec.serving.exported.program import check_onnx, describe_inputs, export_program, write_onnx
from recgpt_torchrec.storage import filesystem, find_storage_failure, raise_storage_failure, scratch_beside
from recgpt_torchrec.storage.parts import Part, write_checksummed

COPIED_BYTES = 2**22
"""Bytes of a program that are copied at once."""


@dataclass(frozen=True)
class Layout:
    """What is inside the program."""

    items: bool
    users: bool

    @classmethod
    def choose(cls, settings: Encoder, items: int, users: int, dim: int, output_table: bool) -> "Layout":
        """What the options ask for, for a catalogue of this size."""
        limit, of_items = settings.mib * 2**20, 4 * dim * items * (2 if output_table else 1)
        inside = settings.kind == "full" or (settings.kind == "auto" and of_items <= limit)
        return cls(inside, inside and of_items + 4 * dim * users <= limit)

    @property
    def kind(self) -> str:
        """Of the program."""
        return "full" if self.items else "step"

    def is_that_of(self, encoder: EncoderManifest) -> bool:
        """Whether an encoder has it."""
        return (encoder.kind, "users" in {each.name for each in encoder.inputs}) == (self.kind, self.users)


def add_encoder(
    export: Export, settings: Encoder, checkpoint: str, dataset: Dataset, load: Callable[[], Trained]
) -> tuple[EncoderManifest, bool]:
    """Add the encoder to an export, in place of one that it holds (collective).

    Args:
        export: opened; its manifest names the encoder afterwards.
        settings: which encoder; the kind is not none.
        checkpoint: folder that the export was made of.
        dataset: that of the export.
        load: returns the model (collective); only called where an encoder is made.

    Returns:
        What the manifest says of the encoder, and whether it was there already.

    Raises:
        InputError: on every rank, where the model cannot be loaded or the export cannot be written.
    """
    if settings.onnx:
        check_onnx()
    manifest, tuning = export.manifest, CheckpointSettings.read(checkpoint).tuning
    output_table = tuning is not None and tuning.output_table
    layout = Layout.choose(settings, manifest.items, dataset.manifest.users, manifest.dim, output_table)
    there = manifest.encoder
    if (
        there is not None
        and layout.is_that_of(there)
        and there.torch == torch.__version__
        and (not settings.onnx or there.program(".onnx") is not None)
        and run_on_first_rank(lambda: _is_whole(export, there))
    ):
        return there, True
    log_message(f"{export.path}: the encoder becomes a program, which may take a minute")
    encoder = _write(export, layout, settings.onnx, dataset, load(), output_table)
    return commit_addition(export, "encoder", encoder), False


def describe(encoder: EncoderManifest) -> str:
    """What an encoder is, in one line."""
    inside = "vectors of the items inside" if encoder.kind == "full" else "vectors are looked up by the caller"
    formats = " and ".join(os.path.basename(file.path) for file in encoder.programs)
    return f"encoder     {encoder.kind}, {inside}, {encoder.bytes / 2**20:,.1f} MiB, {formats}"


def _is_whole(export: Export, encoder: EncoderManifest) -> bool:
    """Whether the files of an encoder are there, in their sizes."""
    fs, root = filesystem(export.path)
    infos = fs.get_file_info([f"{root}/{path}" for path in encoder.paths])
    return [info.size for info in infos] == [file.bytes for file in encoder.files]


def _write(
    export: Export, layout: Layout, onnx: bool, dataset: Dataset, trained: Trained, output_table: bool
) -> EncoderManifest:
    """Write program and tables (collective)."""
    fs, root = filesystem(export.path)
    folder = new_folder("encoder")
    fs.create_dir(f"{root}/{folder}", recursive=True)
    items, users = export.manifest.items, dataset.manifest.users
    tables: list[TablePart] = []
    for entity, rows, is_inside in ((ITEM, items, layout.items), (USER, users, layout.users)):
        if not is_inside:
            tables += _write_table(fs, root, folder, trained, entity, rows)
    inputs = outputs = of_users = None
    if layout.items:
        blocks = list(_vectors(trained, ITEM, *_all_on_first_rank(items), items))
        inputs = torch.cat([block.items.cpu() for block in blocks])
        outputs = torch.cat([block.outputs.cpu() for block in blocks]) if output_table else None
    if layout.users:
        of_users = torch.cat(
            [block.users.cpu() for block in _vectors(trained, USER, *_all_on_first_rank(users), users)]
        )

    def write_programs() -> EncoderManifest:
        decoder = unwrapped_dense(unwrapped(trained.model)).decoder
        tower = Tower(decoder, trained.inputs, trained.prompts)
        encoder: FullEncoder | StepEncoder = StepEncoder(tower)
        if inputs is not None:
            encoder = FullEncoder(tower, inputs, outputs, of_users, export.manifest.interests)
        arguments, program = describe_inputs(encoder), export_program(encoder)
        made = EncoderManifest(
            kind=layout.kind,
            interests=export.manifest.interests,
            max_len=tower.max_len,
            dim=tower.dim,
            segments=decoder.segments if trained.prompts else 0,
            events=trained.inputs.events,
            history_events=trained.inputs.history_events,
            time_unit=trained.inputs.time_unit,
            torch=torch.__version__,
            tables=tables,
            inputs=[_argument(name, dtype, shape) for name, (dtype, shape) in arguments.items()],
        )
        several = ["interests"] if layout.items else []
        shape = ["batch", *(str(export.manifest.interests) for _ in several), tower.dim]
        made.outputs = [_argument("interests" if several else "interest", torch.float32, shape)]
        with tempfile.TemporaryDirectory(dir=scratch_beside(export.path)) as scratch:
            torch.export.save(program, f"{scratch}/encoder.pt2")
            if onnx:
                write_onnx(program, arguments, f"{scratch}/encoder.onnx")
            for name in sorted(os.listdir(scratch), reverse=True):
                made.programs.append(_copy(fs, root, f"{folder}/{name}", f"{scratch}/{name}"))
        return made

    try:
        return run_on_first_rank(write_programs)
    except OSError as error:
        raise_storage_failure(error, export.path, "write")
        raise InputError(f"cannot write {export.path}: {error}") from error


def _argument(name: str, dtype: torch.dtype, shape: list[Any]) -> Argument:
    return Argument(name=name, dtype=str(dtype).removeprefix("torch."), shape=[str(size) for size in shape])


def _all_on_first_rank(rows: int) -> tuple[int, int]:
    return (0, rows) if rank() == 0 else (0, 0)


def _vectors(trained: Trained, entity: str, first: int, stop: int, most: int) -> Iterator[Vectors]:
    """Look up the vectors of the ids `first` to `stop` - 1 in blocks (collective); no rank has more than `most`."""
    model = unwrapped(trained.model)
    dense = unwrapped_dense(model)
    device, rows = dense.decoder.position.weight.device, max(1, BLOCK_BYTES // (4 * dense.model.dim))
    for place in range(0, most, rows):
        begin = min(first + place, stop)
        ids: Int64 = np.arange(begin, min(begin + rows, stop)) if begin < stop else NONE
        room = min(rows, most - place)
        if entity == USER:
            yield model.look_up(device, users=ids, room=(room, 0))
        else:
            yield model.look_up(device, items=ids, room=(0, room))


def _write_table(
    fs: pyarrow.fs.FileSystem, root: str, folder: str, trained: Trained, entity: str, rows: int
) -> list[TablePart]:
    """Write the vectors of users or items, each rank those of its id range (collective).

    Returns:
        The files of all ranks, by rising id.
    """
    ranges = [id_range(rows, each, world_size()) for each in range(world_size())]
    first, stop = ranges[rank()]
    blocks = _vectors(trained, entity, first, stop, max(stop - first for first, stop in ranges))
    dim = unwrapped_dense(unwrapped(trained.model)).model.dim
    path = f"{folder}/{entity}_vectors-{rank():05d}.npy"
    part = TablePart(entity=entity, first=first, path=path, rows=stop - first, items=stop - first, bytes=0, checksum="")
    failure: Exception | None = None
    try:
        with write_checksummed(fs, root, path, part) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (stop - first, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in blocks:
                file.write(_numbers(block.users if entity == USER else block.items))
    except OSError as error:
        failure = find_storage_failure(error, root, "write") or InputError(f"cannot write {root}: {error}")
        for _ in blocks:  # the look-ups are collective
            pass
    raise_first_error(failure)
    return [each for each in gather_objects(part) if each.rows]


def _numbers(vectors: Tensor) -> bytes:
    return vectors.cpu().numpy().astype("<f4").tobytes()


def _copy(fs: pyarrow.fs.FileSystem, root: str, path: str, source: str) -> Part:
    """Copy a local file into the export."""
    part = Part(path=path, rows=0, items=0, bytes=0, checksum="")
    with write_checksummed(fs, root, path, part) as sink, open(source, "rb") as file:
        while block := file.read(COPIED_BYTES):
            sink.write(block)
    return part
