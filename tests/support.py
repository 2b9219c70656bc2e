"""Shared by tests: small datasets and options, deliberate damage, stages run in this process, and reading results."""

import contextlib
import importlib
import json
import multiprocessing.forkserver
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recgpt_torchrec import cli
from recgpt_torchrec.config.stages import STAGES, module_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.storage.parts import checksum_of_footer
from tools.small_run import SMALL, SmallAttribute, training_part, walks, write_dataset

__all__ = [
    "SMALL",
    "SmallAttribute",
    "change_json",
    "ids_by_bag",
    "items_of",
    "overwrite",
    "promise_of",
    "read_epochs",
    "read_files",
    "read_sequences",
    "rewrite",
    "stage",
    "start_forkserver",
    "stay_in_group",
    "training_part",
    "walks",
    "write_dataset",
]


def ids_by_bag(bags: Any) -> tuple[list[int | None], list[int | None]]:
    """The id in each user's and in each item's bag of a jagged tensor; None: the bag is empty."""
    keys = bags.keys()
    assert keys == ["user", *(f"item_{number}" for number in range(len(keys) - 1))]
    lengths, values = bags.lengths().view(len(keys), bags.stride()).tolist(), iter(bags.values().tolist())
    users, *items = [[next(values) if length else None for length in key_lengths] for key_lengths in lengths]
    assert next(values, None) is None and {length for each in lengths for length in each} <= {0, 1}
    return users, [key_items[place] for place in range(bags.stride()) for key_items in items]


def items_of(batch: Any) -> torch.Tensor:
    """[distinct items] int64 of a batch, by bag."""
    return torch.tensor([item for item in ids_by_bag(batch.bags)[1] if item is not None], dtype=torch.int64)


def stage(name: str, options: dict[str, Any]) -> int:
    """Run a stage in this process as its command line would, and return its exit status.

    Args:
        name: of the stage, `pretrain` or another.
        options: for example `{"--model.dim": 8}`; None omits an option, a list gives several words.
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
    """Rewrite a part of a dataset's sequences with changed rows, and update the manifest to match.

    Args:
        folder: of the dataset.
        change: changes the rows in place.
        part: index of the part.
        types: new types of columns; None drops a column.
        rows_per_group: None: as before.
    """
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    entry = manifest.sequences[part]
    path = folder / entry.path
    groups = pq.ParquetFile(path).metadata.row_group(0).num_rows
    rows = pq.read_table(path).to_pylist()
    change(rows)
    fields = {field.name: field.type for field in pq.read_schema(path)} | (types or {})
    schema = pa.schema([(name, kind) for name, kind in fields.items() if kind is not None])
    rows = [{name: row[name] for name in schema.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=rows_per_group or groups)
    vars(entry).update(promise_of(path), rows=len(rows))
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


def stay_in_group() -> None:
    """Let the stages that a test rank runs share its process group, on CPU, instead of joining one of their own."""
    from recgpt_torchrec.distributed import processes

    there: Any = lambda *_, **__: contextlib.nullcontext(torch.device("cpu"))  # noqa: E731
    processes.process_group = there


def promise_of(path: Path) -> dict[str, Any]:
    """The fields of a manifest's entry of a part that hold what its file is, to be updated where a test rewrites it."""
    data = path.read_bytes()
    return {"bytes": len(data), "checksum": f"{zlib.crc32(data):08x}", "footer": checksum_of_footer(data)}


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a stage in place; it loses its checksum, like one of an earlier version."""
    values = json.loads(path.read_text())
    values.pop("checksum", None)
    change(values)
    path.write_text(json.dumps(values))


def overwrite(path: Path, where: slice) -> None:
    """Overwrite a slice of a file with noise; the file keeps its size."""
    data = bytearray(path.read_bytes())
    size = len(data[where])
    data[where] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)


def read_epochs(output: Path) -> list[dict[str, Any]]:
    """Read the records of a run's epochs."""
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def read_files(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_sequences(folder: Path) -> dict[str, list[Any]]:
    """Read the sequences of a dataset as columns, in the order of its manifest."""
    found: dict[str, list[Any]] = {}
    for part in Dataset.open(str(folder)).manifest.sequences:
        for name, values in pq.read_table(folder / part.path).to_pydict().items():
            found.setdefault(name, []).extend(values)
    return found


def start_forkserver() -> None:
    """Start the process that ranks and loader workers are forked from, unless it already runs.

    The module that starts it decides which imports it holds, so it must be tools.ranks, whichever test runs first.
    """
    from tools.ranks import one_thread_environment

    with one_thread_environment():
        multiprocessing.forkserver.ensure_running()
