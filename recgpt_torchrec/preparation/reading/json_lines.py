"""Lines of JSON, one object per line."""

import json
from collections.abc import Callable
from typing import Any

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engine import quote_sql
from recgpt_torchrec.preparation.reading.dialect import first_lines, shorten
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.rows import BLANK
from recgpt_torchrec.preparation.reading.source import Column, Source, partition_column

LISTS = ("item", "time", "rating", "click")


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
        pointers = [f"{quote_sql(self._pointer(name))}" for name in self.wanted.values()]
        relation = (
            f"(SELECT line, object, object->>[{', '.join(pointers)}] AS members FROM "
            "(SELECT line, CASE WHEN json_type(value) = 'OBJECT' THEN value END AS object FROM "
            f"(SELECT line, TRY_CAST(line AS JSON) AS value FROM {line_source})))"
        )
        columns = {}
        for number, (role, name) in enumerate(self.wanted.items(), 1):
            if name in self.config.partition_columns:
                columns[role] = partition_column(self.file, name, [*self.keys()])
            else:
                columns[role] = self._column(role, name, f"members[{number}]")
        blank = f"WHEN trim(line) = '' OR line IS NULL THEN {quote_sql(BLANK)}"
        fault = f"CASE {blank} WHEN object IS NULL THEN 'malformed line' END"
        return Source(relation=relation, columns=columns, text="line", fault=fault)

    def find(self, name: str) -> Column:
        """The column of a name in `--where`; null where an object lacks the key."""
        if name in self.config.partition_columns:
            return partition_column(self.file, name, [*self.keys()])
        return Column(name=name, sql=f"object->>{quote_sql(self._pointer(name))}")

    def keys(self) -> dict[str, None]:
        """Keys of the first objects, in the order in which they occur."""
        return {key: None for value in self.objects for key in value}

    def _column(self, role: str, name: str, member: str) -> Column:
        pointer = quote_sql(self._pointer(name))
        values = [value for value in (_get(each, self._pointer(name)) for each in self.objects) if value is not None]
        inside = [element for value in values if isinstance(value, list) for element in value]
        if any(isinstance(value, dict) for value in values + inside):
            value = next(value for value in values + inside if isinstance(value, dict))
            key = next(iter(value), "KEY")
            raise InputError(
                f"{self.file.path}: {name!r} for the {role} is an object, such as {shorten(json.dumps(value), 60)}. "
                f"Name a value in it: --{role}_column '{name}.{key}'"
            )
        begins = f"{member}[1:1]"
        if inside and role in LISTS:
            array = f"TRY_CAST(object->{pointer} AS VARCHAR[])"
            sql = f"CASE WHEN {begins} = '[' THEN coalesce({array}, [{member}]) ELSE [{member}] END"
            return Column(name=name, sql=sql, kind="list", is_list=True)
        is_nested = f"{begins} IN ('[', '{{') AND json_type(object, {pointer}) IN ('ARRAY', 'OBJECT')"
        fault = f"CASE WHEN {is_nested} THEN 'list or object for the {role}' END"
        return Column(name=name, sql=member, kind=_kind(values), fault=fault)

    def _pointer(self, name: str) -> str:
        """The JSON pointer of a name."""
        parts = [name]
        if "." in name and not any(name in each for each in self.objects):
            nested = name.split(".")
            if any(_get(each, _join(nested)) is not None for each in self.objects):
                parts = nested
        return _join(parts)


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
