"""Reads keys of items from lists and tables into the engine, each spelled as `prepare` spells it.

A list has a key per line. A table (CSV, TSV, JSON lines, Parquet) has keys in a column, and other columns that a
condition may use. Both are read as a log of which only the items count, so everything that is known of logs holds here:
compression, encodings, malformed lines, the spelling of keys, and the language of `--where`.
"""

import hashlib
import os
import re
from dataclasses import dataclass

import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.prepare import NONE
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine, quote_sql
from recgpt_torchrec.preparation.reading.dialect import shorten
from recgpt_torchrec.preparation.reading.duckdb_reader import DuckDBReader
from recgpt_torchrec.preparation.reading.files import ENDINGS, InputFile, list_files
from recgpt_torchrec.preparation.reading.rows import BLANK, FILTERED, UNKNOWN
from recgpt_torchrec.storage import filesystem

FITS, UNCOMPUTED, LEFT_OUT = 2, 1, 0
"""States of a key, the best of its rows: the condition holds, cannot be computed, or does not hold."""
LIST = ".txt"
"""Ending of lists; a file with an unknown ending is one as well."""
NO_CHARACTER = chr(31)
"""Separator of the columns of a list: none that a key holds."""
CHUNK = 2**22
"""Bytes read at once for a checksum."""
REMEDY = "give a list in UTF-8 with a key per line, or a table (.csv .tsv .jsonl .parquet) with the keys in a column"


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """A list or table of keys, in one file or several."""

    option: str
    """Option that names it, for messages: `--allow`."""
    path: str
    column: str
    """Column of the keys, in a table."""
    output: str
    """Output of the stage, in which no input is looked for."""
    where: str | None = None
    """Condition on the rows; None: every row counts."""

    def __str__(self) -> str:
        return f"{self.option} {self.path}"

    def checksum(self) -> str:
        """32 hex digits that identify the content.

        Raises:
            InputError: there is no such file, or it cannot be read.
        """
        digest = hashlib.sha256()
        for file in self.files():
            fs, root = filesystem(file.path)
            try:
                with fs.open_input_stream(root, compression=None) as stream:
                    while chunk := stream.read(CHUNK):
                        digest.update(chunk)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{self}: {file.path} cannot be read: {' '.join(str(error).split())}") from None
        return digest.hexdigest()[:32]

    def files(self) -> list[InputFile]:
        """The files, all lists or all tables.

        Raises:
            InputError: there are none, or both kinds are mixed.
        """
        # With a separator, a file of an unknown ending is text.
        found = list_files([self.path], self._reading(is_list=True), self.option).files
        if len({_is_list(file) for file in found}) > 1:
            raise InputError(f"{self} holds lists ({LIST}) and tables; give a folder with one kind of them")
        for file in found:
            file.format = "csv" if _is_list(file) else file.format
        return found

    def load(self, engine: DuckDBEngine, table: str) -> "LoadedKeys":
        """Read the keys into a table of the engine, with the columns key string and state int8.

        Raises:
            InputError: a file cannot be read, lacks a column, or holds no key; or the condition is none.
        """
        files, run = self.files(), engine.connection.execute
        is_list = _is_list(files[0])
        if is_list and self.where is not None:
            raise InputError(
                f"{self} is read as a list with a key per line, which has no columns for --where; give a table, whose "
                "name ends in .csv, .tsv, .jsonl or .parquet"
            )
        reader = DuckDBReader(engine, self._reading(is_list))
        try:
            reader.open_all(files)
            for index, file in enumerate(files):
                reader.load(index, file)
        except InputError as error:
            raise _without_options_of_prepare(error) from None
        usable = f"problem IS NULL OR problem IN ({quote_sql(FILTERED)}, {quote_sql(UNKNOWN)})"
        state = (
            f"CASE WHEN problem IS NULL THEN {FITS} WHEN problem = {quote_sql(UNKNOWN)} THEN {UNCOMPUTED} ELSE 0 END"
        )
        run(
            f"CREATE TABLE {table} AS SELECT item AS key, max({state})::TINYINT AS state FROM log_rows "
            f"WHERE item IS NOT NULL AND ({usable}) GROUP BY item"
        )
        ((keys,),) = run(f"SELECT count(*) FROM {table}").fetchall()
        bad = (
            "SELECT problem, text FROM log_rows WHERE NOT coalesce(item IS NOT NULL AND "
            f"({usable}), false) AND problem IS DISTINCT FROM {quote_sql(BLANK)} "
            "UNION ALL SELECT reason, text FROM malformed"
        )
        ((unusable, problem, text),) = run(f"SELECT count(*), first(problem), first(text) FROM ({bad})").fetchall()
        run("DROP VIEW log; DROP TABLE log_rows; DROP TABLE malformed")
        example = f"{problem}: {shorten(text)!r}" if unusable else ""
        if not keys:
            why = f"none of its {unusable:,} rows has a key ({example})" if unusable else "it is empty"
            raise InputError(f"{self}: {why}; {REMEDY}")
        return LoadedKeys(keys=keys, unusable=unusable, example=example)

    def _reading(self, is_list: bool) -> Prepare:
        """Options of a log whose users are its items."""
        column = "0" if is_list else self.column
        return Prepare(
            input=[self.path],
            output=self.output,
            user_column=column,
            item_column=column,
            time_column=None,
            where=self.where,
            null_words=[],
            list_separator=NONE,
            header=not is_list,
            separator=NO_CHARACTER if is_list else None,
            quote=NONE if is_list else None,
        )


@dataclass(frozen=True, kw_only=True)
class LoadedKeys:
    """What `KeyFile.load` read."""

    keys: int
    """Number of distinct keys."""
    unusable: int
    """Number of rows without a key, and of malformed lines."""
    example: str
    """One of these, with what is wrong with it."""


def _is_list(file: InputFile) -> bool:
    name = file.path[: len(file.path) - len(file.compression)]
    ending = os.path.splitext(name)[1].lower()
    return ending == LIST or ending not in ENDINGS


def _without_options_of_prepare(error: InputError) -> InputError:
    """The message of the reader of logs without users and without the options that only `prepare` has."""
    text = str(error).replace("for the user", "for the item").replace("and the user must", "and the item must")
    text = text.replace("--user_column", "--item_column")
    if (hint := re.search(r",? (or )?[Pp]ass --(?!item_column|where)", text)) is None:
        return InputError(text)
    return InputError(f"{text[: hint.start()].rstrip(';:,')}; {REMEDY}")
