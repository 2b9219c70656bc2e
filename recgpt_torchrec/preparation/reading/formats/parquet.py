"""Parquet files: columns by their exact name and place, whatever their type."""

from collections.abc import Callable
from pathlib import Path

import ibis.expr.datatypes as dt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.lists import read_lists
from recgpt_torchrec.preparation.reading.formats.source import (
    Column,
    Source,
    explain_missing,
    explain_unknown,
    partition_column,
)

types = pa.types
LATEST = 253_402_300_799
"""Latest time that is read from a timestamp, in seconds since 1970: the end of the year 9999."""
LISTS = ("item", "time", "rating", "click", "event", "position")


def _is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or _is_bytes(kind)


def _is_exact_decimal(kind: pa.DataType) -> bool:
    return types.is_decimal(kind) and kind.precision <= 38


def _is_number(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or _is_exact_decimal(kind) or types.is_boolean(kind)


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


def _is_key(kind: pa.DataType) -> bool:
    is_text = _is_text(kind) and not types.is_fixed_size_binary(kind)  # raw bytes, such as a UUID without its type
    is_plain = is_text or _is_uuid(kind) or types.is_integer(kind) or _is_exact_decimal(kind)
    return is_plain or (types.is_floating(kind) and not types.is_float16(kind))


def _is_time(kind: pa.DataType) -> bool:
    is_moment = types.is_timestamp(kind) or types.is_date(kind)
    return is_moment or _is_text(kind) or (_is_number(kind) and not types.is_boolean(kind))


ALLOWED: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "user": (_is_key, "text, a whole number or a UUID"),
    "item": (_is_key, "text, a whole number or a UUID"),
    "time": (_is_time, "a number, a date, a date-time or text"),
    "rating": (lambda kind: _is_number(kind) or _is_text(kind), "a number"),
    "click": (lambda kind: _is_number(kind) or _is_text(kind), "a number, a boolean or text"),
    "event": (lambda kind: _is_number(kind) or _is_text(kind), "text, a number or a boolean"),
    "position": (lambda kind: _is_number(kind) or _is_text(kind), "a number"),
}
"""What each column may hold, and its name in messages."""


class Parquet:
    """The columns of one Parquet file."""

    def __init__(self, file: InputFile, config: Prepare, schema: pa.Schema, wanted: dict[str, str]) -> None:
        self.file, self.config, self.schema, self.wanted = file, config, schema, wanted

    def source(self, path: str) -> Source:
        """The rows of the file at the engine's `path`.

        Raises:
            InputError: a column is absent, ambiguous, or of a type that cannot be used.
        """
        columns = {role: self._find(role, name) for role, name in self.wanted.items()}
        columns = read_lists(self.file, self.config, columns, self._first_values(columns["item"]))
        members = {column.name: f"{quote_sql(column.name)}, {column.sql}" for column in columns.values()}
        return Source(
            relation=self.relation(path),
            columns=columns,
            text=f"CAST(json_object({', '.join(members.values())}) AS VARCHAR)",
        )

    def relation(self, path: str) -> str:
        """SQL that reads the file, its columns named by place: the engine ignores the case of names."""
        places = ", ".join(f"c{place}" for place in range(len(self.schema.names)))
        return f"read_parquet({quote_sql(path)}, hive_partitioning=false) AS parquet({places})"

    def find(self, name: str) -> Column:
        """The column of a name in `--where`.

        Raises:
            InputError: there is none, or more than one.
        """
        if name in self.config.partition_columns:
            return partition_column(self.file, name, self.schema.names)
        if name not in self.schema.names:
            raise explain_unknown(self.file, name, self.schema.names)
        return self._place(name, "")

    def _find(self, role: str, name: str) -> Column:
        if name in self.config.partition_columns:
            return partition_column(self.file, name, self.schema.names)
        if name not in self.schema.names:
            raise explain_missing(self.file, role, name, self.schema.names, self.config)
        return self._place(name, role)

    def _place(self, name: str, role: str) -> Column:
        """A column by name; with a role, its type is checked."""
        if (count := self.schema.names.count(name)) > 1:
            raise InputError(f"{self.file.path} has {count} columns {name!r}; rename them, so that one is meant")
        place = self.schema.names.index(name)
        kind, sql = self.schema.field(place).type, f"c{place}"
        words = str(kind)
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        value = kind.value_type if is_list or types.is_dictionary(kind) else kind
        if types.is_dictionary(value):
            value = value.value_type
        if role and (is_list and role not in LISTS or not (types.is_null(value) or ALLOWED[role][0](value))):
            raise InputError(
                f"{self.file.path}: column {name!r} holds {words}, and the {role} must be {ALLOWED[role][1]}"
                f"{' or a list of these' if role in LISTS else ''}; convert it, or name another column with "
                f"--{role}_column"
            )
        if types.is_null(value):
            return Column(name=name, sql=f"{sql}::VARCHAR" if not is_list else sql, kind=words, is_list=is_list)
        if _is_bytes(value):
            decode = f"list_transform({sql}, lambda bytes: TRY(decode(bytes)))" if is_list else f"TRY(decode({sql}))"
            undecoded = f"CASE WHEN {sql} IS NOT NULL AND {decode} IS NULL THEN 'bytes that are not UTF-8' END"
            fault = "" if is_list else undecoded
            return Column(name=name, sql=decode, kind=words, is_list=is_list, fault=fault)
        if _is_uuid(value):
            sql = f"{sql}::VARCHAR{'[]' if is_list else ''}"
            return Column(name=name, sql=sql, kind="uuid", is_list=is_list)
        if not role and not (_is_number(value) or _is_time(value)):
            # Only --where and attributes look at it.
            return Column(name=name, sql=sql, type=dt.json, kind=words, is_list=is_list)
        if types.is_large_string(value) or types.is_string_view(value):
            value = pa.string()
        return Column(name=name, sql=sql, type=dt.DataType.from_pyarrow(value), kind=words, is_list=is_list)

    def _first_values(self, column: Column, count: int = 1000) -> list[str]:
        """The first values of a column of text; none of another, or of the names of folders."""
        if column.is_list or not column.type.is_string() or column.name not in self.schema.names:
            return []
        with self.file.open() as stream, pq.ParquetFile(stream) as file:
            batch = next(file.iter_batches(count, columns=[column.name]), None)
        values = [] if batch is None else batch.column(0).to_pylist()
        return [value for value in values if isinstance(value, str)]

    def clip_timestamps(self, path: str, target: Path) -> int:
        """Write a copy of the file in which timestamps beyond the engine's range are null.

        Args:
            path: the file on a local disk.
            target: the copy.

        Returns:
            The number of such timestamps; 0: there are none, and no copy was written.
        """
        wide = {field.name: field.type for field in self.schema if types.is_timestamp(field.type)}
        latest = {name: LATEST * {"s": 1, "ms": 1000}.get(kind.unit, 0) for name, kind in wide.items()}
        latest = {name: limit for name, limit in latest.items() if limit}
        if not latest:
            return 0
        count = 0
        with pq.ParquetFile(path) as file, pq.ParquetWriter(target, self.schema) as writer:
            for batch in file.iter_batches():
                for name, limit in latest.items():
                    place = batch.schema.names.index(name)
                    raw = batch.column(place).cast(pa.int64())
                    kept = pc.if_else(pc.less_equal(pc.abs(raw), limit), raw, None)
                    count += kept.null_count - raw.null_count
                    batch = batch.set_column(place, batch.schema.field(place), kept.cast(wide[name]))
                writer.write_batch(batch)
        return count
