"""A small learnable dataset, and options of a training run that takes seconds, for checks and tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.config import AttributeChoice
from recgpt_torchrec.data.dataset import STARTS, Dataset, Manifest
from recgpt_torchrec.data.inputs.attributes import NO_VALUE, Attributes, Column, EntityAttributes
from recgpt_torchrec.data.inputs.choosing import choose_attributes
from recgpt_torchrec.data.inputs.records import DatasetAttribute
from recgpt_torchrec.data.inputs.spec import Entity, Inputs
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.split import HoldOut
from recgpt_torchrec.storage.folders import write_manifest
from recgpt_torchrec.storage.parts import write_parts

SMALL: dict[str, Any] = {
    "--model.dim": 8,
    "--model.max_len": 10,
    "--model.layers": 1,
    "--batch.tokens": 60,
    "--loss.negatives": 10,
    "--optimizer.warmup_steps": 5,
    "--train.epochs": 2,
}
"""Options of `pretrain` for a run of about 20 steps."""


def write_dataset(
    folder: Path | str,
    histories: Sequence[Sequence[int]],
    *,
    items: int | None = None,
    segments: Sequence[Sequence[int]] | None = None,
    more: dict[str, pa.Array] | None = None,
    hold_out: HoldOut = "last",
    starts: Sequence[tuple[int, int]] | None = None,
    rows_per_group: int = 8,
    groups_per_part: int = 2,
    vocabulary: str = "test",
    attributes: Sequence["SmallAttribute"] = (),
) -> Dataset:
    """Write a dataset with one user per history, user ids from 0 on, and open it.

    Args:
        folder: of the dataset; created if it does not exist.
        histories: item ids per user, oldest first.
        items: size of the catalogue; None: the largest id plus 1.
        segments: segment ids of the items, per user; None: no column of segments.
        more: further columns of the sequences.
        hold_out: what is held out.
        starts: indices of each user's first validation and test interaction, with `time` and `given`.
        rows_per_group, groups_per_part: layout of the Parquet parts.
        vocabulary: fingerprint of the vocabulary in the manifest.
        attributes: of users and items; their values lie in parts of `rows_per_group` x `groups_per_part` rows.
    """
    item_count = items if items is not None else max((max(h, default=-1) for h in histories), default=-1) + 1
    columns: dict[str, pa.Array] = {
        "user_id": pa.array(range(len(histories)), pa.int64()),
        "item_ids": pa.array([list(h) for h in histories], pa.list_(pa.int64())),
        "timestamps": pa.array([list(range(len(h))) for h in histories], pa.list_(pa.int64())),
    }
    if segments is not None:
        columns["segment_ids"] = pa.array([list(s) for s in segments], pa.list_(pa.int8()))
    if starts is not None:
        columns |= {name: pa.array(column, pa.int64()) for name, column in zip(STARTS, np.array(starts).T, strict=True)}
    table = pa.table(columns | (more or {}))
    groups = [table.slice(start, rows_per_group) for start in range(0, len(histories), rows_per_group)]
    all_ids = np.array([i for h in histories for i in h], dtype=np.int64)
    trained = [training_part(h) if starts is None else h[: starts[u][0]] for u, h in enumerate(histories)]
    training_ids = np.array([i for h in (histories if hold_out == "none" else trained) for i in h], dtype=np.int64)
    catalogue = pa.table(
        {
            "item_id": pa.array(range(item_count), pa.int64()),
            "key": [f"item {i}" for i in range(item_count)],
            "count": np.bincount(all_ids, minlength=item_count)[:item_count],
            "train_count": np.bincount(training_ids, minlength=item_count)[:item_count],
        }
    )
    users = pa.table({"user_id": columns["user_id"], "key": [f"user {u}" for u in range(len(histories))]})
    fs, root = pyarrow.fs.LocalFileSystem(), str(folder)
    for each in attributes:
        owner = users if each.described.entity == "user" else catalogue
        owner = owner.append_column(each.described.column, pa.array(each.lists, pa.list_(pa.int32())))
        users, catalogue = (owner, catalogue) if each.described.entity == "user" else (users, owner)

    def cut(rows: pa.Table) -> list[pa.Table]:
        if not attributes:
            return [rows]
        return [rows.slice(start, rows_per_group) for start in range(0, rows.num_rows, rows_per_group)]

    manifest = Manifest(
        users=len(histories),
        items=item_count,
        interactions=int(all_ids.size),
        vocabulary=vocabulary,
        hold_out=hold_out,
        sequences=write_parts(fs, root, "sequences", groups, groups_per_part),
        item_parts=write_parts(fs, root, "items", cut(catalogue), groups_per_part),
        user_parts=write_parts(fs, root, "users", cut(users), groups_per_part),
        attributes=[each.described for each in attributes],
    )
    write_manifest(fs, root, manifest.to_json())
    return Dataset.open(root)


@dataclass(frozen=True)
class SmallAttribute:
    """An attribute of a small dataset, and its values."""

    described: DatasetAttribute
    lists: list[list[int]]
    """Value ids of each user or item."""

    @classmethod
    def draw(
        cls, entity: Entity, name: str, rows: int, values: int, *, multiple: bool = False, seed: int = 0
    ) -> "SmallAttribute":
        """Draw values of `rows` users or items: none, one, or, if `multiple`, up to three, with repeats."""
        rng = np.random.default_rng((seed, values, *name.encode()))
        lists = [rng.integers(0, values, rng.integers(0, 4 if multiple else 2)).tolist() for _ in range(rows)]
        return cls.of(entity, name, lists, values, multiple=multiple)

    @classmethod
    def of(
        cls, entity: Entity, name: str, lists: list[list[int]], values: int, *, multiple: bool = True
    ) -> "SmallAttribute":
        """An attribute with given values."""
        fingerprint = f"{entity} {name} {values}"
        return cls(
            DatasetAttribute(
                entity=entity, name=name, kind="category", multiple=multiple, values=values, fingerprint=fingerprint
            ),
            lists,
        )

    @property
    def column(self) -> Column:
        """What an opened dataset has of it."""
        if self.described.multiple:
            rows = Ragged.from_lists(self.lists)
            return Column(rows.values.astype(np.int32), rows.offsets)
        return Column(np.array([ids[0] if ids else NO_VALUE for ids in self.lists], np.int32))


def opened(
    attributes: Sequence[SmallAttribute], untrained: Sequence[int] = (), **choice: Any
) -> tuple[Inputs, Attributes]:
    """What a model reads of these attributes, and their values, as if of a dataset.

    Args:
        attributes: all are read.
        untrained: items whose own rows are not trained.
        choice: see `AttributeChoice`.
    """
    manifest = Manifest(attributes=[each.described for each in attributes])
    inputs = Inputs(attributes=choose_attributes(AttributeChoice(**choice), Dataset(path="", manifest=manifest)))

    def of_entity(entity: Entity, trained: np.ndarray | None = None) -> EntityAttributes:
        columns = [each.column for each in attributes if each.described.entity == entity]
        return EntityAttributes(inputs.of_entity(entity), columns, trained)

    items = max((len(each.lists) for each in attributes if each.described.entity == "item"), default=0)
    trained = ~np.isin(np.arange(items), list(untrained))
    return inputs, Attributes(of_entity("user"), of_entity("item", trained if items else None))


def training_part(history: Sequence[int]) -> Sequence[int]:
    """Training part of a history, independent of the package's: all but the last two items, or all if fewer than 3."""
    return history[:-2] if len(history) >= 3 else history


def walks(users: int, items: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[list[int]]:
    """Draw learnable histories: an item is followed by one of the next two on a ring in about 9 of 10 cases."""
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(users):
        item = int(rng.integers(items))
        history = [item]
        for _ in range(int(rng.integers(shortest, longest + 1)) - 1):
            item = (item + int(rng.integers(1, 3))) % items if rng.random() < 0.9 else int(rng.integers(items))
            history.append(item)
        histories.append(history)
    return histories
