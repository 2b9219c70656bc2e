"""Tables in text: csv, tsv, RecBole's atomic files, and any other separator."""

import re
from collections.abc import Callable

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.dialect import (
    RECBOLE_TYPES,
    Dialect,
    cells_of,
    first_lines,
    shorten,
)
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.lists import read_lists, split_columns
from recgpt_torchrec.preparation.reading.formats.source import (
    Column,
    Source,
    explain_missing,
    explain_unknown,
    partition_column,
)

HEADER_NAMES = {"user_id", "item_id", "timestamp", "user", "item", "time", "userid", "itemid", "rating", "event"}


class Separated:
    """The columns of one table in text."""

    def __init__(self, file: InputFile, config: Prepare, dialect: Dialect, wanted: dict[str, str]) -> None:
        self.file, self.config, self.dialect, self.wanted = file, config, dialect, wanted
        self.notes: list[str] = []
        lines = first_lines(file, config.encoding, blank=True)
        if dialect.header and lines[0] == "" and any(lines):
            raise InputError(f"{file.path} begins with a blank line, not with the names of columns; remove the line")
        lines = [line for line in lines if line.strip()]
        self.lines, cells = lines, cells_of(lines, dialect)
        first = [cell.strip() for cell in cells[0]] if cells else []
        if lines and dialect.header and re.match(r"(?i)sep=|#|%|//", lines[0]):
            raise InputError(
                f"{file.path}: its first line is {shorten(lines[0])!r} and does not name the columns; remove that line"
            )
        self.rows = cells[1:] if dialect.header else cells
        self.types = [""] * len(first)
        if dialect.recbole:
            self.names, self.types = self._recbole_names(first)
        else:
            self.names = first if dialect.header else [str(place) for place in range(len(first))]

    def source(self, text_source: Callable[[list[str]], str], has_quotes: bool) -> Source:
        """The rows of the file.

        Args:
            text_source: returns SQL that reads the file with these names for its columns, all of them text.
            has_quotes: whether values may be in quotes, and so hold line breaks.

        Raises:
            InputError: a column is absent, ambiguous, or seems to hold lists.
        """
        columns = {role: self._find(role, name) for role, name in self.wanted.items()}
        self._note_header(columns)
        self.check_widths()
        item = self.wanted["item"]
        if item in self.names:
            place = self.names.index(item)
            if self.types[place].endswith("_seq"):
                columns = split_columns(columns, " ")
            else:
                values = [row[place] for row in self.rows if len(row) == len(self.names)]
                columns = read_lists(self.file, self.config, columns, values)
        places = [f"c{place}" for place in range(len(self.names))]
        shown = [f"coalesce({place}, '')" for place in places]
        if quote := self.dialect.quote:
            mark, separator = quote_sql(quote), quote_sql(self.dialect.separator)
            shown = [f"CASE WHEN contains({s}, {separator}) THEN {mark} || {s} || {mark} ELSE {s} END" for s in shown]
        text = ", ".join(shown)
        return Source(
            relation=text_source(places),
            columns=columns,
            text=f"array_to_string([{text}], {quote_sql(self.dialect.separator)})",
            several_lines=" OR ".join(f"contains({place}, chr(10))" for place in places) if has_quotes else "",
        )

    def find(self, name: str) -> Column:
        """The column of a name in `--where`.

        Raises:
            InputError: there is none, or more than one.
        """
        if name in self.config.partition_columns:
            return partition_column(self.file, name, self.names)
        if not self.dialect.header and name.startswith("column"):
            name = name.removeprefix("column")  # as a place is no name of SQL
        if name not in self.names:
            raise explain_unknown(self.file, name, self.names)
        return self._place(name)

    def _find(self, role: str, name: str) -> Column:
        if name in self.config.partition_columns:
            return partition_column(self.file, name, self.names)
        if name not in self.names:
            raise explain_missing(self.file, role, name, self.names, self.config)
        return self._place(name)

    def _place(self, name: str) -> Column:
        if (count := self.names.count(name)) > 1:
            raise InputError(
                f"{self.file.path} has {count} columns {name!r}; rename them, so that it is clear which one is meant"
            )
        return Column(name=name, sql=f"c{self.names.index(name)}")

    def check_widths(self) -> None:
        """Raise an `InputError` if all rows have one value more than the header: row names, as R writes them."""
        is_plain = not any(self.dialect.quote in line for line in self.lines) if self.dialect.quote else True
        wider = {len(row) for row in self.rows} == {len(self.names) + 1}
        if self.dialect.header and is_plain and wider:
            raise InputError(
                f"{self.file.path}: its rows have {len(self.names) + 1} values and its header {len(self.names)} names, "
                f"{shorten(', '.join(self.names))}; add the missing name to the first line, or write the file without "
                "row names"
            )

    def _note_header(self, columns: dict[str, Column]) -> None:
        """Note what may be wrong about the header."""
        if self.dialect.header:
            numbers = [c.name for c in columns.values() if c.name.isdigit() and c.name != c.sql[1:]]
            if len(numbers) == len(columns):
                self.notes.append(
                    f"{self.file.path}: the first line is taken for the names of columns ({', '.join(numbers)}); if it "
                    "is a row, pass --header false with columns by place, from 0"
                )
        elif self.rows and HEADER_NAMES & {cell.strip().lower() for cell in self.rows[0]}:
            self.notes.append(
                f"{self.file.path}: the first line looks like names of columns, and is read as a row because of "
                "--header false"
            )

    def _recbole_names(self, header: list[str]) -> tuple[list[str], list[str]]:
        pairs = [name.rpartition(":") for name in header]
        if not all(name and kind in RECBOLE_TYPES for name, _, kind in pairs):
            raise InputError(
                f"{self.file.path} is not a RecBole file: its first line must be tab-separated name:type fields "
                f"with types {', '.join(RECBOLE_TYPES)}, for example user_id:token; "
                f"it is {shorten(chr(9).join(header))!r}"
            )
        return [name for name, _, _ in pairs], [kind for _, _, kind in pairs]
