"""Measures the export of item vectors on several ranks, and of a delta, beside pyarrow writing the same array.

    python -m tools.benchmarks.export --items 1e6 1e7 --output export.json

For each number of items a synthetic vocabulary is written (`tools.write_dataset`). Then, each way once per round in new
processes: `pyarrow.parquet.write_table` with its defaults on one rank (the array of vectors alone, and with ids and
keys), an export on all ranks in each dtype, and a delta after a tenth of the vectors has moved. Seconds are those of
`write_export` or `write_table` alone, commit included. Peak memory is what a rank holds at most beyond what it held
before (VmHWM). Vectors are made block by block as they are asked for: the ranks hold no catalogue, so that the peak is
that of the export itself.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.catalogue.vectors import BLOCK_BYTES
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.retrieval.exports.chain import open_chain
from recgpt_torchrec.retrieval.exports.keys import Keys
from recgpt_torchrec.retrieval.exports.manifest import DTYPES
from recgpt_torchrec.retrieval.exports.writing import write_delta, write_export
from tools.benchmarks.measuring import Figures, Kind, Measured, Ratio, table, take_turns, write
from tools.ranks import run_ranks
from tools.write_dataset import main as write_dataset
from tools.write_dataset import whole

USERS = 2000
MOVED = 10
"""One block in so many has moved when the delta is written."""
TIMEOUT = 1800.0
"""Seconds."""
TABLES = {"write_table, vectors alone": False, "write_table, with ids and keys": True}
"""Ways of pyarrow: whether ids and keys are columns too."""


def blocks(first: int, stop: int, dim: int, moved: bool = False) -> Iterator[tuple[Int64, Float32]]:
    """Ids and vectors [n, dim] float32 of the items `first` to `stop` - 1, in blocks like those of a catalogue.

    A block is one and the same of random numbers times a factor of its own, which takes a thirtieth of the time that
    writing it takes.
    """
    rows = max(1, BLOCK_BYTES // (4 * dim))
    base = np.random.default_rng(0).normal(scale=0.1, size=(rows, dim)).astype(np.float32)
    for start in range(first, stop, rows):
        number = start // rows
        factor = np.float32(1 + number % 1000 * 1e-3 + (0.5 if moved and number % MOVED == 0 else 0))
        ids = np.arange(start, min(start + rows, stop))
        yield ids, base[: ids.size] * factor


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def export(rank: int, world_size: int, data: str, output: str, dim: int, dtype: str, since: str | None) -> Figures:
    """One rank of an export, or of a delta."""
    dataset = Dataset.open(data)
    items = blocks(*id_range(dataset.manifest.items, rank, world_size), dim, since is not None)
    users = blocks(*id_range(USERS, rank, world_size), dim)
    pa.array(np.zeros(1))  # imports pandas where it is installed, as the other ways do before their clock runs
    more: dict[str, Any] = {"everyone": True, "checkpoint": "", "checkpoint_fingerprint": "", "settings": {}}
    before, began = memory("VmRSS"), time.perf_counter()
    if since is None:
        write_export(output, dataset, items=items, users=users, dim=dim, interests=1, dtype=dtype, **more)
    else:
        write_delta(output, dataset, open_chain([since]), 0.0, items=items, users=users, **more)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_MiB": (memory("VmHWM") - before) / 2**20}


def table_alone(rank: int, world_size: int, data: str, output: str, dim: int, whole: bool) -> Figures:
    """pyarrow writing all vectors as one table from one process."""
    dataset = Dataset.open(data)
    vectors = np.concatenate([vectors for _, vectors in blocks(0, dataset.manifest.items, dim)])
    columns = {"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)}
    if whole:
        ids, keys = np.arange(dataset.manifest.items), Keys(dataset, "items")
        found = [keys.of(ids[start : start + 2**18]) for start in range(0, ids.size, 2**18)]
        columns = {"item_id": pa.array(ids), "key": pa.chunked_array(found), **columns}
    both, before, began = pa.table(columns), memory("VmRSS"), time.perf_counter()
    pq.write_table(both, output)
    return {"seconds": time.perf_counter() - began, "peak_MiB": (memory("VmHWM") - before) / 2**20}


def kind_of(items: int, options: argparse.Namespace, folder: Path) -> Kind:
    """The ways of one number of items."""
    data, since = str(folder / "data"), str(folder / "since")
    names = map(str, itertools.count())

    def run(function: Callable[..., Figures], ranks: int, *arguments: object, output: str | None = None) -> Figures:
        path = output or str(folder / f"new{next(names)}")
        of_ranks: list[Figures] = run_ranks(function, ranks, data, path, options.dim, *arguments, timeout=TIMEOUT)
        size = sum(file.stat().st_size for file in [Path(path), *Path(path).rglob("*")] if file.is_file())
        if output is None:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        seconds = max(figures["seconds"] for figures in of_ranks)
        peak = max(figures["peak_MiB"] for figures in of_ranks)
        return {"rows_s": items / seconds, "seconds": seconds, "peak_MiB": peak, "MB": size / 1e6}

    def delta() -> Figures:
        if not Path(since).exists():
            run(export, options.ranks, "float32", None, output=since)
        return run(export, options.ranks, "float32", since)

    tables = {way: lambda whole=whole: run(table_alone, 1, whole) for way, whole in TABLES.items()}
    exports = {
        f"export {dtype}, {options.ranks} ranks": lambda dtype=dtype: run(export, options.ranks, dtype, None)
        for dtype in DTYPES
    }
    name = f"delta of a tenth, {options.ranks} ranks"
    ratios = {
        f"{way} over {plain}": Ratio((way, "rows_s"), (plain, "rows_s")) for way in [*exports, name] for plain in TABLES
    }
    return Kind({**tables, **exports, name: delta}, ratios, ("rows_s", "seconds", "peak_MiB", "MB"))


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print and write the figures so far after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", type=whole, default=[10**7], help="numbers of items (default: 1e7)")
    parser.add_argument("--dim", type=int, default=64, help="length of a vector (default: 64)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of an export (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: 3)")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args(arguments)
    measured: dict[str, Measured] = {}
    for items in options.items:
        with tempfile.TemporaryDirectory(prefix="export-", dir=options.folder) as folder:
            words = ["--items", str(items), "--users", str(USERS), "--output", f"{folder}/data"]
            write_dataset(words)
            name = f"{items:,} items of dim {options.dim}"
            measured[name] = Measured(kind_of(items, options, Path(folder)))
            for number in range(options.rounds):
                take_turns({name: measured[name]}, number, lambda said: print(said, file=sys.stderr, flush=True))
                if options.output:
                    write(options.output, measured, vars(options))
        print(table({name: measured[name]}), flush=True)


if __name__ == "__main__":
    main()
