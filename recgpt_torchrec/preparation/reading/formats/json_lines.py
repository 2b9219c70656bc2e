"""Lines of JSON, one object per line."""

import json
from collections.abc import Callable
from typing import Any

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import quote_sql
from recgpt_torchrec.preparation.reading.dialect import first_lines, shorten
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.formats.lists import read_lists, repeat
from recgpt_torchrec.preparation.reading.formats.source import Column, Source, partition_column
from recgpt_torchrec.preparation.reading.rows import BLANK

LISTS = ("item", "time", "rating", "click", "event", "position")


class JsonLines:
    """The columns of one file of JSON lines.

    A name means a key; if there is no key `a.b`, the name `a.b` means the key b of the object a.
    """

    def __init__(self, file: InputFile, config: Prepare, wanted: dict[str, str]) -> None:
        self.file, self.config, self.wanted = file, config, wanted
        lines = first_lines(file, config.encoding)
        self.objects = [value for value in map(_parse, lines) if isinstance(value, dict)]
        is_one_damaged_line = len(lines) == 1 and lines[0].startswith('{"')
        if lines and not self.objects and not is_one_damaged_line:
            raise InputError(
                f"{file.path} is not JSON lines: its first line is {shorten(lines[0])!r}, {_explain(lines)}"
            )

    def source(self, line_source: str) -> Source:
        """The rows of the file, given SQL that reads its lines.

        Raises:
            InputError: a column holds objects.
        """
        pointers = [f"{quote_sql(self.pointer(name))}" for name in self.wanted.values()]
        relation = f"(SELECT line, object, object->>[{', '.join(pointers)}] AS members FROM {parse_lines(line_source)})"
        columns: dict[str, Column] = {}
        for number, (role, name) in enumerate(self.wanted.items(), 1):
            if name in self.config.partition_columns:
                columns[role] = partition_column(self.file, name, [*self.keys()])
            else:
                columns[role] = self._column(role, name, f"members[{number}]", columns.get("item"))
        items = [value for value in self._values(self.wanted["item"]) if isinstance(value, str)]
        columns = read_lists(self.file, self.config, columns, items)
        blank = f"WHEN trim(line) = '' OR line IS NULL THEN {quote_sql(BLANK)}"
        fault = f"CASE {blank} WHEN object IS NULL THEN 'malformed line' END"
        return Source(relation=relation, columns=columns, text="line", fault=fault)

    def find(self, name: str) -> Column:
        """The column of a name in `--where`; null where an object lacks the key."""
        if name in self.config.partition_columns:
            return partition_column(self.file, name, [*self.keys()])
        return Column(name=name, sql=f"object->>{quote_sql(self.pointer(name))}")

    def keys(self) -> dict[str, None]:
        """Keys of the first objects, in the order in which they occur."""
        return {key: None for value in self.objects for key in value}

    def _column(self, role: str, name: str, member: str, item: Column | None) -> Column:
        """A column; `item` is that of the items, for lists of the other columns."""
        if (parts := self._inside_list(name)) is not None and role in LISTS:
            path = ".".join(f'"{part}"' + "[*]" * (place == 0) for place, part in enumerate(parts))
            return Column(name=name, sql=f"object->>{quote_sql('$.' + path)}", kind="list", is_list=True)
        pointer, values = quote_sql(self.pointer(name)), self._values(name)
        inside = [element for value in values if isinstance(value, list) for element in value]
        if any(isinstance(value, dict) for value in values + inside):
            value = next(value for value in values + inside if isinstance(value, dict))
            key = next(iter(value), "KEY")
            raise InputError(
                f"{self.file.path}: {name!r} for the {role} is an object, such as {shorten(json.dumps(value), 60)}. "
                f"Name a value in it: --{role}_column '{name}.{key}'"
            )
        if any(isinstance(element, list) for element in inside):
            raise InputError(
                f"{self.file.path}: {name!r} for the {role} is a list of lists; write one list of values per user, or "
                "one object per interaction"
            )
        begins = f"{member}[1:1]"
        if role in LISTS and (inside or (item is not None and item.is_list)):
            array = f"TRY_CAST(object->{pointer} AS VARCHAR[])"
            single = f"[{member}]" if item is None else repeat(Column(name=name, sql=member), item)
            sql = f"CASE WHEN {begins} = '[' THEN coalesce({array}, [{member}]) ELSE {single} END"
            nested = f"len(list_filter({array}, lambda element: element[1:1] IN ('[', '{{'))) > 0"
            fault = f"CASE WHEN {nested} THEN 'list or object in the list for the {role}' END"
            return Column(name=name, sql=sql, kind="list", is_list=True, fault=fault)
        is_nested = f"{begins} IN ('[', '{{') AND json_type(object, {pointer}) IN ('ARRAY', 'OBJECT')"
        fault = f"CASE WHEN {is_nested} THEN 'list or object for the {role}' END"
        return Column(name=name, sql=member, kind=_kind(values), fault=fault)

    def _values(self, name: str) -> list[Any]:
        """The values of a column in the first objects, as far as there are any."""
        pointer = self.pointer(name)
        return [value for value in (_get(each, pointer) for each in self.objects) if value is not None]

    def _inside_list(self, name: str) -> list[str] | None:
        """The parts of a name `a.b` whose `a` is a list of objects; None: it is no such name."""
        parts = name.split(".")
        if len(parts) < 2 or any(name in each for each in self.objects):
            return None
        lists = [each[parts[0]] for each in self.objects if isinstance(each.get(parts[0]), list)]
        return parts if any(isinstance(element, dict) for elements in lists for element in elements) else None

    def pointer(self, name: str) -> str:
        """The JSON pointer of a name."""
        nested = name.split(".")
        is_nested = len(nested) > 1 and not any(name in each for each in self.objects)
        return _join(nested if is_nested and any(nested[0] in each for each in self.objects) else [name])


def parse_lines(line_source: str) -> str:
    """SQL of the columns `line` and `object` (JSON; null where the line is no object), given SQL that reads lines."""
    return (
        "(SELECT line, CASE WHEN json_type(value) = 'OBJECT' THEN value END AS object FROM "
        f"(SELECT line, TRY_CAST(line AS JSON) AS value FROM {line_source}))"
    )


def _join(parts: list[str]) -> str:
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


def _get(value: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _kind(values: list[Any]) -> str:
    words: dict[type, str] = {str: "text", int: "number", float: "number", bool: "boolean"}
    return " or ".join(sorted({words.get(type(value), "value") for value in values})) or "value"


def _explain(lines: list[str]) -> str:
    """What a file is whose lines are not objects of JSON."""
    first = lines[0].strip()
    if first.startswith("["):
        return "not an object (it begins like one JSON array; write one object per line: jq -c '.[]')"
    if first.startswith(("{'", "{u'")):
        return "a literal of Python, not JSON; write it with json.dumps(ast.literal_eval(line))"
    if first == "{":
        return "not a whole object; write one object per line: jq -c ."
    return "not an object"


def usable_keys(fetch: Callable[[str], Any], source: str) -> list[str]:
    """All keys of a file's objects; `fetch` runs a query that gives one row."""
    return sorted(
        fetch(f"SELECT list(DISTINCT key) FROM (SELECT unnest(json_keys(object)) AS key FROM {source})")[0] or []
    )
