"""Compiles `--where`, a condition on the columns of a raw log, to SQL over the columns of a file.

Names mean columns by their exact spelling, and only expressions are allowed: no queries, so nothing but the row is
read. A row for which the condition cannot be computed does not meet it.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import sqlglot
from sqlglot import exp

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.reading.formats.source import Column

FORBIDDEN = (
    exp.Query,
    exp.AggFunc,
    exp.Window,
    exp.Placeholder,
    exp.Parameter,
    exp.Star,
    exp.Command,
    exp.DDL,
    exp.DML,
)
ARITHMETIC = (exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.Neg)
ORDERED = (exp.GT, exp.GTE, exp.LT, exp.LTE)
COMPARISONS = (exp.EQ, exp.NEQ, exp.Between, exp.In, *ORDERED)

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # its warnings would come beside our messages


def compile_where(expression: str, find: Callable[[str], Column]) -> str:
    """SQL of a condition; it is never an error for a row, but null where it cannot be computed.

    Text is compared with a number, or calculated with, as a number; true is 1 and false 0. Two columns of text are put
    in order as numbers where both are, else as text.

    Args:
        expression: condition in SQL.
        find: returns the column of a name, or raises an `InputError`.

    Raises:
        InputError: it is no condition, or holds more than columns, values, operators and functions.
    """
    try:
        condition: Any = sqlglot.condition(expression, dialect="duckdb").unnest()
    except (sqlglot.errors.SqlglotError, ValueError) as error:
        raise _refuse(expression, f"it cannot be read ({str(error).splitlines()[0]})") from None
    for node in condition.walk():
        if isinstance(node, FORBIDDEN):
            raise _refuse(expression, f"{node.sql(dialect='duckdb')!r} is no condition on a row")
    names = list(condition.find_all(exp.Column))
    if not names:
        raise _refuse(expression, "it names no column")
    columns = {id(node): find(".".join(part.name for part in node.parts)) for node in names}
    placed: dict[str, str] = {}

    def place(node: Any, sql: str) -> None:
        """Put a name in the place of a node, which stands for `sql`."""
        nonlocal condition
        name = f"recgpt where {len(placed)}"
        placed[f'"{name}"'] = sql
        replacement = exp.column(exp.to_identifier(name, quoted=True))
        if node is condition:
            condition = replacement
        else:
            node.replace(replacement)

    for node in [each for each in condition.find_all(*ORDERED)]:
        sides = [columns.get(id(side.unnest())) for side in (node.this, node.expression)]
        if all(side is not None and side.type.is_string() for side in sides):
            left, right = (side.sql for side in sides if side is not None)
            operator = {exp.GT: ">", exp.GTE: ">=", exp.LT: "<", exp.LTE: "<="}[type(node)]
            numbers = f"{_exact(left)} {operator} {_exact(right)}"
            place(node, f"coalesce({numbers}, ({left}) {operator} ({right}))")
    for node in list(condition.find_all(exp.Column)):
        if (column := columns.get(id(node))) is None:
            continue
        as_number = _find_use_as_number(node) if column.type.is_string() else None
        exact = {"exact": _exact(column.sql), "float": f"TRY_CAST({column.sql} AS DOUBLE)"}
        place(node, exact[as_number] if as_number else f"({column.sql})")
    sql = condition.sql(dialect="duckdb")
    for name, column_sql in placed.items():
        sql = sql.replace(name, column_sql)
    return f"TRY(({sql})::BOOLEAN)"


def _exact(sql: str) -> str:
    """Text as a number that keeps 29 digits before the point: whole numbers beyond 2^53 are told apart."""
    text = f"CASE lower({sql}) WHEN 'true' THEN '1' WHEN 'false' THEN '0' ELSE {sql} END"
    return f"TRY_CAST({text} AS DECIMAL(38, 9))"


def _find_use_as_number(node: Any) -> Literal["exact", "float"] | None:
    """Whether a column is compared with a number, or calculated with."""
    inner, parent = node, node.parent
    while isinstance(parent, exp.Paren):
        inner, parent = parent, parent.parent
    if isinstance(parent, ARITHMETIC):
        return "float"
    if isinstance(parent, COMPARISONS):
        others = [other for other in parent.iter_expressions() if other is not inner]
        return "exact" if any(_is_number(other) for other in others) else None
    return None


def _is_number(node: Any) -> bool:
    bare = node.unnest()
    return (isinstance(bare, exp.Literal) and not bare.is_string) or isinstance(bare, ARITHMETIC)


def _refuse(expression: str, reason: str) -> InputError:
    return InputError(
        f"--where {expression!r}: {reason}. Give an SQL condition on columns, such as \"event = 'buy' and price > 0\""
    )
