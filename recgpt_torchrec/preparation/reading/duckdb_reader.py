"""Loads raw files of every format into DuckDB: the part of reading a log that depends on the engine.

Fills two tables: `log_rows`, the rows as the last of `rows.steps` has them, in the order of the input; and `malformed`,
the lines that cannot be split into columns.
"""

import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.copies import engine_copy
from recgpt_torchrec.preparation.reading.dialect import Dialect, check_text, find_dialect, find_table, first_lines
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.json_lines import JsonLines, usable_keys
from recgpt_torchrec.preparation.reading.formats.parquet import Parquet
from recgpt_torchrec.preparation.reading.formats.separated import Separated
from recgpt_torchrec.preparation.reading.formats.source import Column, Source, explain_missing, wanted_columns
from recgpt_torchrec.preparation.reading.rows import BLANK, FILTERED, UNKNOWN, RowOptions, steps
from recgpt_torchrec.preparation.reading.where import compile_where
from recgpt_torchrec.storage import fsspec_filesystem, is_full, remote

LONGEST_LINE = 16 * 2**20
"""Maximum length of a line of a text file, in bytes; a longer one is malformed."""
FAULTS = {
    "INVALID ENCODING": "not UTF-8",
    "LINE SIZE OVER MAXIMUM": "line too long",
    "UNQUOTED VALUE": "unclosed or stray quote",
}
"""Reasons for which the engine cannot split a line, beside `malformed line`."""
MALFORMED_LINE = "malformed line"

MALFORMED = ibis.table({"file": "int64", "line": "int64", "reason": "string", "text": "string"}, name="malformed")
"""Lines that cannot be split into columns: index of the file from 0, number of the line from 1."""


def log_table(click_type: str = "float64") -> ibis.expr.types.Table:
    """The rows that `DuckDBReader` loads, as the last of `rows.steps` has them; `order` is their index in the input."""
    columns = {"user": "string", "item": "string", "time": "int64", "fraction": "float64", "rating": "float64"}
    more = {"position": "float64", "click": click_type, "event": "string", "problem": "string", "text": "string"}
    return ibis.table({**columns, **more, "flags": "int8", "row": "int64", "order": "int64"}, name="log")


def check_time_format(config: Prepare) -> None:
    """Raise an `InputError` unless DuckDB knows the codes of `--time_format`."""
    if (format := config.time_format) is None:
        return
    try:
        with duckdb.connect() as connection:
            connection.execute(f"SELECT try_strptime('', {quote_sql(format)})")
    except duckdb.Error as error:
        message = str(error).strip().split("\n")[0].partition(": ")[2]
        raise InputError(f"--time_format {format!r}: {message}; give strptime's codes, such as %d/%m/%Y") from None


def open_file(file: InputFile, config: Prepare) -> Dialect:
    """Decide how a file is to be read, by its first lines.

    Raises:
        InputError: it is not of its format, or looks like something else.
    """
    with explained(file):
        if file.format != "parquet" and file.bytes:
            check_text(file, config.encoding)
        return find_dialect(file, config)


@contextmanager
def explained(file: InputFile, scratch: Path | None = None) -> Iterator[None]:
    """Make an `InputError` that names the file of what DuckDB or a library says of it.

    Args:
        file: that is read.
        scratch: the engine's folder, which messages need not name.
    """
    try:
        yield
    except (duckdb.OutOfMemoryException, duckdb.InterruptException, duckdb.TransactionException):
        raise  # of the engine: memory or scratch space
    except (duckdb.Error, OSError, EOFError, pa.ArrowException, lzma.LZMAError, zlib.error, UnicodeError) as error:
        if scratch is not None and is_full(error):
            raise  # only the engine writes
        message = str(error).strip().split("\n")[0]
        message = message if scratch is None else message.replace(f'"{scratch}/', '"')
        packed = f"; is it compressed as its ending {file.compression} says?" if file.compression else ""
        raise InputError(f"{file.path}: cannot be read as {file.format}: {message}{packed}") from None


@dataclass
class FileReport:
    """How one file was understood."""

    dialect: Dialect
    columns: dict[str, Column] = field(default_factory=dict)
    """The columns that are read, by what they are: user, item, ..."""
    places: int = 0
    """Number of columns of a table in text."""
    notes: list[str] = field(default_factory=list)


