"""What was understood of tables of attributes, in lines of the summary: kinds, missing values, and what to look at."""

import re
from collections.abc import Sequence

from recgpt_torchrec.preparation.attributes.encoding import FREQUENT, EncodedAttribute, EncodedTable
from recgpt_torchrec.preparation.attributes.reading import NO_KEY, NO_NUMBER
from recgpt_torchrec.preparation.reading.dialect import shell_word, shorten
from recgpt_torchrec.preparation.reading.formats.lists import find_list_separator

Line = list[str]
"""A label and a text."""
DISGUISED = 0.8
"""Share of distinct ones among the values of all users or items from which on a category is rather a key."""
FEWEST = 20
"""Minimum number of values for that."""
SINGLE = ("text", "string", "large_string", "RecBole's token")
"""Words for columns of text, whose lists are divided by a separator."""
MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T]")
"""How a date-time begins, whose blank separates no values."""
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")


def describe_tables(tables: Sequence[EncodedTable]) -> list[Line]:
    """The lines about all tables."""
    return [line for table in tables for line in _describe_table(table)]


def _describe_table(encoded: EncodedTable) -> list[Line]:
    loaded, entity = encoded.loaded, encoded.loaded.table.entity
    words = " and ".join(dict.fromkeys(each.dialect.words for each in loaded.files if each.file.bytes))
    more = f"; {loaded.unknown:,} of the table's {loaded.distinct:,} are in no interaction" if loaded.unknown else ""
    lines = [
        [f"{entity}s", f"{loaded.rows:,} rows of {loaded.names} ({words})"],
        ["", f"{encoded.with_row:,} of the dataset's {encoded.total:,} {entity}s have a row{more}"],
    ]
    lines += [["", _describe_attribute(each, encoded)] for each in encoded.attributes]
    if repeated := loaded.rows - loaded.distinct:
        lines.append(["note", f"{loaded.table.option}: {repeated:,} rows repeat another row of their {entity}"])
    if left_out := loaded.table.left_out:
        lines.append(
            ["note", f"{loaded.table.option}: left out {', '.join(left_out[:3])}{' ...' * (len(left_out) > 3)}"]
        )
    for problem in loaded.problems:
        lines.append(["note", _describe_problem(encoded, **problem)])
    for each in encoded.attributes:
        lines += [
            ["note", f"{loaded.table.attributes_option} {each.taken.name}: {note}"] for note in _notes(encoded, each)
        ]
    return lines


def _describe_attribute(each: EncodedAttribute, encoded: EncodedTable) -> str:
    taken, attribute = each.taken, each.attribute
    absent = encoded.total - each.present
    missing = f"missing for {absent:,} ({absent / encoded.total:.1%})" if absent else "none missing"
    words = f"{taken.name}: {taken.kind} ({taken.words})"
    if attribute is None:
        return f"{words}, kept in the column text_{taken.name}; {missing}"
    if each.ends is not None:
        low, high = each.ends
        between = "" if low is None else f" from {low:g} to {high:g}"
        return f"{words}, {attribute.values:,} buckets{between}; {missing}"
    new = "" if each.before is None else f", {attribute.values - each.before.values:,} of them new"
    frequent = ", ".join(f"{shorten(value['key'], 40)} ({value['count']:,})" for value in each.frequent[:FREQUENT])
    return f"{words}, {attribute.values:,} values{new}; {missing}; most frequent {frequent or 'none'}"


def _describe_problem(encoded: EncodedTable, attribute: int, problem: str, n: int, example: str | None) -> str:
    loaded = encoded.loaded
    option = loaded.table.option
    shown = f", such as {shorten(example, 60)!r}" if example else ""
    if problem == NO_KEY:
        return f"{option}: {n:,} rows have no {loaded.table.entity} and were left out"
    if attribute < 0:
        return f"{option}: {n:,} lines cannot be read ({problem}) and were left out{shown}"
    name = loaded.taken[attribute].name
    if problem == NO_NUMBER:
        return f"{option}: {n:,} values of {name} are no numbers and were left empty{shown}"
    return f"{option}: {n:,} values of {name} cannot be read ({problem}) and were left empty{shown}"


def _notes(encoded: EncodedTable, each: EncodedAttribute) -> list[str]:
    """What may be wrong about an attribute."""
    name, attribute, entity = each.taken.name, each.attribute, encoded.loaded.table.entity
    notes = []
    if each.left_out:
        notes.append(f"{each.left_out:,} values that --vocabulary lacks were left empty (--new_keys leave_out)")
    if attribute is None or not each.present:
        return notes
    values = [value["key"] for value in each.frequent]
    if attribute.kind == "number" and attribute.values == 1 and each.ends is not None:
        constant = f"always {each.ends[0]:g}" if each.ends[0] == each.ends[1] else "infinite or equal"
        notes.append(f"its numbers are {constant}, so there is one bucket, which tells nothing")
    if attribute.kind == "category" and each.used == 1 and each.present == encoded.total:
        notes.append(f"it is {shorten(values[0], 40)!r} for every {entity}, which tells nothing; leave it out")
    if attribute.kind == "category" and each.used >= DISGUISED * each.pairs and each.pairs >= FEWEST:
        numbers = all(DECIMAL.match(value) for value in values)
        meant = f"{name}:number for buckets" if numbers else f"{name}:text to keep it as a name"
        distinct = "one each" if each.most == 1 else f"all of one {entity} alone"
        notes.append(
            f"{each.used:,} values for {each.present:,} {entity}s, nearly {distinct}: an id in disguise, which tells "
            f"nothing of a new {entity}. Pass {meant}, or leave it out"
        )
    if each.taken.kind == "list" and each.taken.words in SINGLE and each.most == 1:
        separator = encoded.loaded.table.separator
        notes.append(
            f"no value holds the separator {shell_word(separator)}, so no list has more than one; name another with "
            "--attribute_separator"
        )
    may_be_lists = each.taken.kind == "category" and not all(map(MOMENT.match, values))
    seen = find_list_separator(values) if may_be_lists else None
    if seen is not None:
        example = next(value for value in values if find_list_separator([value]) is not None)
        notes.append(
            f"its values seem to be lists, such as {shorten(example, 40)!r}; to read them so, pass {name}:list "
            f"--attribute_separator {shell_word(seen)}"
        )
    return notes
