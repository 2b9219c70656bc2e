"""Reads the files of a table of attributes, one after the other, into rows that any engine can store.

How lines are split, which encodings and compressions there are and how keys and numbers are spelled is that of logs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import ibis
import ibis.expr.datatypes as dt
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.attributes.columns import (
    Held,
    TableFile,
    Taken,
    explain_column,
    explain_nested,
    held_in_arrow,
    held_in_json,
    held_in_text,
    read_as,
)
from recgpt_torchrec.preparation.attributes.tables import TEXT, EntityTable
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine, explain_lack
from recgpt_torchrec.preparation.engines.engine import BATCH_ROWS, quote_sql
from recgpt_torchrec.preparation.reading.dialect import Dialect, find_dialect, find_separator, first_lines
from recgpt_torchrec.preparation.reading.duckdb_reader import DuckDBReader, open_file
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.json_lines import JsonLines, parse_lines, usable_keys
from recgpt_torchrec.preparation.reading.formats.parquet import Parquet
from recgpt_torchrec.preparation.reading.formats.separated import Separated
from recgpt_torchrec.preparation.reading.formats.source import Column
from recgpt_torchrec.preparation.reading.rows import BLANK, is_empty, parse_number, spell_key
from recgpt_torchrec.preparation.reading.spark_loading import TASK_MEMORY, own_scratch

ROW, FAILURE = -1, -2
"""Values of `attribute` that stand for a row itself, and for a file that cannot be read."""
NO_KEY, NO_NUMBER, MALFORMED_LINE = "no key", "no number", "malformed line"
"""Problems of a row, and of a value."""
VALUES = pa.schema(
    [
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("attribute", pa.int32()),
        ("value", pa.string()),
        ("number", pa.float64()),
        ("problem", pa.string()),
    ]
)
"""Schema of what is read: a line for each row (`attribute` is -1), and for each distinct value of a row. `file` is the
index of the file and `row` the line or row of it, from 1; `attribute` is the index of the attribute; `value` is its
spelling, or null where it is a `number`. With a `problem` there is no value, and `value` shows what was there."""


def open_table_file(file: InputFile, table: EntityTable, scratch: str) -> TableFile:
    """Decide how a file is to be read, and look what its columns hold.

    Raises:
        InputError: it is not of its format, lacks a column, or a column holds what is no value.
    """
    dialect = _choose_dialect(file, table)
    with explain_lack(scratch), _open_engine(table, scratch) as engine:
        reader = _TableReader(engine, table)
        reader.load(file, dialect)
        return TableFile(file=file, dialect=dialect, held=reader.held)


def read_table_file(
    table: EntityTable, taken: Sequence[Taken], scratch: str | None, source: tuple[int, TableFile]
) -> Iterator[pa.Table]:
    """The rows and values of a file, in tables of the schema `VALUES`; runs where the engine has its workers.

    What is wrong with the file is a row too, with the message as its problem: not every engine hands errors on.

    Args:
        table: that the file is of.
        taken: what each attribute is taken for.
        scratch: folder for temporary tables; None: the worker's own.
        source: index of the file, and the file.
    """
    number, file = source
    scratch = scratch or own_scratch()
    try:
        with explain_lack(scratch), _open_engine(table, scratch) as engine:
            reader = _TableReader(engine, table, taken)
            reader.held = file.held
            reader.load(file.file, file.dialect)
            yield from reader.read(number)
    except InputError as error:
        empty = {name: None for name in VALUES.names}
        yield pa.Table.from_pylist([{**empty, "file": number, "attribute": FAILURE, "problem": str(error)}], VALUES)


def _open_engine(table: EntityTable, scratch: str) -> DuckDBEngine:
    return DuckDBEngine(scratch, table.reading.memory_limit or TASK_MEMORY, threads=1)


def _choose_dialect(file: InputFile, table: EntityTable) -> Dialect:
    """How a file is read; a header that another separator divides into the columns asked for is read with that one."""
    dialect = open_file(file, table.reading)
    if dialect.format != "csv" or dialect.recbole or not dialect.header or not file.bytes:
        return dialect
    if lines := first_lines(file, table.reading.encoding, count=1):
        wanted = [table.key, *(each.name for each in table.asked)]
        names = [name.strip().strip('"') for name in lines[0].split(dialect.separator)]
        separator = None if all(each in names for each in wanted) else find_separator(lines[0], wanted)
        if separator is not None:
            return find_dialect(file, replace(table.reading, separator=separator))
    return dialect


class _TableReader(DuckDBReader):
    """Loads one file of a table into DuckDB."""

    def __init__(self, engine: DuckDBEngine, table: EntityTable, taken: Sequence[Taken] | None = None) -> None:
        """Make a reader.

        Args:
            engine: an empty one.
            table: that the file is of.
            taken: what each attribute is taken for; None: `load` only fills `held`.
        """
        super().__init__(engine, table.reading, timed=False)
        self.spec, self.taken = table, taken
        self.wanted = [table.key, *(each.name for each in table.asked)]
        self.held: dict[str, Held] = {each.name: Held(None, "nothing") for each in table.asked}
        """What the attributes hold; nothing, in an empty file."""
        self.types: list[dt.DataType] = []
        """Of the columns key, a0, a1, ... of `table_rows`."""

    def _load_csv(self) -> None:
        text = Separated(self.file, self.config, self.dialect, {})
        self._check_names(text.names)
        text.check_widths()
        if self.taken is None:
            places = {each.name: text.names.index(each.name) for each in self.spec.asked}
            self.held = {name: held_in_text(text.types[place]) for name, place in places.items()}
            for name in self.wanted:
                text.find(name)
            return
        places_in_file = [f"c{place}" for place in range(len(text.names))]
        source = self._text_source(
            places_in_file, self.dialect.separator, self.dialect.quote, header=self.dialect.header
        )
        self._store(source, [text.find(name) for name in self.wanted])
        self._move_malformed()

    def _load_jsonl(self) -> None:
        lines = JsonLines(self.file, self.config, {})
        self._drop_faults()
        self._run_text(f"CREATE TABLE json_rows AS SELECT * FROM {parse_lines(self._line_source())}")
        self._move_malformed()
        pointers = [quote_sql(lines.pointer(name)) for name in self.wanted]
        if self.taken is None:
            self._describe_json(pointers)
            return
        columns = [
            self._json_column(name, pointer, name != self.wanted[0] and self.held[name].kind == "list")
            for name, pointer in zip(self.wanted, pointers, strict=True)
        ]
        fault = (
            f"CASE WHEN line IS NULL OR trim(line) = '' THEN {quote_sql(BLANK)} "
            f"WHEN object IS NULL THEN {quote_sql(MALFORMED_LINE)} END"
        )
        self._store("json_rows", columns, fault, "CASE WHEN object IS NULL THEN line END")

    def _describe_json(self, pointers: Sequence[str]) -> None:
        """Fill `held` by the types of all values, and of the elements of all lists."""
        kinds_of_elements = (
            "list_sort(list_distinct(list_transform(TRY_CAST(object->{} AS JSON[]), lambda each: json_type(each))))"
        )
        each = ", ".join(
            f"bool_or(json_exists(object, {pointer})), list(DISTINCT json_type(object, {pointer})), "
            f"list(DISTINCT {kinds_of_elements.format(pointer)})"
            for pointer in pointers
        )
        found = self._fetch(f"SELECT {each} FROM json_rows WHERE object IS NOT NULL")
        for place, name in enumerate(self.wanted):
            exists, kinds, inside = found[3 * place : 3 * place + 3]
            if exists is None:
                continue  # no row at all
            if not exists:
                raise explain_column(self.spec, self.file, name, usable_keys(self._fetch, "json_rows"))
            try:
                held = held_in_json({*(kinds or [])}, {kind for each in inside or [] for kind in each or []})
            except ValueError as error:
                raise explain_nested(self.spec, self.file, name, str(error)) from None
            if place == 0 and held.kind == "list":
                raise explain_nested(self.spec, self.file, name, "lists")
            if place:
                self.held[name] = held

    @staticmethod
    def _json_column(name: str, pointer: str, is_list: bool) -> Column:
        single = f"object->>{pointer}"
        if not is_list:
            return Column(name=name, sql=f"({single})")
        array = f"TRY_CAST(object->{pointer} AS VARCHAR[])"
        sql = f"CASE WHEN json_type(object, {pointer}) = 'ARRAY' THEN {array} ELSE [{single}] END"
        return Column(name=name, sql=sql, is_list=True)

    def _load_parquet(self) -> None:
        if self.file.compression:
            schema = pq.read_schema(self.copy.path)
        else:
            with self.file.open() as stream:
                schema = pq.read_schema(stream)
        self._check_names(schema.names)
        parquet = Parquet(self.file, self.config, schema, {self.spec.entity: self.spec.key, "item": self.spec.key})
        columns = [parquet.find(name) for name in self.wanted]
        if self.taken is None:
            for place, name in enumerate(self.wanted):
                try:
                    held = held_in_arrow(schema.field(name).type)
                except ValueError as error:
                    raise explain_nested(self.spec, self.file, name, str(error)) from None
                if place:
                    self.held[name] = held
            parquet.source(self.copy.path)  # checks the type of the key
            if columns[0].is_list:
                raise explain_nested(self.spec, self.file, self.spec.key, "lists")
            return
        self._store(parquet.relation(self.copy.path), columns)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in self.wanted:
            if name not in names:
                raise explain_column(self.spec, self.file, name, names)

    def _store(
        self, relation: str, columns: Sequence[Column], fault: str = "NULL::VARCHAR", text: str = "NULL::VARCHAR"
    ) -> None:
        """Store key and attributes of every row as the table `table_rows`.

        Args:
            relation: SQL of the rows.
            columns: of the key and of each attribute.
            fault: SQL of what is wrong with a row, or null.
            text: SQL of such a row, to be shown.
        """
        assert self.taken is not None
        self._drop_faults()
        key = columns[0]
        columns = [
            read_as(column, taken, self.held[taken.name], self.spec.separator)
            for column, taken in zip(columns[1:], self.taken, strict=True)
        ]
        self.types = [key.type, *(column.type for column in columns)]
        self.lists = [column.is_list for column in columns]
        each = [f"{column.sql} AS a{n}, {column.fault or 'NULL::VARCHAR'} AS f{n}" for n, column in enumerate(columns)]
        selected = ", ".join([f"{key.sql} AS key", f"{fault} AS fault", f"{text} AS text", *each])
        self._run_text(f"CREATE TABLE table_rows AS SELECT {selected} FROM {relation}")

    def read(self, number: int) -> Iterator[pa.Table]:
        """The rows and values of the file that was loaded, in tables of the schema `VALUES`; the file's is `number`."""
        if not self.types:  # an empty file
            return
        yield from self._run_values(number, ROW, self._select_rows())
        lines = "SELECT line AS row, NULL::VARCHAR AS key, text AS value, NULL::DOUBLE AS number, reason AS problem"
        yield from self._run_values(number, ROW, f"{lines} FROM malformed")
        for place in range(len(self.types) - 1):
            yield from self._run_values(number, place, self._select_values(place))

    def _select_rows(self) -> str:
        source = ibis.table({"row": "int64", "key": self.types[0], "fault": "string", "text": "string"}, name="source")
        key = spell_key(source.key, self.config.null_words)
        problem = ibis.cases((source.fault.notnull(), source.fault), (key.isnull(), NO_KEY), else_=ibis.null("string"))
        rows = source.filter(source.fault.isnull() | (source.fault != BLANK)).select(
            "row", key=key, value=source.text, number=ibis.null("float64"), problem=problem
        )
        return self._with_source("key, fault, text", rows)

    def _select_values(self, place: int) -> str:
        assert self.taken is not None
        taken, words = self.taken[place], self.config.null_words
        columns = {"row": "int64", "key": self.types[0], "raw": self.types[place + 1], "fault": "string"}
        source = ibis.table(columns, name="source")
        key, none, no_number = spell_key(source.key, words), ibis.null("string"), ibis.null("float64")
        missing = is_empty(source.raw, words)
        text = source.raw.cast("string")
        problem, number = source.fault, no_number
        if taken.kind == "number":
            parsed = ibis.cases((missing, no_number), else_=parse_number(source.raw)) + 0.0  # no negative zero
            problem = ibis.cases((parsed.isnull() & ~missing, NO_NUMBER), else_=source.fault)
            value, number = ibis.cases((problem.notnull(), text), else_=none), parsed
        elif taken.kind == TEXT:
            value = ibis.cases((missing, none), else_=text.strip())
        else:
            value = spell_key(source.raw, words)
        value = ibis.cases((source.fault.notnull(), none), else_=value)
        values = source.select("row", key=key, value=value, number=number, problem=problem)
        some = values.filter(
            values.key.notnull(), values.value.notnull() | values.number.notnull() | values.problem.notnull()
        )
        raw = f"a{place}"
        if self.lists[place]:
            raw = f"unnest(CASE WHEN f{place} IS NULL THEN {raw} ELSE [NULL] END)"
            some = some.distinct()
        return self._with_source(f"key, {raw} AS raw, f{place} AS fault", some)

    def _with_source(self, columns: str, expression: ibis.expr.types.Table) -> str:
        row = f"rowid + {1 + self.dialect.header_lines} AS row"
        return f"WITH source AS (SELECT {row}, {columns} FROM table_rows) {self.engine.sql(expression)}"

    def _run_values(self, number: int, attribute: int, statement: str) -> Iterator[pa.Table]:
        for batch in self.engine.connection.cursor().sql(statement).to_arrow_reader(BATCH_ROWS):
            size = batch.num_rows
            constants = {"file": pa.repeat(number, size), "attribute": pa.repeat(attribute, size)}
            columns = {name: batch.column(name) for name in batch.schema.names} | constants
            yield pa.table([columns[field.name].cast(field.type) for field in VALUES], schema=VALUES)