class DuckDBReader:
    """Loads files, one after the other, into the tables `log_rows` and `malformed`."""

    def __init__(self, engine: DuckDBEngine, config: Prepare, timed: bool) -> None:
        self.engine, self.config, self.timed = engine, config, timed
        self.first_rows: list[int] = []
        """Index in the input of each file's first row."""
        self.reports: list[FileReport] = []
        """How each file was understood."""
        self.run = engine.connection.execute
        click = "VARCHAR" if config.click_values else "DOUBLE"
        self.table = log_table("string" if config.click_values else "float64")
        self.run(
            "CREATE TABLE log_rows (user VARCHAR, item VARCHAR, time BIGINT, fraction DOUBLE, rating DOUBLE, "
            f"position DOUBLE, click {click}, event VARCHAR, problem VARCHAR, text VARCHAR, flags TINYINT, row BIGINT)"
        )
        self.run('CREATE VIEW log AS SELECT *, rowid AS "order" FROM log_rows')  # rows keep the order of loading
        self.run("CREATE TABLE malformed (file BIGINT, line BIGINT, reason VARCHAR, text VARCHAR)")

    def load(self, file: InputFile, dialect: Dialect) -> None:
        """Load the next file.

        Raises:
            InputError: the file is not of its format, or lacks a column.
        """
        self.first_rows.append(self._count("log_rows"))
        self.index, self.file, self.dialect = len(self.reports), file, dialect
        self.report = FileReport(dialect)
        self.reports.append(self.report)
        self.columns = wanted_columns(self.config, self.timed)
        if file.bytes == 0:
            return
        if remote(file.path):
            protocol = file.path.partition("://")[0]
            if not self.engine.connection.filesystem_is_registered(protocol):
                self.engine.connection.register_filesystem(fsspec_filesystem(file.path)[0])
        with (
            explained(file, self.engine.scratch),
            engine_copy(file, self.engine.scratch, self.config.encoding) as self.copy,
        ):
            getattr(self, f"_load_{self.dialect.format}")()

    # -- formats

    def _load_csv(self) -> None:
        table = Separated(self.file, self.config, self.dialect, self.columns)

        def text_source(names: list[str]) -> str:
            return self._text_source(names, self.dialect.separator, self.dialect.quote, header=self.dialect.header)

        self.report.places = len(table.names)
        source = table.source(text_source, bool(self.dialect.quote) and self._holds(self.dialect.quote))
        self.report.notes += table.notes
        self._insert(source, table.find)
        self._move_malformed()

    def _load_jsonl(self) -> None:
        lines = JsonLines(self.file, self.config, self.columns)
        source = lines.source(self._line_source())
        start = self.first_rows[-1]
        self._insert(source, lines.find)
        self._move_malformed()
        # A key may be absent from some rows; if it is absent from all, its name is wrong.
        usable, rated = self._fetch(
            f"SELECT count(*), count(rating) FROM log_rows WHERE rowid >= {start} AND problem IS NULL"
        )
        if not usable or ("rating" in self.columns and not rated):
            keys = usable_keys(self._fetch, _make_lenient(source.relation))
            self._drop_faults()
            for role, column in self.columns.items():
                if keys and column.split(".")[0] not in keys and column not in [*keys, *self.config.partition_columns]:
                    raise explain_missing(self.file, role, column, keys, self.config)

    def _load_sequences(self) -> None:
        lines = first_lines(self.file, self.config.encoding)
        if lines and (why := find_table(lines)):
            self.report.notes.append(f"{self.file.path} looks like a table and is read as histories, as asked: {why}")
        source = self._line_source()
        self._drop_faults()
        words = "regexp_split_to_array(trim(line, ' \t\r'), '\\s+')"
        self._run_text(f"CREATE TABLE lines AS SELECT trim(line, ' \t\r') AS line, {words} AS words FROM {source}")
        self._move_malformed()
        columns = {
            "user": Column(name="first word", sql="words[1]"),
            "item": Column(name="other words", sql="words[2:]", is_list=True),
        }
        blank = f"CASE WHEN line IS NULL OR line = '' THEN {quote_sql(BLANK)} END"
        source_of_lines = Source(relation="lines", columns=columns, text="line", fault=blank, row_number="rowid + 1")
        self._insert(source_of_lines, lambda name: columns[name])
        self.report.columns = {}
        self.run("DROP TABLE lines")

    def _load_parquet(self) -> None:
        if self.file.compression:
            schema = pq.read_schema(self.copy.path)
        else:
            with self.file.open() as stream:
                schema = pq.read_schema(stream)
        table = Parquet(self.file, self.config, schema, self.columns)
        path = os.path.realpath(self.copy.path) if not remote(self.copy.path) else None
        try:
            self._insert(table.source(self.copy.path), table.find)
        except duckdb.ConversionException:
            clipped = self.engine.scratch / "clipped.parquet"
            if path is None or not (count := table.clip_timestamps(path, clipped)):
                raise
            self.report.notes.append(f"{self.file.path}: {count:,} times beyond the year 9999 were taken for none")
            self._insert(table.source(str(clipped)), table.find)

    # -- shared

    def _holds(self, character: str) -> bool:
        """Whether a local, uncompressed file holds a character; true for others, which cost more to look through."""
        if remote(self.copy.path) or self.copy.compression != "none":
            return True
        with open(self.copy.path, "rb") as stream:
            while chunk := stream.read(2**22):
                if character.encode() in chunk:
                    return True
        return False

    def _text_source(self, columns: list[str], delimiter: str, quote: str, *, header: bool) -> str:
        """SQL that reads the file with every column as text. `_move_malformed` must follow its use."""
        kinds = ", ".join(f"{quote_sql(column)}: 'VARCHAR'" for column in columns)
        escape = self.dialect.escape if quote else ""
        return (
            f"read_csv({quote_sql(self.copy.path)}, auto_detect=false, header={header}, delim={quote_sql(delimiter)}, "
            f"quote={quote_sql(quote)}, escape={quote_sql(escape)}, columns={{{kinds}}}, hive_partitioning=false, "
            f"compression={quote_sql(self.copy.compression)}, max_line_size={LONGEST_LINE}, "
            f"buffer_size={2 * LONGEST_LINE}, strict_mode=STRICT, store_rejects=true, rejects_table='reader_faults', "
            "rejects_scan='reader_scans', rejects_limit=0)"
        )

    def _line_source(self) -> str:
        """SQL that reads the file as one column, `line`: its delimiter is a character that no sensible line holds."""
        return self._text_source(["line"], chr(31), "", header=False)

    def _insert(self, source: Source, find: Callable[[str], Column]) -> None:
        """Add the rows of a source to `log_rows`; `find` returns the columns of `--where`."""
        self.report.columns = source.columns
        self._drop_faults()
        where = ""
        if self.config.where is not None:
            where = compile_where(self.config.where, find)
            self._check_where(where, source.relation)
        chosen, kinds = {}, {}
        for role in ("user", "item", "time", "rating", "click", "event", "position"):
            column = source.columns.get(role)
            chosen[role] = "NULL::VARCHAR" if column is None else column.sql
            kinds[role] = ibis.dtype("string") if column is None else column.type
        faults = [column.fault for column in source.columns.values() if column.fault]
        fault = f"coalesce(({source.fault})::VARCHAR, {', '.join([*faults, 'NULL'])})"
        if where:  # a row of another kind is left out whatever else is wrong with it, but not a malformed one
            filtered = f"WHEN {where} THEN {fault} WHEN {where} IS NULL THEN {quote_sql(UNKNOWN)}"
            malformed = f"WHEN ({source.fault}) IS NOT NULL THEN ({source.fault})::VARCHAR"
            fault = f"CASE {malformed} {filtered} ELSE {quote_sql(FILTERED)} END"
        lists = [role for role, column in source.columns.items() if column.is_list]
        row = f"{source.row_number} + {self.dialect.header_lines}" if lists else "NULL::BIGINT"
        each = ", ".join(f"{sql} AS {role}" for role, sql in chosen.items())
        select = (
            f"SELECT {each}, {fault} AS fault, {source.text} AS text, "
            f"{source.several_lines or 'false'} AS several_lines, {row} AS row FROM {source.relation}"
        )
        if lists:
            select = self._unnest(select, lists)
        more = {"fault": "string", "text": "string", "several_lines": "boolean", "row": "int64"}
        table = ibis.table({**kinds, **more}, name="source")
        time = source.columns.get("time")
        if self.config.time_format and time is not None and (time.type.is_timestamp() or time.type.is_date()):
            self.report.notes.append(f"{self.file.path}: its times are date-times, so --time_format is not used")
        options = RowOptions(
            timed=self.timed,
            rated="rating" in self.columns,
            labelled="click" in self.columns,
            typed="event" in self.columns,
            placed="position" in self.columns,
            null_words=self.config.null_words,
            time_format=self.config.time_format,
            click_values=self.config.click_values,
        )
        marked, parsed, rows = map(self.engine.sql, steps(table, options))
        before = f"source AS ({select}), marked AS ({marked}), parsed AS ({parsed})"
        self._run_text(f"INSERT INTO log_rows BY NAME WITH {before} {rows}")
        if lists and self.dialect.format != "sequences":
            (count,) = self._fetch(f"SELECT count(DISTINCT row) FROM log_rows WHERE rowid >= {self.first_rows[-1]}")
            entries = self._count("log_rows") - self.first_rows[-1]
            self.report.notes.append(f"{self.file.path}: {count:,} rows hold lists, {entries:,} entries in all")

    def _unnest(self, select: str, lists: list[str]) -> str:
        """One row per element of the lists; a row with a fault or an empty list stays one row.

        Raises:
            InputError: the items are no lists, but others are.
        """
        if "item" not in lists:
            raise InputError(
                f"{self.file.path}: the {lists[0]} is a list and the item is not; name a column of lists with "
                "--item_column, or one of single values for the other"
            )
        same = " AND ".join(["true", *(f"len({role}) = len(item)" for role in lists[1:] if role != "item")])
        fault = f"CASE WHEN fault IS NULL AND len(item) > 0 AND ({same}) IS NOT TRUE THEN 'lists of different lengths' "
        checked = f"SELECT * REPLACE ({fault} ELSE fault END AS fault) FROM ({select})"
        whole = "fault IS NULL AND len(item) > 0"
        each = ", ".join(f"unnest(CASE WHEN {whole} THEN {role} ELSE [NULL] END) AS {role}" for role in lists)
        return f"SELECT * EXCLUDE ({', '.join(lists)}), {each} FROM ({checked})"

    def _check_where(self, where: str, relation: str) -> None:
        try:
            self.run(f"SELECT {where} FROM {relation.replace('strict_mode=STRICT', 'strict_mode=true')} LIMIT 0")
        except duckdb.Error as error:
            message = str(error).strip().split("\n")[0]
            raise InputError(
                f"--where {self.config.where!r} cannot be computed for {self.file.path}: {message}"
            ) from None
        self._drop_faults()

    def _run_text(self, statement: str) -> None:
        """Run a statement with a text source in strict mode, or in lenient mode if line endings are mixed."""
        # Parquet statistics leave NaN out, and DuckDB 2.0 relies on them: isnan is never true, and try_cast fails where
        # it should return null. A list of words after IN becomes a join of every row with it, which takes twice the
        # memory and the time.
        self.run("SET disabled_optimizers = 'statistics_propagation,in_clause'")
        try:
            self.run(statement.replace("strict_mode=STRICT", "strict_mode=true"))
        except duckdb.InvalidInputException as error:
            if "state machine" not in str(error):
                raise
            self._drop_faults()
            self.run(_make_lenient(statement))
            self.report.notes.append(f"{self.file.path}: line endings are mixed, so stray quotes are taken literally")
        finally:
            self.run("RESET disabled_optimizers")

    def _drop_faults(self) -> None:
        self.run("DROP TABLE IF EXISTS reader_faults")
        self.run("DROP TABLE IF EXISTS reader_scans")

    def _move_malformed(self) -> None:
        """Move the lines that the reader could not split to `malformed`; one that swallowed others counts with them."""
        reasons = " ".join(f"WHEN {quote_sql(kind)} THEN {quote_sql(name)}" for kind, name in FAULTS.items())
        self.run(
            "INSERT INTO malformed SELECT index, line + unnest(range(len(lines))), reason, unnest(lines) "
            f"FROM (SELECT {self.index} AS index, line, "
            f"CASE any_value(error_type::VARCHAR) {reasons} ELSE {quote_sql(MALFORMED_LINE)} END AS reason, "
            "string_split(trim(any_value(csv_line), chr(10)), chr(10)) AS lines FROM reader_faults GROUP BY line)"
        )
        self._drop_faults()

    def _count(self, table: str) -> int:
        return int(self._fetch(f"SELECT count(*) FROM {table}")[0])

    def _fetch(self, statement: str) -> tuple[Any, ...]:
        (row,) = self.run(statement).fetchall()
        return tuple(row)


def _make_lenient(statement: str) -> str:
    """The statement in lenient mode, which accepts mixed line endings and stray quotes."""
    return statement.replace("strict_mode=STRICT", "strict_mode=false")
