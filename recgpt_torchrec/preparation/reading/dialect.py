"""Decides how a text file is to be read: as a table (separator, quotes, header), lines of JSON, or histories.

Looks at the first lines only. What could be read in two ways is refused, with the options that decide.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.prepare import NONE, SEPARATOR_WORDS
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.reading.files import InputFile

SAMPLE = 262_144
"""Bytes at the start of a file that are looked at."""
RECBOLE_TYPES = ("token", "float", "token_seq", "float_seq")
SEPARATORS = ("\t", ",", ";", "|", "::", " ")
"""Separators that are looked for, in this order."""
DATE_TIME = re.compile(r"\b[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([T ][0-9]{1,2}:|\b)")
EPOCH = re.compile(r"[0-9]{9,19}(\.[0-9]+)?$")
DECIMAL = re.compile(r"[+-]?[0-9]+\.[0-9]+$")
WORDS = {"jsonl": "lines of JSON", "parquet": "Parquet", "sequences": "lines `user item item ...`"}
LIST_SHARE = 0.1
"""Share of a column's values that look like lists above which the column is refused."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a file is read."""

    format: str
    """csv (any table in text), jsonl, parquet or sequences."""
    separator: str = ""
    quote: str = ""
    """Character around values; empty: there are no quotes."""
    header: bool = True
    recbole: bool = False
    """Whether the header has name:type fields."""

    @property
    def words(self) -> str:
        """The dialect in words, such as `table with a header, separated by comma`."""
        if self.format != "csv":
            return WORDS[self.format]
        first = "RecBole's header" if self.recbole else "a header" if self.header else "no header"
        quotes = f"quotes {self.quote}" if self.quote else "no quotes"
        return f"table with {first}, separated by {name_of(self.separator)}, {quotes}"


def name_of(separator: str) -> str:
    """A separator as `--separator` takes it in a shell: a word, or quoted."""
    return next((word for word, mark in SEPARATOR_WORDS.items() if mark == separator and word.isalpha()), separator)


def find_dialect(file: InputFile, config: Prepare) -> Dialect:
    """Decide how to read a file.

    Raises:
        InputError: it is not of its format, or looks like something else; or an option does not fit the format.
    """
    if file.format == "parquet":
        return Dialect(format="parquet")
    lines = first_lines(file, config.encoding)
    if file.format == "sequences":
        if config.input_format == "auto":
            if config.separator is not None or not config.header:
                return _table(config, ",")
            separator = find_separator(lines[:1], _columns(config))
            if separator is not None:
                return _table(config, separator)
        _check_sequences(file, lines, config)
        return Dialect(format="sequences")
    if file.format == "jsonl":
        return Dialect(format="jsonl")
    if file.format == "recbole":
        return Dialect(format="csv", separator="\t", recbole=True)
    return _table(config, "\t" if file.format == "tsv" else ",")


def _table(config: Prepare, separator: str) -> Dialect:
    separator = config.separator or separator
    quotes = separator not in ("\t", " ") and len(separator) == 1
    quote = ('"' if quotes else "") if config.quote is None else config.quote.replace(NONE, "")
    return Dialect(format="csv", separator=separator, quote=quote, header=config.header)


def _columns(config: Prepare) -> list[str]:
    """The columns that a table must have."""
    columns = (config.user_column, config.item_column, config.time_column)
    return [column for column in columns if column is not None and column not in config.partition_columns]


def first_lines(file: InputFile, encoding: str = "utf-8", count: int = 1000) -> list[str]:
    """The first lines that are not blank, without the last if it may be cut."""
    with file.open() as stream:
        start = stream.read(SAMPLE)
    text = start.decode("utf-8-sig" if encoding == "utf-8" else encoding, errors="replace")
    lines = text.splitlines()
    if len(start) == SAMPLE and len(lines) > 1:
        lines.pop()
    return [line for line in lines if line.strip()][:count]


def find_separator(lines: Sequence[str], columns: Sequence[str]) -> str | None:
    """The separator with which the first line names all columns; None: there is none."""
    for separator in SEPARATORS:
        for line in lines[:1]:
            names = [name.strip().strip('"') for name in line.split(separator)]
            if all(column in names for column in columns):
                return separator
    return None


def cells_of(lines: Sequence[str], dialect: Dialect) -> list[list[str]]:
    """Split lines of a table; the first may be the header."""
    if len(dialect.separator) > 1 or not dialect.quote:
        return [line.split(dialect.separator) for line in lines]
    text = io.StringIO("\n".join(lines), newline="")
    try:
        return [row for row in csv.reader(text, delimiter=dialect.separator, quotechar=dialect.quote) if row]
    except csv.Error:
        return [line.split(dialect.separator) for line in lines]


