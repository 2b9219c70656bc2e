"""Decides how a text file is to be read: as a table (separator, quotes, header), lines of JSON, or histories.

Looks at the first lines only. What could be read in two ways is refused, with the options that decide.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
DAY = re.compile(r"(19|20)[0-9]{2}(0[1-9]|1[0-2])[0-3][0-9]$")
DECIMAL = re.compile(r"[+-]?[0-9]+\.[0-9]+$")
USUAL_SHARE = 0.9
"""Share of lines with the same number of values above which they may be rows of a table."""
MAGIC = {
    b"\x1f\x8b": ("gzip data", ".gz"),
    b"BZh": ("bzip2 data", ".bz2"),
    b"\xfd7zXZ": ("xz data", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", ".zst"),
    b"PK\3\4": ("a zip archive or an Excel sheet", ""),
    b"ORC": ("an ORC file", ""),
    b"Obj\1": ("an Avro file", ""),
    b"ARROW1": ("an Arrow file", ""),
    b"SQLite format 3": ("an SQLite database", ""),
}
"""First bytes of files that are no text, their names, and endings that make them readable."""
WORDS = {"jsonl": "lines of JSON", "parquet": "Parquet", "sequences": "lines `user item item ...`"}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a file is read."""

    format: str
    """csv (any table in text), jsonl, parquet or sequences."""
    separator: str = ""
    quote: str = ""
    """Character around values; empty: there are no quotes."""
    escape: str = ""
    """Character before a quote inside quotes."""
    header: bool = True
    recbole: bool = False
    """Whether the header has name:type fields."""

    @property
    def header_lines(self) -> int:
        """Number of lines before the first row."""
        return int(self.format == "csv" and self.header)

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
    word = next((word for word, mark in SEPARATOR_WORDS.items() if mark == separator and word.isalpha()), separator)
    return word if word.isprintable() else repr(word)


def check_text(file: InputFile, encoding: str) -> None:
    """Raise an `InputError` if a file is not text, which a text reader would misread."""
    path, format = file.path, file.format
    with file.open() as stream:
        start = stream.read(65536)
    if start[:4] == b"PAR1":
        raise InputError(f"{path} is not {format} but a Parquet file; pass --input_format parquet")
    for magic, (name, ending) in MAGIC.items():
        if start.startswith(magic) and file.compression == "":
            remedy = f"name it so that it ends in {ending}" if ending else "write it as Parquet, CSV or JSON lines"
            raise InputError(f"{path} is not {format} but {name}; {remedy}")
    if encoding == "utf-8" and start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path} is not {format} in UTF-8 text but in UTF-16; pass --encoding utf-16")
    if encoding == "utf-8" and b"\0" in start:
        raise InputError(f"{path} is not {format}: it is not UTF-8 text (it holds zero bytes)")


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
            separator = find_separator(lines[0], _columns(config)) if lines else None
            if separator is not None:
                return _table(config, separator)
        _check_sequences(file, lines, config)
        return Dialect(format="sequences")
    if file.format == "jsonl":
        return Dialect(format="jsonl")
    if file.format == "recbole":
        return Dialect(format="csv", separator="\t", recbole=True)
    table = _table(config, "\t" if file.format == "tsv" else ",")
    return replace(table, recbole=bool(lines) and _is_recbole(lines[0], table, config))


def _is_recbole(line: str, table: Dialect, config: Prepare) -> bool:
    """Whether a header has RecBole's types, whatever the ending of the file; not where options name columns so."""
    names = [name.strip().strip(table.quote or None) for name in line.split(table.separator)]
    are_typed = all(name.rpartition(":")[2] in RECBOLE_TYPES and ":" in name for name in names)
    return table.header and are_typed and not {*_columns(config)} & {*names}


def _table(config: Prepare, separator: str) -> Dialect:
    separator = config.separator or separator
    quotes = separator not in ("\t", " ") and len(separator) == 1
    quote = ('"' if quotes else "") if config.quote is None else config.quote.replace(NONE, "")
    escape = quote if config.escape is None else config.escape
    return Dialect(format="csv", separator=separator, quote=quote, escape=escape, header=config.header)


def _columns(config: Prepare) -> list[str]:
    """The columns that a table must have."""
    columns = (config.user_column, config.item_column, config.time_column)
    return [column for column in columns if column is not None and column not in config.partition_columns]


def first_lines(file: InputFile, encoding: str, count: int = 1000, blank: bool = False) -> list[str]:
    """The first lines, without the last if it may be cut; with `blank`, those that hold nothing as well."""
    with file.open() as stream:
        start = stream.read(SAMPLE)
    text = start.decode("utf-8-sig" if encoding == "utf-8" else encoding, errors="replace")
    lines = re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))  # str.splitlines also splits inside JSON's strings
    if len(start) == SAMPLE and len(lines) > 1:
        lines.pop()
    return [line for line in lines if blank or line.strip()][:count]


def find_separator(line: str, columns: Sequence[str]) -> str | None:
    """The separator with which a line names all columns; None: there is none."""
    for separator in SEPARATORS:
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
        doubled = dialect.escape in ("", dialect.quote)
        escape: Any = {} if doubled else {"escapechar": dialect.escape, "doublequote": False}
        return [row for row in csv.reader(text, delimiter=dialect.separator, quotechar=dialect.quote, **escape) if row]
    except csv.Error:
        return [line.split(dialect.separator) for line in lines]


def looks_like_data(cells: Sequence[str]) -> bool:
    """Whether a line is rather a row than a header: one of its cells is a number or a date."""
    return any(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", cell.strip()) or DATE_TIME.search(cell) for cell in cells)


def _check_sequences(file: InputFile, lines: list[str], config: Prepare) -> None:
    """Raise an `InputError` unless the lines can be histories, `user item item ...`."""
    if not lines:
        return
    path, words = file.path, [line.split() for line in lines]
    if all(":" in word and word.rpartition(":")[2] in RECBOLE_TYPES for word in words[0]):
        raise InputError(f"{path} is a RecBole file, not of the format sequences; pass --input_format recbole")
    if lines[0].startswith(("#", "%", "//")):
        raise InputError(
            f"{path}: its first line, {shorten(lines[0])!r}, looks like a comment and not like a history; remove such "
            "lines"
        )
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
        header = "" if find_separator(lines[0], _columns(config)) else " --header false"
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
    rows = tabbed if sum(len(row) > 2 for row in tabbed) > len(lines) / 2 else [line.split() for line in lines]
    count, usual = Counter(map(len, rows)).most_common(1)[0]
    if count < 3 or len(lines) < 2 or usual < USUAL_SHARE * len(lines):
        return ""
    cells = [row for row in rows if len(row) == count]
    each = f"{'all' if usual == len(lines) else f'{usual} of {len(lines)}'} lines have {count} values"
    for place, column in enumerate(list(zip(*cells, strict=True))[1:], 1):
        if all(EPOCH.match(value) or DAY.match(value) for value in column):
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
