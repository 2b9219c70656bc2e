"""Lists of interactions in the text of a column: which columns seem to hold them, and how they are split.

One row of such a log is a user's history: a list of items, with a list of times, one time for all, or none.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.prepare import NONE
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.dialect import shell_word, shorten
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.source import Column

SHARE = 0.1
"""Share of a column's values that look like lists above which the column is refused."""
PATTERNS = {
    ",": r"[^,\s]+(,[^,\s]+)+|[0-9]+(, ?[0-9]+)+",
    "|": r"[^|]+(\|[^|]+)+",
    ";": r"[^;]+(;[^;]+)+",
    " ": r"\S*[0-9]\S*( \S*[0-9]\S*)+",  # words are names, unless each has a digit
}
BRACKETS = {"[": "]", "{": "}", "(": ")"}
LOOKS_LIKE_LIST = r"^(\[[^\n]*\]|[0-9]+([,;| ] ?[0-9]+)+)\z"
"""Keys that look like lists, for the note about them."""


def read_lists(file: InputFile, config: Prepare, columns: dict[str, Column], items: Sequence[str]) -> dict[str, Column]:
    """Make lists of the text columns if the items' column holds lists.

    Args:
        file: that is read.
        config: options of the stage.
        columns: the columns to read.
        items: some values of the items' column, as text.

    Raises:
        InputError: it seems to hold lists, and no option says how they are separated.
    """
    item, separator = columns["item"], config.list_separator
    if item.is_list or not item.type.is_string() or separator == NONE:
        return columns
    if separator is None:
        if (seen := find_list_separator(items)) is None:
            return columns
        shown = next(value for value in items if find_list_separator([value]) is not None)
        raise InputError(
            f"{file.path}: column {item.name!r} for the item seems to hold lists, such as {shorten(shown, 40)!r}. Pass "
            f"--list_separator {shell_word(seen)} to read one interaction per element, or --list_separator none if "
            "each is one value"
        )
    return split_columns(columns, separator)


def split_columns(columns: dict[str, Column], separator: str) -> dict[str, Column]:
    """Split the text of the items, and of the other columns of text but the users', into lists."""
    item = split_text(columns["item"], separator)
    result = {**columns, "item": item}
    for role, column in columns.items():
        if role not in ("user", "item") and column.type.is_string() and not column.is_list:
            parts = split_text(column, separator)
            has_one = f"NOT (contains({column.sql}, {quote_sql(separator)}) OR {column.sql}[1:1] IN ('[', '{{'))"
            result[role] = replace(parts, sql=f"CASE WHEN {has_one} THEN {repeat(column, item)} ELSE {parts.sql} END")
    return result


def repeat(column: Column, item: Column) -> str:
    """SQL of a list that holds a row's single value once for each of its items."""
    return f"list_transform({item.sql}, lambda element: {column.sql})"


def split_text(column: Column, separator: str) -> Column:
    """A column of text as one of lists; a row is faulty if brackets or quotes are left at the ends of an element."""
    text = f"trim({column.sql})"
    pairs = {open: close for open, close in BRACKETS.items() if open != "(" or separator == ","}
    cases = " ".join(
        f"WHEN {text}[1:1] = '{open}' AND {text}[-1:] = '{close}' THEN {text}[2:-2]" for open, close in pairs.items()
    )
    inner = f"trim(CASE {cases} ELSE {text} END)"
    split = (
        f"regexp_split_to_array({inner}, '\\s+')"
        if separator == " "
        else f"string_split({inner}, {quote_sql(separator)})"
    )
    bare = "trim(element)"
    quoted = f"len({bare}) > 1 AND {bare}[1:1] IN ('\"', '''') AND {bare}[1:1] = {bare}[-1:]"
    elements = f"list_transform({split}, lambda element: CASE WHEN {quoted} THEN {bare}[2:-2] ELSE {bare} END)"
    ends = ", ".join(quote_sql(mark) for mark in ("[", "{", *(["("] if separator == "," else []), '"', "'"))
    left = f"len(list_filter({elements}, lambda element: element[1:1] IN ({ends}))) > 0"
    fault = f"CASE WHEN {left} THEN 'list with brackets or quotes inside' END"
    return Column(name=column.name, sql=elements, kind="list in text", is_list=True, fault=fault)


def find_list_separator(values: Sequence[str]) -> str | None:
    """The separator of the lists that a column seems to hold; None: its values are single ones."""
    filled = [value.strip() for value in values if value.strip()]
    bracketed = [value[1:-1].strip() for value in filled if re.fullmatch(r"\[.*\]", value, re.DOTALL)]
    if len(bracketed) > SHARE * len(filled):
        has_blanks = any(re.search(r"\S\s+\S", value) for value in bracketed)
        return " " if has_blanks and not any("," in value for value in bracketed) else ","
    for separator, pattern in PATTERNS.items():
        if sum(re.fullmatch(pattern, value) is not None for value in filled) > SHARE * len(filled):
            return separator
    return None
