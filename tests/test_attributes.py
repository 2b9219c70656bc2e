"""Stages on a dataset with attributes: what is trained, exported, tuned, resumed and trained further."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.records import ValueVocabulary
from tests.support import SMALL, SmallAttribute, stage, walks, write_dataset
from tests.test_pretrain import checkpoints, tensors

USERS, ITEMS, KNOWN = 60, 40, 34
"""The last items are in no history."""
HISTORIES = walks(USERS, KNOWN, seed=1)
BRAND = SmallAttribute.draw("item", "brand", ITEMS, 5)
TAGS = SmallAttribute.draw("item", "tags", ITEMS, 7, multiple=True)
COUNTRY = SmallAttribute.draw("user", "country", USERS, 4)
OPTIONS = {**SMALL, "--saving.every_steps": 4, "--saving.keep": 100}
WEIGHTED = {"--attributes.weights": ["tags=0.5"], "--attributes.id_dropout": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("attributes")
    write_dataset(folder / "data", HISTORIES, items=ITEMS, attributes=[BRAND, TAGS, COUNTRY])
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **OPTIONS, **WEIGHTED}) == 0
    return folder


def tables(checkpoint: Path) -> dict[str, np.ndarray]:
    """The tables of a checkpoint by name, and `NAME.sum`, their moments."""
    found = {}
    for name, value in tensors(checkpoint).items():
        if "embedding_bags" in name:
            table, _, rest = name.split("embedding_bags.")[1].partition(".")
            found[table if name.startswith("model.") else f"{table}.{rest.rpartition('.')[2]}"] = value.numpy()
    return found


def best(run: Path) -> Path:
    return run / "checkpoints" / json.loads((run / "best.json").read_text())["checkpoint"]


def item_vectors(found: dict[str, np.ndarray], dataset: Dataset, table: str = "item") -> np.ndarray:
    """The dense reference: the id's row where the item was trained, and the weighted means of the attributes'."""
    counts = [row["train_count"] for part in dataset.manifest.item_parts for row in read(dataset, part)]
    vectors = found[table] * (np.array(counts) > 0)[:, None]
    for attribute, weight in ((BRAND, 1.0), (TAGS, 0.5)):
        values = found[attribute.described.table]
        for item, ids in enumerate(attribute.lists):
            if ids:
                vectors[item] += weight * values[ids].mean(0)
    return vectors


def read(dataset: Dataset, part: Any) -> list[dict[str, Any]]:
    return pq.read_table(f"{dataset.path}/{part.path}").to_pylist()


def exported_items(folder: Path) -> np.ndarray:
    table = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "items").glob("*.parquet"))])
    return np.array(table.sort_by("item_id")["vector"].to_pylist(), np.float32)


def test_exported_vectors_are_the_sums_of_the_tables_rows(folder):
    assert stage("export", {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / "x"}) == 0
    found, dataset = tables(best(folder / "run")), Dataset.open(str(folder / "data"))
    np.testing.assert_allclose(exported_items(folder / "x"), item_vectors(found, dataset), rtol=1e-5, atol=1e-6)
    for attribute in (BRAND, TAGS, COUNTRY):
        used = sorted({value for values in attribute.lists for value in values})
        assert np.abs(found[attribute.described.table][used]).max(1).min() > 0


def test_rows_of_ids_that_are_never_trained_stay_as_they_were(folder):
    """Also where an item without targets is drawn as a negative: its own vector is no part of it, then or later."""
    first, last = (tables(checkpoints(folder / "run")[place]) for place in (0, -1))
    np.testing.assert_array_equal(first["item"][KNOWN:], last["item"][KNOWN:])
    assert not last["item.sum"][KNOWN:].any() and last["item.sum"][:KNOWN].all()


def test_a_tuned_model_keeps_the_attributes_in_both_tables(folder, tmp_path):
    given = {"--data": folder / "data", "--checkpoint": folder / "run"}
    assert stage("generate_prompts", {**given, "--output": tmp_path / "prompts", "--prompts.k": 1}) == 0
    tuned = {"--data": tmp_path / "prompts", "--checkpoint": folder / "run", "--output": tmp_path / "tuned"}
    small = {name: value for name, value in SMALL.items() if not name.startswith("--model.")}
    assert stage("prompt_tune", {**tuned, **small, "--train.epochs": 1}) == 0
    data = {"--data": tmp_path / "prompts", "--checkpoint": tmp_path / "tuned"}
    assert stage("export", {**data, "--output": tmp_path / "x"}) == 0
    assert stage("evaluate", {**data, "--output": tmp_path / "e.json"}) == 0
    found, dataset = tables(best(tmp_path / "tuned")), Dataset.open(str(tmp_path / "prompts"))
    assert np.abs(found["output"] - found["item"]).max() > 0
    expected = item_vectors(found, dataset, "output")
    np.testing.assert_allclose(exported_items(tmp_path / "x"), expected, rtol=1e-5, atol=1e-6)


def test_tuning_the_output_table_alone_leaves_the_attributes_as_they_were(folder, tmp_path):
    given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": tmp_path / "tuned"}
    small = {name: value for name, value in SMALL.items() if not name.startswith("--model.")}
    options = {**given, **small, "--train.epochs": 1, "--tuning.prompts": "false"}
    assert stage("prompt_tune", {**options, "--tuning.trained": "[output,users]"}) == 0
    before, after = (tables(best(run)) for run in (folder / "run", tmp_path / "tuned"))
    assert np.abs(after["output"] - before["item"]).max() > 0
    for name in ("item", "item-brand", "item-tags"):
        np.testing.assert_array_equal(after[name], before[name])
    assert np.abs(after["user-country"] - before["user-country"]).max() > 0


def test_a_stopped_run_resumes_exactly(folder, tmp_path):
    stopped = checkpoints(folder / "run")[0]
    shutil.copytree(stopped, tmp_path / "run/checkpoints" / stopped.name)
    shutil.copy(folder / "run/run.json", tmp_path / "run")
    options = {"--data": folder / "data", "--output": tmp_path / "run", **OPTIONS, **WEIGHTED}
    assert stage("pretrain", options) == 0
    mine, theirs = (tensors(checkpoints(run)[-1]) for run in (tmp_path / "run", folder / "run"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--attributes.use": ["brand", "country"], "--attributes.weights": None}, "--attributes.use"),
        ({"--attributes.weights": ["tags=2"]}, "--attributes.weights"),
        ({"--attributes.pooling": "sum"}, "--attributes.pooling"),
        ({"--attributes.id_dropout": 0.2}, "--attributes.id_dropout"),
    ],
)
def test_a_run_is_not_resumed_with_other_attributes(folder, capsys, options, message):
    given = {"--data": folder / "data", "--output": folder / "run", **OPTIONS, **WEIGHTED, **options}
    assert stage("pretrain", given) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_values(folder, tmp_path, capsys):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    other = SmallAttribute(BRAND.described, BRAND.lists[::-1])
    write_dataset(tmp_path / "data", HISTORIES, items=ITEMS, attributes=[other, TAGS, COUNTRY])
    options = {"--data": tmp_path / "data", "--output": tmp_path / "run", **OPTIONS, **WEIGHTED}
    assert stage("pretrain", options) == 2
    assert "holds a run on other histories or attributes" in capsys.readouterr().err


def grown_dataset(folder: Path, *, colour: bool = True, lineage: bool = True) -> list[SmallAttribute]:
    """The same users and items, with more brands, one more attribute, and tags as before."""
    described = BRAND.described
    earlier = ValueVocabulary(fingerprint=described.fingerprint, values=described.values)
    described = replace(described, values=8, fingerprint="more brands", lineage=[earlier] if lineage else [])
    lists = [[7] if item % 3 == 0 else ids for item, ids in enumerate(BRAND.lists)]
    more = [SmallAttribute.draw("item", "colour", ITEMS, 3)] if colour else []
    attributes = [SmallAttribute(described, lists), TAGS, COUNTRY, *more]
    write_dataset(folder, HISTORIES, items=ITEMS, attributes=attributes)
    return attributes


def test_a_run_that_starts_from_another_one_has_its_rows_and_new_ones_at_0(folder, tmp_path, capsys):
    grown_dataset(tmp_path / "data")
    still = {"--tables.lr": 0, "--tables.user_lr": 0, "--optimizer.lr": 0, "--train.epochs": 1}
    options = {"--data": tmp_path / "data", "--initial": folder / "run", "--output": tmp_path / "run"}
    assert stage("pretrain", {**options, **OPTIONS, **WEIGHTED, **still}) == 0
    out = capsys.readouterr()
    assert "item.brand: 3 new values" in out.out + out.err and "item.colour: new, starts at 0" in out.out + out.err
    before, after = tables(best(folder / "run")), tables(checkpoints(tmp_path / "run")[0])
    for name in ("item", "user", "item-tags", "user-country"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(after["item-brand"][:5], before["item-brand"])
    assert after["item-brand"].shape == (8, 8) and not after["item-brand"][5:].any()
    assert after["item-colour"].shape == (3, 8) and not after["item-colour"].any()
    assert (after["item-brand.sum"][:5] >= before["item-brand.sum"]).all() and before["item-brand.sum"].any()
    # And it trains them.
    trained = {**options, "--output": tmp_path / "trained", **OPTIONS, **WEIGHTED}
    assert stage("pretrain", trained) == 0
    last = tables(checkpoints(tmp_path / "trained")[-1])
    assert last["item-brand"][7].any() and last["item-colour"].any() and not last["item-brand"][5:7].any()


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"lineage": False}, {}, "item.brand, whose values have other ids"),
        ({}, {"--attributes.use": ["brand", "tags"]}, "user.country, which --attributes.use leaves out"),
        ({}, {"--attributes.weights": None}, "item.tags with the weight 0.5, not 1; give the same one"),
        ({}, {"--attributes.pooling": "sum"}, "as the mean of its values; give --attributes.pooling mean"),
    ],
)
def test_a_run_does_not_start_from_one_that_reads_other_attributes(folder, tmp_path, capsys, more, options, message):
    grown_dataset(tmp_path / "data", **more)
    given = {"--data": tmp_path / "data", "--initial": folder / "run", "--output": tmp_path / "run"}
    assert stage("pretrain", {**given, **OPTIONS, **WEIGHTED, **options}) == 2
    error = capsys.readouterr().err
    assert message in error and str(best(folder / "run")) in error
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_lacks_an_attribute_is_refused(folder, tmp_path, capsys):
    write_dataset(tmp_path / "data", HISTORIES, items=ITEMS, attributes=[BRAND, COUNTRY])
    given = {"--data": tmp_path / "data", "--initial": folder / "run", "--output": tmp_path / "run"}
    assert stage("pretrain", {**given, **OPTIONS}) == 2
    assert "reads the attribute item.tags, and" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "export", "generate_prompts"])
def test_stages_refuse_values_that_a_checkpoint_does_not_know(folder, tmp_path, capsys, name):
    grown_dataset(tmp_path / "data", colour=False)
    given = {"--data": tmp_path / "data", "--checkpoint": folder / "run", "--output": tmp_path / "out"}
    assert stage(name, given) == 2
    error = capsys.readouterr().err
    assert "item.brand and has no vectors for 3 values" in error and "--initial" in error


def test_a_run_without_attributes_is_as_before_they_existed(folder, tmp_path):
    """Bit for bit, whether the dataset has none or they are not used."""
    write_dataset(tmp_path / "data", HISTORIES, items=ITEMS)
    plain = {"--data": tmp_path / "data", "--output": tmp_path / "run", **SMALL}
    unused = {"--data": folder / "data", "--output": tmp_path / "other", **SMALL, "--attributes.use": "[]"}
    assert stage("pretrain", plain) == stage("pretrain", unused) == 0
    mine, theirs = (tensors(checkpoints(tmp_path / run)[-1]) for run in ("run", "other"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    metadata = [
        json.loads((checkpoints(tmp_path / run)[-1] / "checkpoint.json").read_text()) for run in ("run", "other")
    ]
    assert all("inputs" not in each for each in metadata)


def test_the_header_says_which_attributes_are_read(folder, tmp_path, capsys):
    options = {"--data": folder / "data", "--output": tmp_path / "run", **SMALL, "--attributes.use": ["brand"]}
    assert stage("pretrain", {**options, "--train.steps": 1}) == 0
    out = capsys.readouterr()
    line = next(line for line in (out.out + out.err).splitlines() if "attributes" in line)
    assert "item.brand (5 values)" in line and "not read: item.tags, user.country" in line
