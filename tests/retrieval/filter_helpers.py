"""Shared by tests of filters and fallbacks: an export of known vectors without a model, and plain lists."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.retrieval.exports.writing import write_export
from tests.support import change_json, promise_of, stage, walks, write_dataset

ITEMS, USERS, DIM = 40, 30, 4
WALKS = walks(USERS, ITEMS)


def vectors(count: int, seed: int) -> np.ndarray:
    """[count, dim] small whole numbers: every order of sums gives the same score, and many scores are equal."""
    return np.random.default_rng(seed).integers(-2, 3, (count, DIM)).astype(np.float32)


ITEM_VECTORS, USER_VECTORS = vectors(ITEMS, 1), vectors(USERS, 2)


def make_export(
    folder: Path, histories: Sequence[Sequence[int]] = WALKS, absent: Collection[int] = (), history: str = "all"
) -> tuple[Path, Path]:
    """Write a dataset and an export of all its items, and of its users but the absent ones."""
    dataset = write_dataset(folder / "data", histories, items=ITEMS, vocabulary="v")
    users = np.array([user for user in range(len(histories)) if user not in absent])
    write_export(
        str(folder / "vectors"),
        Dataset.open(dataset.path),
        items=iter([(np.arange(ITEMS), ITEM_VECTORS)]),
        users=iter([(users, USER_VECTORS[users])]),
        dim=DIM,
        interests=1,
        everyone=False,
        checkpoint="",
        checkpoint_fingerprint="",
        settings={"history": history},
    )
    (part,) = (folder / "vectors" / "users").iterdir()
    pq.write_table(pq.read_table(part), part, row_group_size=4)  # so that every rank has some

    def record_bytes(manifest: dict[str, Any]) -> None:
        manifest["user_parts"][0].update(promise_of(part))

    change_json(folder / "vectors" / "manifest.json", record_bytes)
    return folder / "data", folder / "vectors"


def plain_list(user: int, k: int, allowed: Collection[int], seen: Collection[int] = ()) -> list[int]:
    """The k best allowed items that were not seen, by sorting everything; of equal scores the smaller id first."""
    scores = ITEM_VECTORS @ USER_VECTORS[user]
    order = sorted(range(ITEMS), key=lambda item: (-scores[item], item))
    return [item for item in order if item in allowed and item not in seen][:k]


def retrieve(folder: Path, output: Path, status: int = 0, **options: Any) -> dict[int, list[int]]:
    """Run the stage on `make_export`'s folders, and read the lists it wrote."""
    given = {"--export": folder / "vectors", "--output": output, "--k": 5}
    given |= {f"--{name}": value for name, value in options.items()}
    assert stage("retrieve", given) == status
    if status:
        return {}
    table = pq.read_table(output / "lists")
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))
