"""The types of events of a log, such as view, cart and buy: their words, and the id of each."""

from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import Engine

MOST = 200
"""Maximum number of event types; a column with more is another one."""
UNKNOWN = 0
"""Id of an event without a type."""


@dataclass(frozen=True, kw_only=True)
class EventTypes:
    """The event types of a log; the n-th word has the id n + 1, and a row without one has the id 0."""

    words: list[str]
    """Those of the dataset that is extended keep their ids; the others follow by their number of rows, then by word."""
    counts: list[int]
    """Number of usable rows of each word."""
    unknown: int
    """Number of usable rows without a word."""

    def encode(self, words: Any) -> Any:
        """The ids of a column of words, int16."""
        cases = [(words == word, number) for number, word in enumerate(self.words, 1)]
        return ibis.cases(*cases, else_=UNKNOWN).cast("int16")

    def ids_of(self, option: str, words: list[str]) -> list[int]:
        """The ids of words that an option names.

        Raises:
            InputError: the log has no such event type.
        """
        if missing := [word for word in words if word not in self.words]:
            raise InputError(
                f"{option} {','.join(words)}: no row has the event type {' or '.join(map(repr, missing))}; the log has "
                f"{self}"
            )
        return [self.words.index(word) + 1 for word in words]

    def to_record(self) -> dict[str, Any]:
        """What the manifest records: rows by word, and rows without one."""
        return {"rows": dict(zip(self.words, self.counts, strict=True)), "unknown": self.unknown}

    def __str__(self) -> str:
        return ", ".join(f"{word} ({count:,})" for word, count in zip(self.words, self.counts, strict=True))


def find_event_types(engine: Engine, config: Prepare, usable: ir.Table, known: list[str]) -> EventTypes:
    """Count the words of `--event_column`.

    Args:
        engine: that holds the rows.
        config: of the stage.
        usable: the usable rows, with their word in `event`, or null.
        known: words of the dataset that is extended, which keep their ids.

    Raises:
        InputError: the column has no words, or so many that it does not hold event types.
    """
    option = f"--event_column {config.event_column}"
    by_word = usable.group_by("event").agg(n=usable.count())
    if (distinct := engine.count(by_word)) > MOST + 1:  # one of them may be none
        examples = engine.rows(by_word.order_by("event").limit(2))
        raise _explain_many(option, distinct, [row["event"] for row in examples])
    counts = {row["event"]: row["n"] for row in engine.rows(by_word)}
    unknown = counts.pop(None, 0)
    if not counts:
        raise InputError(f"{option}: it has no value in any of {unknown:,} usable rows; name the column of event types")
    new = sorted(counts.keys() - {*known}, key=lambda word: (-counts[word], word))
    words = [*known, *new]
    if len(words) > MOST:
        raise _explain_many(option, len(words), words[-2:])
    return EventTypes(words=words, counts=[counts.get(word, 0) for word in words], unknown=unknown)


def _explain_many(option: str, count: int, examples: list[str]) -> InputError:
    return InputError(
        f"{option}: it has {count:,} different values, such as {' and '.join(map(repr, examples))}, and there may be "
        f"{MOST} event types; name another column, or leave rows out with --where"
    )
