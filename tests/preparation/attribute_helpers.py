"""Tables of attributes, and what prepare should make of them: a plain reference."""

import csv
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.config.prepare import NULL_WORDS
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.inputs.spec import table_of_attribute

LOG = [("u1", "1", 1), ("u1", "2", 2), ("u2", "1", 3), ("u2", "3", 4), ("u3", "2", 5), ("u3", "4", 6)]
"""Items 1 to 4 and users u1 to u3."""


def write_table(path: Path, rows: list[dict[str, Any]], separator: str = ",") -> Path:
    """Write rows in the format that the ending says; lists become text in text formats."""
    names = list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator, lineterminator="\n")
            cells = [["|".join(map(str, v)) if isinstance(v, list) else v for v in row.values()] for row in rows]
            writer.writerows([names, *cells])
    return path


def read_values(folder: Path, entity: str, name: str) -> dict[str, list[Any]]:
    """The values of each user or item by its key; of a number the bucket, of a text the text."""
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    table = pq.read_table(folder / f"{entity}s")
    if f"text_{name}" in table.column_names:
        return dict(zip(table["key"].to_pylist(), table[f"text_{name}"].to_pylist(), strict=True))
    (found,) = [each for each in manifest.attributes if (each.entity, each.name) == (entity, name)]
    lists = table[found.column].to_pylist()
    if found.kind == "category":
        words = vocabulary(folder, entity, name)
        lists = [[words[value] for value in each] for each in lists]
    return dict(zip(table["key"].to_pylist(), lists, strict=True))


def vocabulary(folder: Path, entity: str, name: str) -> list[str]:
    """The values of an attribute by id, checked to be dense from 0 and to be counted right."""
    table = pq.read_table(folder / "attributes" / table_of_attribute(entity, name))
    assert table["value_id"].to_pylist() == list(range(table.num_rows))
    lists = pq.read_table(folder / f"{entity}s")[f"attribute_{name}"].to_pylist()
    counts = Counter(value for each in lists for value in each)
    assert all(each == sorted(set(each)) for each in lists)
    assert table["count"].to_pylist() == [counts[value] for value in range(table.num_rows)]
    return table["key"].to_pylist()


def plain_order(values: set[str], known: list[str], seed: int = 0) -> list[str]:
    """Values by id: the known ones, and the others in a random order."""
    return known + sorted(values - set(known), key=lambda v: hashlib.md5(f"{seed}:{v}".encode()).hexdigest())


def plain_spelling(value: Any) -> str | None:
    """The one spelling of a value, None where it is missing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value == int(value):
        value = int(value)
    text = str(value)
    if not text.strip() or text in NULL_WORDS:
        return None
    whole, point, zeros = text.partition(".")
    if point and zeros and not zeros.strip("0") and whole.removeprefix("-").isdigit():
        return "0" if whole == "-0" else whole
    return text


def plain_edges(numbers: list[float], buckets: int) -> list[float]:
    """Edges at quantiles of the finite numbers."""
    finite = sorted(number for number in numbers if math.isfinite(number))
    edges = {finite[place * len(finite) // buckets] for place in range(1, buckets)} if finite else set()
    return sorted(edge for edge in edges if edge > finite[0])


def plain_bucket(number: float, edges: list[float]) -> int:
    """The number of edges at or below a number."""
    return sum(edge <= number for edge in edges)
