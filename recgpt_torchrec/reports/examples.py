"""Example users of an evaluation in readable names: their histories, held-out items and lists."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.prepare import NONE
from recgpt_torchrec.config.reports.report import Report
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.reports.values import Example, Item
from recgpt_torchrec.retrieval.exports.keys import Keys
from recgpt_torchrec.serving.names import ItemNames
from recgpt_torchrec.storage import scratch_beside

MEMORY = "1GB"
"""Memory that reading a table of names takes before it spills to disk."""
SEGMENTS = {1: "generated", 2: "shown, not clicked", 3: "disliked", 4: "skipped"}
"""Words for segment ids other than that of interactions."""


class Labels:
    """Keys of a dataset's users and items, and names of items, for the ids that are asked for.

    Example: `Labels.read(dataset, items={3, 7}, users={0}).item(3)`
    """

    def __init__(self, items: dict[int, str], users: dict[int, str], names: dict[int, str]) -> None:
        self.items, self.users, self.names = items, users, names

    @classmethod
    def read(cls, dataset: Dataset | None, items: set[int], users: set[int]) -> "Labels":
        """Read those of some ids; None: there is no dataset, ids are shown.

        Raises:
            InputError: a part cannot be read.
        """
        if dataset is None:
            return cls({}, {}, {})
        of_items, of_users = (np.array(sorted(ids), np.int64) for ids in (items, users))
        return cls(
            dict(zip(of_items.tolist(), Keys(dataset, "items").of(of_items).to_pylist(), strict=True)),
            dict(zip(of_users.tolist(), Keys(dataset, "users").of(of_users).to_pylist(), strict=True)),
            {item: name for item, name in zip(of_items.tolist(), ItemNames(dataset).of(of_items), strict=True) if name},
        )

    def rename(self, by_key: Mapping[str, str]) -> "Labels":
        """The same with names of items by their keys."""
        names = {number: by_key[key] for number, key in self.items.items() if key in by_key}
        return Labels(self.items, self.users, names)

    def item(self, number: int, segment: int = 0) -> Item:
        """An item by its id, with what put it into a history."""
        return Item(
            key=self.items.get(number, f"id {number}"), name=self.names.get(number), prompt=SEGMENTS.get(segment)
        )

    def user(self, number: int) -> str:
        """A user by its id."""
        return self.users.get(number, f"id {number}")


def open_for_labels(path: str, vocabulary: str | None) -> Dataset | None:
    """The dataset at `path`; None: it is not there, or has other users and items than the evaluation."""
    try:
        dataset = Dataset.open(path)
    except InputError:
        return None
    return dataset if vocabulary is None or dataset.manifest.extends(vocabulary) else None


def make_examples(examples: Any, labels: Labels) -> list[Example]:
    """The examples of an evaluation's JSON with labels."""
    made = []
    for example in examples:
        segments = example.get("segments") or [0] * len(example["history"])
        made.append(
            Example(
                user=labels.user(example["user"]),
                history=[labels.item(*each) for each in zip(example["history"], segments, strict=True)],
                held_out=labels.item(example["held_out"]),
                lists={path: [labels.item(item) for item in items] for path, items in example["lists"].items()},
            )
        )
    return made


def ids_of(evaluations: Iterable[dict[str, Any]]) -> tuple[set[int], set[int]]:
    """The ids of items and of users in the examples of evaluations."""
    items: set[int] = set()
    users: set[int] = set()
    for values in evaluations:
        for example in values.get("examples", []):
            users.add(example["user"])
            items |= {
                example["held_out"],
                *example["history"],
                *(i for each in example["lists"].values() for i in each),
            }
    return items, users


def read_names(config: Report, path: str, keys: set[str]) -> dict[str, str]:
    """Names of items by their keys, from a table; only those of `keys` are kept.

    The table is read as a log whose items are the keys and whose users are the names, so compression, encodings and the
    spelling of keys are as everywhere.

    Raises:
        InputError: it cannot be read, or lacks a column.
    """
    from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
    from recgpt_torchrec.preparation.reading.duckdb_reader import open_file
    from recgpt_torchrec.preparation.reading.files import list_files
    from recgpt_torchrec.preparation.reading.loading import load_files

    reading = Prepare(
        input=[path],
        output=config.output,
        user_column=config.name_column,
        item_column=config.item_column,
        time_column=None,
        null_words=[],
        list_separator=NONE,
    )
    try:
        files = list_files([path], reading, "--names").files
        with DuckDBEngine(scratch_beside(config.output), MEMORY) as engine:
            load_files(engine, reading, files, [open_file(file, reading) for file in files], timed=False)
            rows = engine.connection.execute(
                'SELECT item, first("user") FROM log_rows WHERE item IN (SELECT unnest(?)) GROUP BY item', [[*keys]]
            ).fetchall()
    except InputError as error:
        raise InputError(f"--names {path}: {error}. Name its columns with --item_column and --name_column") from None
    return {str(key): str(name) for key, name in rows if name is not None}
