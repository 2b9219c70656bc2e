"""Reads keys of items or users from lists and tables into the engine, each spelled as `prepare` spells it.

A list has a key per line. A table (CSV, TSV, JSON lines, Parquet) has keys in a column, and other columns that a
condition may use. Both are read as a log whose users and items are this one column, so everything that is known of logs
holds here: compression, encodings, malformed lines, the spelling of keys, and the language of `--where`.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.prepare import NONE
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.dialect import first_lines, shorten
from recgpt_torchrec.preparation.reading.duckdb_reader import open_file
from recgpt_torchrec.preparation.reading.files import ENDINGS, InputFile, list_files
from recgpt_torchrec.preparation.reading.loading import load_files
from recgpt_torchrec.preparation.reading.rows import FILTERED, UNKNOWN
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
    kind: Literal["item", "user"] = "item"
    """What the keys are of, for messages."""

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
            digest.update(f"{file.format} {file.bytes} ".encode())
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
        config = self._reading(is_list)
        try:
            dialects = [open_file(file, config) for file in files]
            # A list of blank lines has no columns.
            read = [each for each in zip(files, dialects, strict=True) if not is_list or first_lines(each[0], "utf-8")]
            load_files(engine, config, [file for file, _ in read], [dialect for _, dialect in read], timed=False)
        except InputError as error:
            raise _without_options_of_prepare(error, self.kind) from None
        unknown, left_out = quote_sql(UNKNOWN), quote_sql(FILTERED)
        state = f"CASE WHEN problem IS NULL THEN {FITS} WHEN problem = {unknown} THEN {UNCOMPUTED} ELSE {LEFT_OUT} END"
        run(
            f"CREATE TABLE {table} AS SELECT item AS key, max({state})::TINYINT AS state FROM log_rows "
            f"WHERE item IS NOT NULL AND (problem IS NULL OR problem IN ({unknown}, {left_out})) GROUP BY item"
        )
        ((keys,),) = run(f"SELECT count(*) FROM {table}").fetchall()
        ((unusable, reason, text),) = run("SELECT count(*), first(reason), first(text) FROM rejected").fetchall()
        run("DROP VIEW log; DROP TABLE log_rows; DROP TABLE malformed; DROP TABLE rejected")
        example = f"{_said_of(self.kind, reason)}: {shorten(text)!r}" if unusable else ""
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


def _said_of(kind: str, text: str) -> str:
    """What a reader of logs says of users or items, which are the same column here."""
    other = "user" if kind == "item" else "item"
    for words in ("no {}", "for the {}", "and the {} must", "--{}_column"):
        text = text.replace(words.format(other), words.format(kind))
    return text


def _without_options_of_prepare(error: InputError, kind: str) -> InputError:
    """The message of a reader of logs, without the options that only `prepare` has."""
    text = _said_of(kind, str(error))
    if (hint := re.search(r",? (or )?[Pp]ass --(?!(item|user)_column|where)", text)) is None:
        return InputError(text)
    return InputError(f"{text[: hint.start()].rstrip(';:,')}; {REMEDY}")