def looks_like_data(cells: Sequence[str]) -> bool:
    """Whether a line is rather a row than a header: one of its cells is a number or a date."""
    return any(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", cell.strip()) or DATE_TIME.search(cell) for cell in cells)


def find_list_separator(values: Sequence[str]) -> str | None:
    """The separator of the lists that a column seems to hold; None: its values are single ones."""
    filled = [value.strip() for value in values if value.strip()]
    patterns = {
        ",": r"\[.*\]|\(.*\)|[^,\s]+(,[^,\s]+)+|[0-9]+(, ?[0-9]+)+",
        "|": r"[^|]+(\|[^|]+)+",
        ";": r"[^;]+(;[^;]+)+",
        " ": r"[0-9]+( [0-9]+)+",
    }
    for separator, pattern in patterns.items():
        if sum(re.fullmatch(pattern, value) is not None for value in filled) > LIST_SHARE * len(filled):
            return separator
    return None


def _check_sequences(file: InputFile, lines: list[str], config: Prepare) -> None:
    """Raise an `InputError` unless the lines can be histories, `user item item ...`."""
    if not lines:
        return
    path, words = file.path, [line.split() for line in lines]
    if all(":" in word and word.rpartition(":")[2] in RECBOLE_TYPES for word in words[0]):
        raise InputError(f"{path} is a RecBole file, not of the format sequences; pass --input_format recbole")
    if lines[0].lstrip().startswith("{"):
        raise InputError(f"{path} holds lines of JSON, not histories; pass --input_format jsonl")
    asked = {"user": config.user_column, "item": config.item_column}
    named = [f"--{name}_column {value}" for name, value in asked.items() if value != f"{name}_id"]
    named += [f"--time_column {config.time_column}"] if config.time_column not in (None, "timestamp") else []
    why = f"{' '.join(named)} cannot be found in histories, which have no columns" if named else ""
    dated = sum(DATE_TIME.search(line) is not None for line in lines)
    if not why and dated > len(lines) / 2:
        why = "its lines hold dates"
    for mark in (",", ";", "|", "::"):
        if not why and all(mark in row[0] for row in words):
            why = f"its lines hold {name_of(mark)} and few blanks"
    if not why and config.input_format == "auto":
        why = find_table(lines)
    separator = next((mark for mark in SEPARATORS[:-1] if all(mark in line for line in lines)), " ")
    if why:
        header = "" if find_separator(lines[:1], _columns(config)) else " --header false"
        places = "" if not header else ", columns by place (--user_column 0 --item_column 1 ...)"
        keep = "" if dated or config.input_format != "auto" else ", or --input_format sequences if they are histories"
        raise InputError(
            f"{path}: its lines do not look like histories `user item item ...`: {why}; the first is "
            f"{shorten(lines[0])!r}. Pass --input_format csv --separator {shell_word(separator)}{header}{places}{keep}"
        )
    if all(len(row) < 2 for row in words):
        raise InputError(
            f"{path} is not of the format sequences (one line per user: user item item ..., separated by blanks): its "
            f"first line is {shorten(lines[0])!r}"
        )


def find_table(lines: list[str]) -> str:
    """Why lines are rather rows of a table than histories; empty: they may be histories."""
    tabbed = [line.split("\t") for line in lines]
    cells = (
        tabbed if len(tabbed[0]) > 2 and len({len(row) for row in tabbed}) == 1 else [line.split() for line in lines]
    )
    count = len(cells[0])
    if count < 3 or len(lines) < 2 or len({len(row) for row in cells}) > 1:
        return ""
    each = f"each has {count} values"
    for place, column in enumerate(list(zip(*cells, strict=True))[1:], 1):
        if all(EPOCH.match(value) for value in column):
            return f"{each}, and value {place} (from 0) is a time in all of them"
        if all(DECIMAL.match(value) for value in column):
            return f"{each}, and value {place} (from 0) is a decimal number in all of them"
    if len({row[0] for row in cells}) < len(cells):
        return f"{each}, and several begin with the same user"
    return ""


def shell_word(separator: str) -> str:
    """A separator as one word of a command line."""
    name = name_of(separator)
    return name if name.isalnum() or name == "::" else f"'{name}'"


def shorten(text: str | None, length: int = 80) -> str:
    """The first `length` characters of `text`, for a message."""
    text = text or ""
    return text if len(text) <= length else text[:length] + "..."
