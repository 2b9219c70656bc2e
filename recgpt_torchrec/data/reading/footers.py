"""Reads what the Parquet footers of a dataset's sequences say, several at a time, and once per `Dataset`."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from recgpt_torchrec.data.dataset import COLUMNS, REQUIRED, Dataset, Part, find_column_fault

THREADS = 16
"""Number of footers read at a time: they wait for the disk or the store."""


@dataclass(frozen=True)
class Footer:
    """The footer of one part."""

    rows: int
    columns: frozenset[str]
    """Columns of `COLUMNS` that the part has."""
    fault: str | None
    """Why a column cannot be read; None: all can."""
    groups: tuple[tuple[int, int], ...]
    """(number of rows, total length of the `item_ids` lists) of each row group; none where there is a fault."""
    times: tuple[int, int] | None = None
    """Oldest and newest timestamp, where the statistics of all row groups with any say so."""


def read_footers(
    dataset: Dataset, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, Footer | Exception]]:
    """Yield (index of the part, its footer or why it cannot be read) of all parts that are not lost, in order.

    Args:
        dataset: footers that it keeps are not read again.
        advance: called with 1 after each part.
    """

    def read(part: Part) -> Footer | Exception:
        try:
            return dataset.footers.get(part.path) or _read(dataset, part)
        except Exception as error:  # for whoever takes it, in order
            return error

    parts = [(i, part) for i, part in enumerate(dataset.manifest.sequences) if part.path not in dataset.lost_parts]
    with ThreadPoolExecutor(THREADS) as pool:
        for (index, _), footer in zip(parts, pool.map(read, [part for _, part in parts]), strict=True):
            advance(1)
            yield index, footer


def column_bounds(meta: pq.FileMetaData, group: int, column: str) -> tuple[Any, Any] | None:
    """Smallest and largest value of a row group's column, or of the lists in it; None: there are no statistics."""
    names = [meta.schema.column(each).path.split(".")[0] for each in range(meta.num_columns)]
    statistics = meta.row_group(group).column(names.index(column)).statistics
    return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else None


def _read(dataset: Dataset, part: Part) -> Footer:
    with dataset.open_part(part) as file:
        meta, schema = file.metadata, file.schema_arrow
    columns = [name for name in COLUMNS if name in schema.names]
    faults = (reason for name in (*REQUIRED, *columns) if (reason := find_column_fault(schema, name)))
    fault = next(faults, None)
    groups: tuple[tuple[int, int], ...] = ()
    if fault is None:
        names = [meta.schema.column(column).path.split(".")[0] for column in range(meta.num_columns)]
        infos = (meta.row_group(group) for group in range(meta.num_row_groups))
        groups = tuple((info.num_rows, info.column(names.index("item_ids")).num_values) for info in infos)
    times = find_times(meta) if fault is None and "timestamps" in columns else None
    return Footer(meta.num_rows, frozenset(columns), fault, groups, times)


def find_times(meta: pq.FileMetaData) -> tuple[int, int] | None:
    """Oldest and newest timestamp of a part; None: it has none, or the statistics of a row group do not say."""
    bounds = []
    names = [meta.schema.column(each).path.split(".")[0] for each in range(meta.num_columns)]
    for group in range(meta.num_row_groups):
        statistics = meta.row_group(group).column(names.index("timestamps")).statistics
        if statistics is None:
            return None
        if statistics.has_min_max:  # not where all lists are empty
            bounds.append((statistics.min, statistics.max))
    return (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None


def time_range(dataset: Dataset) -> tuple[int, int] | None:
    """Oldest and newest timestamp of a dataset, from its footers; None: it has none, or they do not say."""
    footers = [footer for _, footer in read_footers(dataset)]
    times = [footer.times for footer in footers if isinstance(footer, Footer) and footer.times is not None]
    return (min(low for low, _ in times), max(high for _, high in times)) if times else None
