"""Small datasets for tests, written straight from Python lists and damaged on purpose; stages run in this process."""

import importlib
import json
import multiprocessing.forkserver
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from recgpt_torchrec import cli
from recgpt_torchrec.config.stages import STAGES, module_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.storage.folders import write_manifest
from recgpt_torchrec.storage.parts import write_parts


def write_dataset(
    folder: Path | str,
    histories: Sequence[Sequence[int]],
    *,
    items: int | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    more: dict[str, pa.Array] | None = None,
    rows_per_group: int = 8,
    groups_per_part: int = 2,
    vocabulary: str = "test",
) -> Dataset:
    """Write one user a history, with user ids from 0 on, and open what was written.

    Args:
        folder: of the dataset; made.
        histories: item ids of each user, oldest first.
        items: size of the catalogue; None: up to the largest id.
        segments: segment ids beside the items.
        more: columns beside these.
        rows_per_group, groups_per_part: layout of the Parquet parts.
        vocabulary: fingerprint to put in the manifest.
    """
    known = items if items is not None else max((max(h, default=-1) for h in histories), default=-1) + 1
    columns: dict[str, pa.Array] = {
        "user_id": pa.array(range(len(histories)), pa.int64()),
        "item_ids": pa.array([list(h) for h in histories], pa.list_(pa.int64())),
        "timestamps": pa.array([list(range(len(h))) for h in histories], pa.list_(pa.int64())),
    }
    if segments is not None:
        columns["segment_ids"] = pa.array([list(s) for s in segments], pa.list_(pa.int8()))
    table = pa.table(columns | (more or {}))
    groups = [table.slice(start, rows_per_group) for start in range(0, len(histories), rows_per_group)]
    everything = np.array([i for h in histories for i in h], dtype=np.int64)
    trained = np.array([i for h in histories for i in training_part(h)], dtype=np.int64)
    catalogue = pa.table(
        {
            "item_id": pa.array(range(known), pa.int64()),
            "key": [f"item {i}" for i in range(known)],
            "count": np.bincount(everything, minlength=known)[:known],
            "train_count": np.bincount(trained, minlength=known)[:known],
        }
    )
    users = pa.table({"user_id": columns["user_id"], "key": [f"user {u}" for u in range(len(histories))]})
    fs, root = pyarrow.fs.LocalFileSystem(), str(folder)
    manifest = Manifest(
        users=len(histories),
        items=known,
        interactions=int(everything.size),
        vocabulary=vocabulary,
        sequences=write_parts(fs, root, "sequences", groups, groups_per_part),
        item_parts=write_parts(fs, root, "items", [catalogue], 1),
        user_parts=write_parts(fs, root, "users", [users], 1),
    )
    write_manifest(fs, root, manifest.to_json())
    return Dataset.open(root)


def stage(name: str, options: dict[str, Any]) -> int:
    """Run a stage in this process as its command line would, and return its exit status.

    Args:
        name: of the stage, `pretrain` or another.
        options: `{"--model.dim": 8}`; None leaves one out, a list takes several words.
    """
    words = [str(word) for option, value in options.items() for word in _words(option, value)]
    function = importlib.import_module(module_of(name)).main
    before, sys.argv = sys.argv, [name, *words]
    try:
        cli.run(STAGES[name].config, function, module_of(name))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = before
    return 0


def _words(option: str, value: Any) -> list[Any]:
    if value is None:
        return []
    return [option, *value] if isinstance(value, list) else [option, value]


def rewrite(
    folder: Path,
    change: Callable[[list[dict[str, Any]]], object],
    *,
    part: int = 0,
    types: dict[str, pa.DataType | None] | None = None,
    rows_per_group: int | None = None,
) -> None:
    """Write a part of a dataset's sequences again with other rows, and a manifest that promises just this file.

    Args:
        folder: of the dataset.
        change: of the rows, in place.
        part: which part.
        types: other types of columns; None drops a column.
        rows_per_group: None: as it was.
    """
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    there = manifest.sequences[part]
    path = folder / there.path
    groups = pq.ParquetFile(path).metadata.row_group(0).num_rows
    rows = pq.read_table(path).to_pylist()
    change(rows)
    fields = {field.name: field.type for field in pq.read_schema(path)} | (types or {})
    schema = pa.schema([(name, kind) for name, kind in fields.items() if kind is not None])
    rows = [{name: row[name] for name in schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=rows_per_group or groups)
    there.rows, there.bytes = len(rows), path.stat().st_size
    there.checksum = f"{zlib.crc32(path.read_bytes()):08x}"
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


def overwrite(path: Path, where: slice) -> None:
    """Noise in the middle of a file, which keeps its size."""
    data = bytearray(path.read_bytes())
    size = len(data[where])
    data[where] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)


def start_forkserver() -> None:
    """Start the one clean process that ranks and loader workers of the tests are forked from, unless it runs already.

    Who starts it decides what it has imported, so it has to be the launcher, whichever test comes first.
    """
    from tests.distributed.launch import _one_thread

    with _one_thread():
        multiprocessing.forkserver.ensure_running()


def training_part(history: Sequence[int]) -> Sequence[int]:
    """What of a history is trained on, said a second time: everything but the last two, if there are three."""
    return history[:-2] if len(history) >= 3 else history


def walks(users: int, items: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[list[int]]:
    """Histories with something to learn: each item is mostly followed by one of the next two on a ring."""
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(users):
        at = int(rng.integers(items))
        history = [at]
        for _ in range(int(rng.integers(shortest, longest + 1)) - 1):
            at = (at + int(rng.integers(1, 3))) % items if rng.random() < 0.9 else int(rng.integers(items))
            history.append(at)
        histories.append(history)
    return histories
