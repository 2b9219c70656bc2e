"""What the columns of a table hold, and what each attribute is taken for: category, list, number or text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ibis.expr.datatypes as dt
import pyarrow as pa

from recgpt_torchrec.config.command_line import did_you_mean
from recgpt_torchrec.config.inputs.attribute_names import AskedAttribute
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes.tables import EntityTable
from recgpt_torchrec.preparation.reading.dialect import Dialect, shorten
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.lists import split_text
from recgpt_torchrec.preparation.reading.formats.source import Column

types = pa.types
SEQUENCE = "RecBole's token_seq"
"""Words of a list in text that is separated by blanks, and so may be a text as well."""
NUMBERS = {"DOUBLE", "BIGINT", "UBIGINT", "HUGEINT"}
"""Types of numbers in JSON, as the engine names them."""


@dataclass(frozen=True)
class Held:
    """What a column of one file holds."""

    kind: str | None
    """category, list or number; None: nothing but missing values."""
    words: str
    """The type in words."""


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """A file of a table, and what its columns hold."""

    file: InputFile
    dialect: Dialect
    held: dict[str, Held]
    """By name of the attribute."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What an attribute is taken for."""

    name: str
    kind: str
    """category, list, number or text."""
    words: str
    """Type of its column, in words."""


def held_in_arrow(kind: pa.DataType) -> Held:
    """What a column of a Parquet file holds.

    Raises:
        ValueError: neither values nor a list of them.
    """
    value, words = kind, str(kind)
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_list:
        value = kind.value_type
    if types.is_dictionary(value):
        value = value.value_type
    if types.is_nested(value):
        raise ValueError(words)
    if types.is_null(value):
        return Held(None, words)
    if is_list:
        return Held("list", words)
    has_fraction = types.is_floating(value) or (types.is_decimal(value) and value.scale > 0)
    return Held("number" if has_fraction else "category", words)


def held_in_json(found: set[str], inside: set[str]) -> Held:
    """What a key of JSON holds.

    Args:
        found: the types of its values, as the engine names them.
        inside: the types of the elements of lists.

    Raises:
        ValueError: an object, or a list of objects or lists.
    """
    found = found - {"NULL"}
    if "OBJECT" in found or inside & {"OBJECT", "ARRAY"}:
        raise ValueError("objects" if "OBJECT" in found else "lists of objects or lists")
    if not found:
        return Held(None, "null")
    if "ARRAY" in found:
        return Held("list", "list")
    if found <= NUMBERS and "DOUBLE" in found:
        return Held("number", "number")
    return Held("category", "whole number" if found <= NUMBERS else "boolean" if found == {"BOOLEAN"} else "text")


def held_in_text(recbole: str) -> Held:
    """What a column of a table in text holds, given RecBole's type of it; empty: it has none."""
    kinds = {"": "category", "token": "category", "float": "number"}
    words = {"": "text", "token": "RecBole's token", "float": "RecBole's float", "token_seq": SEQUENCE}
    return Held(kinds.get(recbole, "list"), words.get(recbole, f"RecBole's {recbole}"))


def explain_column(table: EntityTable, file: InputFile, name: str, names: Sequence[str]) -> InputError:
    """The error for a column that a file of a table lacks."""
    if name == table.key:
        option = f"--{table.entity}s_key"
        need = f"no column {name!r} for the {table.entity}"
    else:
        option, need = table.attributes_option, f"no column {name!r}, which {table.attributes_option} names"
    shown = ", ".join(repr(shorten(entry)) for entry in names[:30]) + (", ..." if len(names) > 30 else "")
    meant = did_you_mean(name, names)
    hint = meant if "did you mean" in meant else f"; name the right one with {option}"
    return InputError(f"{table.option} {file.path} has {need}; it has {shown or 'none'}{hint}")


def explain_nested(table: EntityTable, file: InputFile, name: str, words: str) -> InputError:
    """The error for a column whose values are neither single ones nor a list of them."""
    return InputError(
        f"{table.option} {file.path}: {name!r} holds {words}; name a column with one value or a list of values per row"
        + (f", such as '{name}.KEY' for a value inside" if words == "objects" else "")
    )


def resolve(table: EntityTable, files: Sequence[TableFile]) -> list[Taken]:
    """Decide what each attribute is taken for, by the kind that is asked for and by what all files hold.

    Raises:
        InputError: files differ, or a column cannot be of the kind that is asked for.
    """
    return [_resolve_one(table, files, each) for each in table.asked]


def _resolve_one(table: EntityTable, files: Sequence[TableFile], asked: AskedAttribute) -> Taken:
    held = [(each.file, each.held[asked.name]) for each in files if each.held[asked.name].kind is not None]
    words = " or ".join(dict.fromkeys(each.words for _, each in held)) or "nothing"
    lists = [(file, each) for file, each in held if each.kind == "list"]
    if asked.kind in ("number", "text") and (held_list := next((e for e in lists if _is_refused(e[1], asked)), None)):
        raise InputError(
            f"{table.attributes_option} {asked.name}:{asked.kind}: the column holds lists in {held_list[0].path} "
            f"({held_list[1].words}), and a {asked.kind} is one value per row; pass {asked.name}:list, or leave it out"
        )
    if asked.kind in ("number", "text", "list"):
        return Taken(name=asked.name, kind=asked.kind, words=words)
    if lists:
        return Taken(name=asked.name, kind="list", words=words)
    kinds = {each.kind: file for file, each in reversed(held)}
    if asked.kind is None and len(kinds) > 1:
        pairs = " and ".join(f"a {kind} in {file.path}" for kind, file in sorted(kinds.items(), key=str))
        raise InputError(
            f"{table.attributes_option} {asked.name}: its type differs between files ({words}), it is {pairs}; say "
            f"what it is: {asked.name}:category or {asked.name}:number"
        )
    return Taken(name=asked.name, kind=asked.kind or next(iter(kinds), None) or "category", words=words)


def _is_refused(held: Held, asked: AskedAttribute) -> bool:
    return not (asked.kind == "text" and held.words == SEQUENCE)


def read_as(column: Column, taken: Taken, held: Held, separator: str) -> Column:
    """A column as the engine reads it for a kind: a list of values, or a value of a type that keys and numbers have."""
    if taken.kind == "list" and held.words == SEQUENCE:
        return split_text(column, " ")
    if taken.kind == "list" and column.type.is_string() and not column.is_list:
        return split_text(column, separator)
    kind = column.type
    if kind.is_string() or kind.is_integer() or kind.is_floating() or kind.is_decimal():
        return column
    if taken.kind == "number" and (kind.is_boolean() or kind.is_timestamp() or kind.is_date()):
        sql = f"epoch({column.sql})" if not kind.is_boolean() else f"CAST({column.sql} AS DOUBLE)"
        return replace(column, sql=sql, type=dt.float64)
    return replace(column, sql=f"CAST({column.sql} AS VARCHAR{'[]' if column.is_list else ''})", type=dt.string)
