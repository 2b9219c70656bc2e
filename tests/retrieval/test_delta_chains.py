"""Chains of an export and its deltas: what does not fit together is refused, and little of one is held."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports import lookup
from recgpt_torchrec.retrieval.exports.applying import apply_deltas
from recgpt_torchrec.retrieval.exports.chain import open_chain
from recgpt_torchrec.retrieval.exports.reading import open_delta
from tests.retrieval.delta_helpers import (
    DIM,
    make_datasets,
    make_days,
    one_rank,
    small_groups,
    write_day,
)
from tests.support import change_json, overwrite, stage, walks, write_dataset


@pytest.fixture(autouse=True)
def groups() -> Iterator[None]:
    yield from small_groups()


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets, exports and deltas of three days, and an export of other vectors."""
    folder = tmp_path_factory.mktemp("chained")
    make_datasets(folder)
    one_rank(0, 1, str(folder), "float32", 1, 0.0)
    write_day(folder / "other", Dataset.open(str(folder / "data0")), make_days(seed=1)[0])
    return folder


def refused(capfd: pytest.CaptureFixture[str], folder: Path, words: str, **options: str) -> str:
    """What apply says to an export and deltas that do not fit; nothing may be written."""
    names = words.split()
    given = {"--export": folder / names[0], "--deltas": [folder / name for name in names[1:]]}
    output = folder / "refused"
    assert stage("apply", {**given, "--output": output, **options}) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and not output.exists()
    return said


def test_deltas_out_of_order_or_of_another_export_are_refused(chained: Path, capfd: Any) -> None:
    first, second = (open_delta(str(chained / name)) for name in ("delta1", "delta2"))
    said = refused(capfd, chained, "full0 delta2 delta1")
    assert f"delta2 changes the state {first.state[:12]}" in said and f"leads to {first.manifest.base[:12]}" in said
    assert f"Give {first.path} after it" in said
    said = refused(capfd, chained, "full0 delta2")
    assert f"No given delta changes that state; {second.path} was made with --since {chained / 'full0'}" in said
    assert "delta1 changes the state" in refused(capfd, chained, "other delta1")
    assert "delta1 changes the state" in refused(capfd, chained, "full0 delta1 delta1")


def test_the_other_kind_of_folder_is_refused_with_what_it_is(chained: Path, capfd: Any) -> None:
    said = refused(capfd, chained, "delta1 delta2")
    assert f"{chained / 'delta1'} is a delta, not an export: name the export that is whole after it" in said
    assert "which the stage apply writes from --export and --deltas" in said
    assert "full1 is an export, not a delta" in refused(capfd, chained, "full0 full1")
    options = {"--export": chained / "delta1", "--output": chained / "refused", "--k": 3}
    assert stage("retrieve", options) == 2
    assert "delta1 is a delta, not an export" in capfd.readouterr().err
    assert stage("apply", {"--export": chained / "full0", "--deltas": [], "--output": chained / "refused"}) == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "int8", "has dtype int8, but .*full0 has float32"),
        ("dim", 3, "has dim 3, but .*full0 has 4"),
        ("interests", 2, "has interests 2, but .*full0 has 1"),
        ("settings", {"history": "test"}, "has history test, but .*full0 has all"),
        ("base", "", "is damaged: it does not say which state it is applied to"),
        ("new_items", 99, "is damaged: it promises 99 new of 36 items, but"),
        ("tolerance", -1, "is damaged: tolerance is -1"),
        ("metric", "cosine", "is damaged: metric is 'cosine', it must be one of inner_product"),
        ("items", 35, "lead to 36 items, but .* promises 35|has a item_id outside 0 to 34"),
    ],
)
def test_a_delta_with_other_vectors_or_a_wrong_manifest_is_refused(
    chained: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    shutil.copytree(chained / "delta1", tmp_path / "delta")
    change_json(tmp_path / "delta/manifest.json", lambda manifest: manifest.update({field: value}))
    with pytest.raises(InputError, match=message):
        apply_deltas(str(tmp_path / "applied"), open_chain([str(chained / "full0"), str(tmp_path / "delta")]))
    assert not (tmp_path / "applied").exists()


@pytest.mark.parametrize("name", ["users", "items", "removed_users"])
def test_a_damaged_part_is_named_and_nothing_is_written(chained: Path, tmp_path: Path, name: str) -> None:
    for folder in ("full0", "delta1"):
        shutil.copytree(chained / folder, tmp_path / folder)
    part = max((tmp_path / "delta1" / name).iterdir())
    overwrite(part, slice(10, 60))
    chain = open_chain([str(tmp_path / "full0"), str(tmp_path / "delta1")])
    with pytest.raises(InputError, match=f"delta1: the part {name}/{part.name} .*run export again"):
        apply_deltas(str(tmp_path / "applied"), chain)
    with pytest.raises(InputError, match=f"the part {name}/{part.name}"):
        dataset = Dataset.open(str(chained / "data2"))
        write_day(tmp_path / "delta2", dataset, make_days()[2], [str(tmp_path / "full0"), str(tmp_path / "delta1")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta1", "full0"]


def test_a_delta_needs_ids_and_vectors_of_the_same_meaning(chained: Path, tmp_path: Path) -> None:
    chain = open_chain([str(chained / "full0")])
    with pytest.raises(InputError, match="full0 has dtype float32, but the delta would have int8"):
        chain.check_fits(Dataset.open(str(chained / "data1")), dtype="int8", interests=1)
    chain.check_fits(Dataset.open(str(chained / "data1")), dtype="float32", interests=1, dim=DIM, history="all")
    other = write_dataset(tmp_path / "data", walks(users=50, items=30), items=30, vocabulary="another")
    with pytest.raises(InputError, match="its ids mean other items .*Prepare the dataset with --vocabulary"):
        chain.check_fits(other)
    later = open_chain([str(chained / "full0"), str(chained / "delta1")])
    with pytest.raises(InputError, match="its ids mean other items"):
        later.check_fits(Dataset.open(str(chained / "data0")))  # the dataset of the day before


def test_a_chain_keeps_few_row_groups_whatever_it_looks_up(chained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = open_chain([str(chained / name) for name in ("full0", "delta1", "delta2")])
    ids = np.random.default_rng(0).permutation(36)
    largest = 0
    for first in range(0, 36, 4):
        chain.vectors_of("items", ids[first : first + 4])
        chain.vectors_of("users", ids[first : first + 4])
        held = [group.size for group in chain._cache._groups.values()]
        largest = max(largest, sum(held))
        assert sum(held) <= lookup.KEPT_BYTES + 2 * max(held)
    assert largest > lookup.KEPT_BYTES / 2
