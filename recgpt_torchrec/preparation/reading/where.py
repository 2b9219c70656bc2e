"""Compiles `--where`, a condition on the columns of a raw log, to SQL over the columns of a file.

Names mean columns by their exact spelling, and only expressions are allowed: no queries, so nothing but the row is
read. A row for which the condition cannot be computed does not meet it.
"""

from collections.abc import Callable
from typing import Any

import sqlglot
from sqlglot import exp

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.reading.source import Column

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
COMPARISONS = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Between, exp.In)


def compile_where(expression: str, find: Callable[[str], Column]) -> str:
    """SQL of a condition; it is never an error for a row, but null where it cannot be computed.

    Args:
        expression: condition in SQL.
        find: returns the column of a name, or raises an `InputError`.

    Raises:
        InputError: it is no condition, or holds more than columns, values, operators and functions.
    """
    try:
        condition = sqlglot.condition(expression, dialect="duckdb").unnest()
    except (sqlglot.errors.SqlglotError, ValueError) as error:
        raise _refuse(expression, f"it cannot be read ({str(error).splitlines()[0]})") from None
    for node in condition.walk():
        if isinstance(node, FORBIDDEN):
            raise _refuse(expression, f"{node.sql(dialect='duckdb')!r} is no condition on a row")
    columns: dict[str, str] = {}
    for number, node in enumerate(list(condition.find_all(exp.Column))):
        column = find(".".join(part.name for part in node.parts))
        name = f"recgpt where {number}"
        as_number = column.type.is_string() and _is_compared_with_number(node)
        columns[f'"{name}"'] = f"TRY_CAST({column.sql} AS DOUBLE)" if as_number else f"({column.sql})"
        replacement = exp.column(exp.to_identifier(name, quoted=True))
        if node is condition:
            condition = replacement
        else:
            node.replace(replacement)
    if not columns:
        raise _refuse(expression, "it names no column")
    sql = condition.sql(dialect="duckdb")
    for name, column_sql in columns.items():
        sql = sql.replace(name, column_sql)
    return f"TRY(({sql})::BOOLEAN)"


def _is_compared_with_number(node: Any) -> bool:
    inner, parent = node, node.parent
    while isinstance(parent, exp.Paren):
        inner, parent = parent, parent.parent
    if isinstance(parent, ARITHMETIC):
        return True
    if not isinstance(parent, COMPARISONS):
        return False
    return any(_is_number(other) for other in parent.iter_expressions() if other is not inner)


def _is_number(node: Any) -> bool:
    bare = node.unnest()
    return (isinstance(bare, exp.Literal) and not bare.is_string) or isinstance(bare, ARITHMETIC)


def _refuse(expression: str, reason: str) -> InputError:
    return InputError(
        f"--where {expression!r}: {reason}. Give an SQL condition on columns, such as \"event = 'buy' and price > 0\""
    )
