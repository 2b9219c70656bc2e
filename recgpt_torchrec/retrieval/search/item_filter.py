"""Which items of an export may be in a list: `--allow`, `--deny`, and `--items` with `--where`.

An item may be if it is in the list to allow, a row of its in the table meets the condition, and it is not in the list
to deny. Rank 0 joins the keys with those of the export in DuckDB, which spills to disk; every rank gets the answer.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.distributed.processes import run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.key_files import FITS, UNCOMPUTED, KeyFile, LoadedKeys
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.filters import FilterRecord
from recgpt_torchrec.retrieval.key_inputs import item_files, open_engine

Bool = npt.NDArray[np.bool_]


def find_allowed(config: Retrieve, export: Export, records: dict[str, FilterRecord]) -> Bool | None:
    """Which items may be in a list (collective).

    Args:
        config: of the stage.
        export: whose items are filtered.
        records: of the options given; completed in place, on every rank.

    Returns:
        [items] bool by id, on every rank: one byte per item; None: no filter is asked for.

    Raises:
        InputError: a file cannot be read, --allow or --items knows none of the export's items, or no item is left.
    """
    if not (files := item_files(config)):
        return None

    def find() -> tuple[bytes, dict[str, FilterRecord]]:
        with open_engine(config) as engine:
            allowed = _join(engine, export, files, records)
        if not allowed.any():
            each = "\n".join(f"  {records[name].describe(name)}" for name in files)
            raise InputError(f"the filter leaves no item of {config.export}:\n{each}\nLoosen one of these options")
        return np.packbits(allowed).tobytes(), records  # a bit per item goes to the other ranks

    bits, completed = run_on_first_rank(find)
    records |= completed
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=export.manifest.items).view(bool)


def _join(engine: DuckDBEngine, export: Export, files: dict[str, KeyFile], records: dict[str, FilterRecord]) -> Bool:
    """Join the keys of all files with the export's items."""
    loaded = {name: file.load(engine, f"listed_{name}") for name, file in files.items()}
    schema = pa.schema([("item_id", pa.int64()), ("key", pa.string())])
    batches = (pa.Table.from_batches([batch]).select(schema.names) for batch in export.items(schema.names))
    engine.fill("export_items", batches, schema)
    allowed = np.ones(export.manifest.items, dtype=bool)
    for name, file in files.items():
        fits = _match(engine, export, file, loaded[name], records[name])
        allowed &= ~fits if name == "deny" else fits
    return allowed


def _match(engine: DuckDBEngine, export: Export, file: KeyFile, loaded: LoadedKeys, record: FilterRecord) -> Bool:
    """Which items of the export a file names, and whether they meet its condition."""
    name = file.option.removeprefix("--")
    run = engine.connection.execute
    ((unknown, example),) = run(
        f"SELECT count(*), min(key) FROM listed_{name} ANTI JOIN export_items USING (key)"
    ).fetchall()
    if unknown == loaded.keys and name != "deny":  # a list of what is sold out may hold nothing that is known
        ((other,),) = run("SELECT min(key) FROM export_items").fetchall()
        raise InputError(
            f"{file}: none of its {loaded.keys:,} keys is an item of {export.path}, whose keys are such as {other!r}, "
            f"not {example!r}. Give keys as the log has them, in a table in the column that --item_column names"
        )
    fits = np.zeros(export.manifest.items, dtype=bool)
    joined = f"SELECT item_id, state FROM export_items JOIN listed_{name} USING (key)"
    for batch in engine.connection.cursor().sql(joined).to_arrow_reader(2**16):
        ids, states = batch["item_id"].to_numpy(), batch["state"].to_numpy()
        fits[ids[states == FITS]] = True
        record.uncomputed += int((states == UNCOMPUTED).sum())
    record.keys, record.unknown, record.example = loaded.keys, unknown, example or ""
    record.unusable, record.fits = loaded.unusable, int(fits.sum())
    if file.where is not None:
        record.absent = export.manifest.items - (loaded.keys - unknown)
    return fits
