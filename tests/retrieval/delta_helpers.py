"""Exports and deltas of three days: what the vectors are, and how they are written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.retrieval.exports import lookup, share
from recgpt_torchrec.retrieval.exports.chain import open_chain
from recgpt_torchrec.retrieval.exports.reading import Delta, Export
from recgpt_torchrec.retrieval.exports.writing import write_delta, write_export
from tests.support import change_json, walks, write_dataset

DIM = 4
SOURCE: dict[str, Any] = {"checkpoint": "run", "checkpoint_fingerprint": "f", "settings": {"history": "all"}}


class Day(NamedTuple):
    """What the model knows after a day: vectors by id."""

    items: dict[int, np.ndarray]
    users: dict[int, np.ndarray]


def make_days(interests: int = 1, seed: int = 0) -> list[Day]:
    """Three days: 30, 36 and 36 items, 50, 60 and 60 users. Some move, by much or little; some users go and return."""
    rng = np.random.default_rng(seed)
    shape = (DIM,) if interests == 1 else (interests, DIM)

    def draw(count: int, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
        return dict(enumerate(rng.normal(size=(count, *shape)).astype(np.float32)))

    def move(vectors: dict[int, np.ndarray], count: int, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
        moved = {id: v * np.float32(rng.choice([1, 1, 1.003, 1.5])) for id, v in vectors.items()}
        return {**draw(count, shape), **moved}

    days = [Day(draw(30, (DIM,)), draw(50, shape))]
    days.append(Day(move(days[0].items, 36, (DIM,)), move(days[0].users, 60, shape)))
    days.append(Day(move(days[1].items, 36, (DIM,)), move(days[1].users, 60, shape)))
    for gone in (3, 17, 18, 49, 55):
        del days[1].users[gone]
    for gone in (0, 17, 59):
        del days[2].users[gone]
    return days


def make_datasets(folder: Path) -> list[Dataset]:
    """The datasets of the days: each extends the one before, and the last two have one vocabulary."""
    lineage = [{"fingerprint": "v0", "users": 50, "items": 30}]
    sizes = ((30, 50, "v0"), (36, 60, "v1"), (36, 60, "v1"))
    for day, (items, users, vocabulary) in enumerate(sizes):
        write_dataset(folder / f"data{day}", walks(users=users, items=items), items=items, vocabulary=vocabulary)
        if day:
            change_json(folder / f"data{day}/manifest.json", lambda values: values.update(lineage=lineage))
    return [Dataset.open(str(folder / f"data{day}")) for day in range(3)]


def batches(vectors: dict[int, np.ndarray], rank: int, world_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This process's share, in batches of 7; like those of a model, collective where there are several processes."""
    ids = np.array(list(vectors))
    shape = vectors[ids[0]].shape
    for first in range(0, len(ids), 7 * world_size):
        if world_size > 1:
            dist.all_reduce(torch.ones(1))
        some = ids[first + rank : first + 7 * world_size : world_size]
        yield some, np.array([vectors[id] for id in some], np.float32).reshape(-1, *shape)


def write_day(
    path: Path,
    dataset: Dataset,
    day: Day,
    since: list[str] | None = None,
    tolerance: float = 0.0,
    dtype: str = "float32",
    rank: int = 0,
    world_size: int = 1,
) -> Any:
    """Write a day's export, or its delta."""
    own: dict[str, Any] = {"items": batches(day.items, rank, world_size), "users": batches(day.users, rank, world_size)}
    everyone = len(day.users) == dataset.manifest.users
    if since is not None:
        return write_delta(str(path), dataset, open_chain(since), tolerance, **own, everyone=everyone, **SOURCE)
    interests = next(iter(day.users.values())).size // DIM
    shape: dict[str, Any] = {"dim": DIM, "interests": interests, "dtype": dtype}
    return write_export(str(path), dataset, **own, **shape, everyone=everyone, **SOURCE)


def rows_of(folder: Export | Delta) -> dict[str, dict[int, dict[str, Any]]]:
    """Every row by kind and id, as stored."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for kind, batches in (("items", folder.items()), ("users", folder.users())):
        rows = [row for batch in batches for row in batch.to_pylist()]
        found[kind] = {row[f"{kind[:-1]}_id"]: row for row in rows}
        assert len(found[kind]) == len(rows)
    return found


def small_groups() -> Iterator[None]:
    """Row groups of five vectors, and a lookup that keeps about two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share, "GROUP_BYTES", 4 * DIM * 5)
        patch.setattr(share, "GROUPS_PER_PART", 3)
        patch.setattr(lookup, "KEPT_BYTES", 2 * 5 * (8 + 4 * DIM))
        yield


def one_rank(rank: int, world_size: int, folder: str, dtype: str, interests: int, tolerance: float) -> None:
    """Write the exports of all days, and their deltas, on some ranks."""
    here = Path(folder)
    for _ in small_groups():
        since = [str(here / "full0")]
        for number, day in enumerate(make_days(interests)):
            dataset = Dataset.open(str(here / f"data{number}"))
            own: dict[str, Any] = {"rank": rank, "world_size": world_size}
            write_day(here / f"full{number}", dataset, day, dtype=dtype, **own)
            if number:
                write_day(here / f"delta{number}", dataset, day, since, tolerance, **own)
                since.append(str(here / f"delta{number}"))
