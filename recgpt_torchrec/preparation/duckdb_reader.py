"""Loads raw files of every format into DuckDB: the part of reading a log that depends on the engine.

Fills two tables: `log_rows`, the rows as `rows.parse_rows` returns them, in the order of the input; and `malformed`,
the lines that cannot be split into columns.
"""

import csv
import io
import json
from typing import Any

import duckdb
import ibis
import ibis.expr.datatypes as dt
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engine import DuckDBEngine, quote_sql
from recgpt_torchrec.preparation.inputs import InputFile
from recgpt_torchrec.preparation.rows import BLANK, parse_rows
from recgpt_torchrec.storage import fsspec_filesystem

RECBOLE_TYPES = ("token", "float", "token_seq", "float_seq")
LONGEST_LINE = 16 * 2**20
"""Maximum length of a line of a text file, in bytes; a longer one is malformed."""


LOG = ibis.table(
    {
        "user": "string",
        "item": "string",
        "time": "int64",
        "fraction": "float64",
        "rating": "float64",
        "click": "float64",
        "problem": "string",
        "text": "string",
        "order": "int64",
    },
    name="log",
)
"""The rows that `DuckDBReader` loads, as `rows.parse_rows` returns them; `order` is their index in the input."""
MALFORMED = ibis.table({"file": "int64", "line": "int64", "reason": "string", "text": "string"}, name="malformed")
"""Lines that cannot be split into columns: index of the file from 0, number of the line from 1."""


