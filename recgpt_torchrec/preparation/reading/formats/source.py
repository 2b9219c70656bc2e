"""A raw file as a relation of the engine: its rows, and the SQL of each column that is read.

The modules `separated`, `json_lines` and `parquet` make a `Source` of a file; `duckdb_reader` loads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import ibis.expr.datatypes as dt

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.dialect import (
    SEPARATORS,
    find_separator,
    looks_like_data,
    shell_word,
    shorten,
)
from recgpt_torchrec.preparation.reading.files import InputFile

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Value of a folder NAME=VALUE whose rows have no value."""

HEADERLESS = "--header false with columns by place, for example --user_column 0 --item_column 1 --time_column 4"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column as the engine reads it."""

    name: str
    sql: str
    type: dt.DataType = field(default_factory=lambda: dt.string)
    """Type of a value; of a list: of its elements."""
    kind: str = "text"
    """The type in words, as the file has it."""
    is_list: bool = False
    fault: str = ""
    """SQL of what is wrong with a value, or null; empty: nothing can be."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The rows of one file."""

    relation: str
    """SQL after FROM."""
    columns: dict[str, Column]
    """The columns to read: user, item, time, rating, click, event, position, as far as they are asked for."""
    text: str
    """SQL of the whole row as text, to be shown."""
    fault: str = "NULL"
    """SQL of what is wrong with a row, or null."""
    several_lines: str = ""
    """SQL that tells whether a row spans several lines; empty: none does."""
    row_number: str = "row_number() OVER ()"
    """SQL of the number of a row, from 1."""


def wanted_columns(config: Prepare, timed: bool) -> dict[str, str]:
    """Names of the columns to read: user, item, time, rating, click, event, position, as far as they are asked for."""
    return {
        "user": config.user_column,
        "item": config.item_column,
        **({"time": config.time_column} if timed and config.time_column else {}),
        **({"rating": config.rating_column} if config.rating_column else {}),
        **({"click": config.click_column} if config.click_column else {}),
        **({"event": config.event_column} if config.event_column else {}),
        **({"position": config.position_column} if config.position_column else {}),
    }


def partition_column(file: InputFile, name: str, names: Sequence[str]) -> Column:
    """A column whose value is in the name of the file's folder.

    Raises:
        InputError: the file is in no such folder, or has a column of that name itself.
    """
    if name in names:
        raise InputError(
            f"{file.path} has a column {name!r} itself; leave it out of --partition_columns, whose values are read "
            "from the names of folders"
        )
    if name not in file.partitions:
        raise InputError(
            f"{file.path} is in no folder {name}=VALUE, which --partition_columns names; its folders with values are "
            f"{', '.join(f'{key}={value}' for key, value in file.partitions.items()) or 'none'}"
        )
    value = file.partitions[name]
    sql = "NULL::VARCHAR" if value == HIVE_NULL else f"url_decode({quote_sql(value)})"
    return Column(name=name, sql=sql, kind="name of the folder")


def explain_unknown(file: InputFile, name: str, names: Sequence[str]) -> InputError:
    """The error for a column of `--where` that a file lacks."""
    hint = ""
    if name in file.partitions:
        hint = f". It is the name of a folder, {name}={file.partitions[name]}: pass --partition_columns {name}"
    elif alike := [each for each in names if each.lower() == name.lower()]:
        hint = f". Do you mean {alike[0]}?"
    shown = ", ".join(map(repr, names[:30])) + (", ..." if len(names) > 30 else "")
    return InputError(f"--where: {file.path} has no column {name!r}; it has {shown}{hint}")


def explain_missing(file: InputFile, role: str, column: str, names: Sequence[str], config: Prepare) -> InputError:
    """The error for a column that a file lacks, with what may be meant instead."""
    hint = ""
    if role == "time":
        hint = ", or pass --time_column null if rows are already in time order"
    if column in file.partitions:
        hint += f". It is the name of a folder, {column}={file.partitions[column]}: pass --partition_columns {column}"
    elif any(name.startswith('"') and name.strip('"') == column for name in names):
        hint += ". Its values are in quotes: pass --quote '\"'"
    elif names and names[0].startswith("{"):
        hint += ". It looks like JSON lines: pass --input_format jsonl"
    elif file.format in ("csv", "tsv") and not config.header:
        hint += f". With --header false columns are named by place, from 0 to {len(names) - 1}"
    elif file.format in ("csv", "tsv") and len(names) == 1:
        wanted = [config.user_column, config.item_column]
        separator = find_separator(names[0], wanted) or next((mark for mark in SEPARATORS if mark in names[0]), None)
        if separator is not None:
            hint += f". Is it separated otherwise? Pass --separator {shell_word(separator)}"
            if looks_like_data(names[0].split(separator)):
                hint += f" and, if it has no header, {HEADERLESS}"
    elif file.format in ("csv", "tsv") and looks_like_data(names):
        hint += f". Its first line looks like a row: if it has no header, pass {HEADERLESS}"
    shown = ", ".join(repr(shorten(entry)) for entry in names[:30]) + (", ..." if len(names) > 30 else "")
    alike = [name for name in names if name.strip().lower() == column.strip().lower()]
    named = f" --{role}_column {alike[0]!r}" if alike else f" --{role}_column"
    return InputError(
        f"{file.path} has no column {column!r} for the {role}; it has {shown or 'none'}. "
        f"Name the right one with{named}{hint}"
    )