class DuckDBReader:
    """Loads files, one after the other, into the tables `log_rows` and `malformed`."""

    def __init__(self, engine: DuckDBEngine, config: Prepare, timed: bool) -> None:
        self.engine, self.config, self.timed = engine, config, timed
        self.first_rows: list[int] = []
        self.header_lines: list[int] = []
        self.columns = {
            "user": config.user_column,
            "item": config.item_column,
            **({"time": config.time_column} if timed and config.time_column else {}),
            **({"rating": config.rating_column} if config.rating_column else {}),
            **({"click": config.click_column} if config.click_column else {}),
        }
        self.run = engine.connection.execute
        self.run(
            "CREATE TABLE log_rows (user VARCHAR, item VARCHAR, time BIGINT, fraction DOUBLE, rating DOUBLE, "
            "click DOUBLE, problem VARCHAR, text VARCHAR)"
        )
        self.run('CREATE VIEW log AS SELECT *, rowid AS "order" FROM log_rows')  # rows keep the order of loading
        self.run("CREATE TABLE malformed (file BIGINT, line BIGINT, reason VARCHAR, text VARCHAR)")

    def load(self, index: int, file: InputFile) -> None:
        """Load one file.

        Args:
            index: index of the file in the input.
            file: the file.

        Raises:
            InputError: the file is not of its format, or lacks a column.
        """
        self.first_rows.append(self._count("log_rows"))
        self.header_lines.append(1 if file.format in ("csv", "tsv", "recbole") else 0)
        if file.bytes == 0:
            return
        self.index, self.file = index, file
        if "://" in file.path:
            protocol = file.path.partition("://")[0]
            if not self.engine.connection.filesystem_is_registered(protocol):
                self.engine.connection.register_filesystem(fsspec_filesystem(file.path)[0])
        try:
            if file.format != "parquet":
                self._check_text()
            getattr(self, f"_load_{file.format}")()
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except (duckdb.Error, OSError, EOFError, pa.ArrowException) as error:
            message = str(error).strip().split("\n")[0]
            raise InputError(f"{file.path}: cannot be read as {file.format}: {message}") from None

    # -- formats

    def _load_csv(self, delimiter: str = ",", quote: str = '"') -> None:
        with self.file.open() as stream:
            first = io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="")
            header = next(
                csv.reader(first, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE), []
            )
        names = [name.strip() for name in header]
        if self.file.format == "recbole":
            names = self._recbole_names(names)
        chosen = self._find_columns(names)
        columns = [f"c{index}" for index in range(len(names))]
        text = ", ".join(f"coalesce({column}, '')" for column in columns)
        self._insert(
            {name: columns[index] for name, index in chosen.items()},
            self._text_source(columns, delimiter, quote, header=True),
            text=f"array_to_string([{text}], {quote_sql(delimiter)})",
        )
        self._move_malformed()

    def _load_tsv(self) -> None:
        self._load_csv("\t")

    def _load_recbole(self) -> None:
        self._load_csv("\t", quote="")

    def _recbole_names(self, header: list[str]) -> list[str]:
        pairs = [name.rpartition(":") for name in header]
        if not all(name and kind in RECBOLE_TYPES for name, _, kind in pairs):
            raise InputError(
                f"{self.file.path} is not a RecBole file: its first line must be tab-separated name:type fields "
                f"with types {', '.join(RECBOLE_TYPES)}, for example user_id:token; "
                f"it is {shorten(chr(9).join(header))!r}"
            )
        return [name for name, _, _ in pairs]

    def _load_jsonl(self) -> None:
        first = self._first_lines()
        if first and not any(_is_object(line) for line in first) and not (len(first) == 1 and first[0].startswith("{")):
            hint = (
                " (it begins like one JSON array; write one object per line)"
                if first[0].lstrip().startswith("[")
                else ""
            )
            raise InputError(
                f"{self.file.path} is not JSON lines: its first line is {shorten(first[0])!r}, not an object{hint}"
            )
        source = (
            "(SELECT line, CASE WHEN json_type(value) = 'OBJECT' THEN value END AS object FROM "
            f"(SELECT line, TRY_CAST(line AS JSON) AS value FROM {self._line_source()}))"
        )
        members = {name: f"object->>{quote_sql(_json_path(column))}" for name, column in self.columns.items()}
        blank = f"WHEN trim(line) = '' OR line IS NULL THEN {quote_sql(BLANK)}"
        fault = f"CASE {blank} WHEN object IS NULL THEN 'malformed line' END"
        start = self.first_rows[-1]
        self._insert(members, source, text="line", fault=fault)
        self._move_malformed()
        # A key may be absent from some rows; if it is absent from all, its name is wrong.
        usable, rated = self._fetch(
            f"SELECT count(*), count(rating) FROM log_rows WHERE rowid >= {start} AND problem IS NULL"
        )
        if not usable or ("rating" in self.columns and not rated):
            keys = self._fetch(
                f"SELECT list(DISTINCT key) FROM (SELECT unnest(json_keys(object)) AS key FROM {_make_lenient(source)})"
            )[0]
            self._drop_faults()
            for name, column in self.columns.items():
                if keys and column not in keys:
                    raise self._explain_missing(name, column, sorted(keys))

    def _load_sequences(self) -> None:
        first = self._first_lines()
        if first and all(":" in word and word.rpartition(":")[2] in RECBOLE_TYPES for word in first[0].split()):
            raise InputError(
                f"{self.file.path} is a RecBole file, not of the format sequences; pass --input_format recbole"
            )
        if first and all(len(line.split()) < 2 for line in first):
            raise InputError(
                f"{self.file.path} is not of the format sequences (one line per user: user item item ..., "
                f"separated by blanks): its first line is {shorten(first[0])!r}"
            )
        source = self._line_source()
        self._drop_faults()
        words = "regexp_split_to_array(trim(line), '\\s+')"
        self._run_text(f"CREATE TABLE lines AS SELECT trim(line) AS line, {words} AS words FROM {source}")
        self._move_malformed()
        self.run(
            f"INSERT INTO malformed SELECT {self.index}, rowid + 1, 'no item', line FROM lines "
            "WHERE line <> '' AND len(words) < 2"
        )
        self.run(
            "INSERT INTO log_rows SELECT words[1], unnest(words[2:]), NULL, 0, NULL, NULL, NULL, NULL FROM lines "
            "WHERE len(words) >= 2"
        )
        self.run("DROP TABLE lines")

    def _load_parquet(self) -> None:
        with self.file.open() as stream:
            schema = pq.read_schema(stream)
        chosen = self._find_columns(schema.names)
        for name, place in chosen.items():
            kind = schema.field(place).type
            if pa.types.is_nested(kind):
                raise InputError(
                    f"{self.file.path}: column {schema.names[place]!r} holds {kind}, and the {name} must be a plain "
                    f"value; write one row per interaction, or name another column with --{name}_column"
                )
        kinds = {name: schema.field(place).type for name, place in chosen.items()}
        source = f"read_parquet({quote_sql(self.file.path)}, binary_as_string=true)"
        columns = {name: _quote_identifier(schema.names[place]) for name, place in chosen.items()}
        text = ", ".join(f"{column} := {column}" for column in dict.fromkeys(columns.values()))
        # Parquet statistics leave NaN out, and DuckDB 2.0 relies on them: isnan is never true, and try_cast fails where
        # it should return null.
        self.run("SET disabled_optimizers = 'statistics_propagation'")
        self._insert(columns, source, text=f"CAST(to_json(struct_pack({text})) AS VARCHAR)", kinds=kinds)
        self.run("RESET disabled_optimizers")

    # -- shared

    def _check_text(self) -> None:
        """Raise an `InputError` if the file is not text, which a text reader would misread."""
        path = self.file.path
        with self.file.open() as stream:
            start = stream.read(65536)
        if start[:4] == b"PAR1":
            raise InputError(f"{path} is not {self.file.format} but a Parquet file; pass --input_format parquet")
        if start[:2] == b"\x1f\x8b":
            raise InputError(f"{path} is not {self.file.format} but gzip data; name it so that it ends in .gz")
        if b"\0" in start:
            raise InputError(f"{path} is not {self.file.format}: it is not UTF-8 text (it holds zero bytes)")

    def _first_lines(self, count: int = 10) -> list[str]:
        """The first lines that are not blank."""
        with self.file.open() as stream:
            text = stream.read(262_144).decode("utf-8-sig", errors="replace")
        return [line for line in text.splitlines() if line.strip()][:count]

    def _find_columns(self, names: list[str]) -> dict[str, int]:
        """The index of each column to read."""
        for name, column in self.columns.items():
            if column not in names:
                raise self._explain_missing(name, column, names)
        return {name: names.index(column) for name, column in self.columns.items()}

    def _explain_missing(self, name: str, column: str, names: list[str]) -> InputError:
        hint = ""
        if name == "time":
            hint = ", or pass --time_column null if rows are already in time order"
        if len(names) == 1:
            separator = next(
                (
                    word
                    for mark, word in ((";", "semicolons"), ("\t", "tabs (tsv)"), (",", "commas (csv)"))
                    if mark in names[0]
                ),
                "",
            )
            hint += f". Is it separated by {separator}, and not {self.file.format}?" if separator else ""
        if names and names[0].startswith("{"):
            hint += ". It looks like JSON lines: pass --input_format jsonl"
        shown = ", ".join(repr(shorten(entry)) for entry in names[:30]) + (", ..." if len(names) > 30 else "")
        return InputError(
            f"{self.file.path} has no column {column!r} for the {name}; it has {shown or 'none'}. "
            f"Name the right one with --{name}_column{hint}"
        )

    def _text_source(self, columns: list[str], delimiter: str, quote: str, *, header: bool) -> str:
        """SQL that reads the file with every column as text. `_move_malformed` must follow its use."""
        kinds = ", ".join(f"{quote_sql(column)}: 'VARCHAR'" for column in columns)
        compression = "gzip" if self.file.path.endswith(".gz") else "none"
        return (
            f"read_csv({quote_sql(self.file.path)}, auto_detect=false, header={header}, delim={quote_sql(delimiter)}, "
            f"quote={quote_sql(quote)}, escape={quote_sql(quote)}, columns={{{kinds}}}, "
            f"compression={quote_sql(compression)}, max_line_size={LONGEST_LINE}, buffer_size={2 * LONGEST_LINE}, "
            "strict_mode=STRICT, store_rejects=true, rejects_table='reader_faults', rejects_scan='reader_scans', "
            "rejects_limit=0)"
        )

    def _line_source(self) -> str:
        """SQL that reads the file as one column, `line`: its delimiter is a character that no sensible line holds."""
        return self._text_source(["line"], chr(31), "", header=False)

    def _insert(
        self,
        columns: dict[str, str],
        source: str,
        *,
        text: str,
        fault: str = "NULL",
        kinds: dict[str, pa.DataType] | None = None,
    ) -> None:
        """Add the rows of a source to `log_rows`; `columns`, `source`, `text` and `fault` are SQL."""
        names = ("user", "item", "time", "rating", "click")
        types = {name: _ibis_type((kinds or {}).get(name, pa.string())) for name in names}
        chosen = ", ".join(f"{columns.get(name, 'NULL::VARCHAR')} AS {_quote_identifier(name)}" for name in types)
        self._drop_faults()
        table = ibis.table({**types, "fault": "string", "text": "string"}, name="source")
        rows = self.engine.sql(
            parse_rows(table, timed=self.timed, rated="rating" in columns, labelled="click" in columns)
        )
        source = f"SELECT {chosen}, ({fault})::VARCHAR AS fault, {text} AS text FROM {source}"
        self._run_text(f"INSERT INTO log_rows WITH source AS ({source}) {rows}")

    def _run_text(self, statement: str) -> None:
        """Run a statement with a text source in strict mode, or in lenient mode if line endings are mixed."""
        try:
            self.run(statement.replace("strict_mode=STRICT", "strict_mode=true"))
        except duckdb.InvalidInputException as error:
            if "state machine" not in str(error):
                raise
            self._drop_faults()
            self.run(_make_lenient(statement))

    def _drop_faults(self) -> None:
        self.run("DROP TABLE IF EXISTS reader_faults")
        self.run("DROP TABLE IF EXISTS reader_scans")

    def _move_malformed(self) -> None:
        """Move the lines that the reader could not split to `malformed`."""
        self.run(
            f"INSERT INTO malformed SELECT {self.index}, line, 'malformed line', ltrim(any_value(csv_line), chr(10)) "
            "FROM reader_faults GROUP BY line"
        )
        self._drop_faults()

    def _count(self, table: str) -> int:
        return int(self._fetch(f"SELECT count(*) FROM {table}")[0])

    def _fetch(self, statement: str) -> tuple[Any, ...]:
        (row,) = self.run(statement).fetchall()
        return tuple(row)


def _ibis_type(kind: pa.DataType) -> dt.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return dt.string
    return dt.DataType.from_pyarrow(kind)


def _make_lenient(statement: str) -> str:
    """The statement in lenient mode, which accepts mixed line endings and stray quotes."""
    return statement.replace("strict_mode=STRICT", "strict_mode=false")


def _quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _json_path(key: str) -> str:
    return '$."' + key.replace('"', '\\"') + '"'


def shorten(text: str | None, length: int = 80) -> str:
    """The first `length` characters of `text`, for a message."""
    text = text or ""
    return text if len(text) <= length else text[:length] + "..."
