"""`export --interests` and `retrieve` from the command line: the lists are those of evaluate's recall paths."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec import export, retrieve
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.config import Batch, Export, Retrieve, Sharding
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from tests.support import SMALL, change_json, stage, stay_in_group, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS, INTERESTS = 60, 30, 4
WALKS = walks(USERS, ITEMS, shortest=2, longest=14)  # a few have nothing held out
HELD_OUT = [u for u in range(USERS) if len(WALKS[u]) >= 3]
LOSS = {"--loss.candidates": "all", "--batch.tokens": 60, "--train.epochs": 2, "--optimizer.warmup_steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A dataset, a model pre-trained on it, its prompts, and a model tuned on those."""
    folder = tmp_path_factory.mktemp("retrieve")
    write_dataset(folder / "data", WALKS, items=ITEMS)
    training = {**SMALL, "--model.max_len": 8, **LOSS}
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **training}) == 0
    options = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / "prompts"}
    assert stage("generate_prompts", {**options, "--prompts.k": 1}) == 0
    options = {"--data": folder / "prompts", "--checkpoint": folder / "run", "--output": folder / "tuned"}
    assert stage("prompt_tune", {**options, **LOSS}) == 0
    return folder


CASES = {"run": "data", "tuned": "prompts"}
"""Which dataset each checkpoint reads."""


@pytest.fixture(scope="module", params=CASES)
def exported(made, request) -> tuple[Path, str, Path]:
    """Checkpoint, dataset and an export of four interests, before the test item."""
    checkpoint, data = request.param, CASES[request.param]
    output = made / f"vectors-{checkpoint}"
    assert stage("export", options_of(made, checkpoint, output)) == 0
    return made / checkpoint, str(made / data), output


def options_of(made: Path, checkpoint: str, output: Path, **more: Any) -> dict[str, Any]:
    """Options of an export before the test item."""
    given: dict[str, Any] = {"--data": made / CASES[checkpoint], "--checkpoint": made / checkpoint, "--output": output}
    given |= {"--history": "test", "--interests": INTERESTS}
    return given | {f"--{name}": value for name, value in more.items()}


def vectors_by_user(export: Any) -> dict[int, np.ndarray]:
    """The vectors of each user of an export."""
    return {
        user: vectors
        for batch in export.users()
        for user, vectors in zip(batch["user_id"].to_pylist(), vectors_of(batch), strict=True)
    }


def pretrained(made: Path) -> Path:
    """The export of the pre-trained model."""
    exported = made / "vectors-run"
    if not exported.exists():
        assert stage("export", options_of(made, "run", exported)) == 0
    return exported


def lists(exported: Path, output: Path, **options: Any) -> dict[int, list[int]]:
    """Run retrieve, and read what it wrote."""
    given = {"--export": exported, "--output": output} | {f"--{name}": value for name, value in options.items()}
    assert stage("retrieve", given) == 0
    table = pq.read_table(output / "lists")
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


def plain_lists(export: Path, k: int) -> dict[str, dict[int, list[int]]]:
    """The lists of evaluate's recall paths, for every user, by plain loops over the vectors of an export."""
    items = open_export(str(export)).item_vectors()[1].astype(np.float64)
    merged: dict[str, dict[int, list[int]]] = {"score": {}, "quota": {}, "two_step": {}}
    quotas_of = {"quota": [k // INTERESTS + (i < k % INTERESTS) for i in range(INTERESTS)], "two_step": [k - 3, 3]}
    for user, vectors in vectors_by_user(open_export(str(export))).items():
        scores = vectors.astype(np.float64) @ items.T
        scores[:, WALKS[user][:-1]] = -np.inf
        ranked = [np.argsort(-row)[: np.isfinite(row).sum()].tolist() for row in scores]
        shares = np.zeros_like(scores)
        for row, share, order in zip(scores, shares, ranked, strict=True):
            share[order[:k]] = np.exp(row[order[:k]]) / np.exp(row[order[:k]]).sum()
        merged["score"][user] = [item for item in np.argsort(-shares.max(0)).tolist() if shares[:, item].any()][:k]
        for name, quotas in quotas_of.items():
            taken: list[int] = []
            for row, quota in zip(ranked, quotas, strict=False):
                taken += [item for item in row if item not in taken][:quota]
            merged[name][user] = taken
    return merged


def encoded(rank: int, world_size: int, checkpoint: str, data: str, k: int) -> dict[str, list[list[int]]]:
    """The same, by what evaluate itself runs."""
    from recgpt_torchrec.checkpoints.folder import find_checkpoint
    from recgpt_torchrec.evaluation.recall_paths import RecallPaths
    from recgpt_torchrec.retrieval.encoding import encode
    from recgpt_torchrec.retrieval.interests import predict_interests, recall_items
    from recgpt_torchrec.retrieval.merging import Lists, even_quotas, merge_by_score, merge_quota
    from recgpt_torchrec.training.loading import load

    device, dataset, batch = torch.device("cpu"), Dataset.open(data), Batch(tokens=60)
    trained = load(find_checkpoint(checkpoint), dataset, Sharding(), bags=batch.tokens, device=device)
    paths = RecallPaths(trained, dataset, batch, device)
    stream = paths._encoding_stream("test", grows=INTERESTS - 1)
    rows: dict[str, list[list[int]]] = {"score": [], "quota": [], "two_step": [], "users": []}
    for histories, first in encode(trained.model, stream, device):
        vectors = predict_interests(trained.model, stream.maker, [(histories, first)], paths.catalogue, INTERESTS)
        found = recall_items(vectors, paths.catalogue, k, histories.seen)
        rows["users"] += [[int(u)] for u in histories.users]
        rows["score"] += merge_by_score(found, k).items.tolist()
        rows["quota"] += merge_quota(found, even_quotas(k, INTERESTS)).items.tolist()
        rows["two_step"] += merge_quota(Lists(*(part[:, :2] for part in found)), (k - 3, 3)).items.tolist()
    return rows


def test_the_lists_are_those_of_evaluates_recall_paths(exported, tmp_path):
    """Item by item and in order, for every user, with the history left out; and so are the figures."""
    checkpoint, data, vectors = exported
    (rows,) = run_ranks(encoded, 1, str(checkpoint), data, 10)
    users = [user for (user,) in rows["users"]]
    plain = plain_lists(vectors, 10)
    measured = tmp_path / "test.json"
    options = {"--data": data, "--checkpoint": checkpoint, "--output": measured, "--baselines": "false"}
    assert stage("evaluate", {**options, "--recall.m": 7, "--recall.interests": INTERESTS}) == 0
    results = json.loads(measured.read_text())["results"]
    one, two = ("recgpt_1", "recgpt") if checkpoint.name == "tuned" else ("pretrain", "pretrain_two_step")
    paths = {"score": f"{one}_interests_4_score", "quota": f"{one}_interests_4_quota", "two_step": two}
    for merge, path in paths.items():
        output = tmp_path / merge
        found = lists(vectors, output, k=10, merge=merge, data=data, **({"m": 7} if merge == "two_step" else {}))
        assert sorted(found) == HELD_OUT
        assert found == dict(zip(users, rows[merge], strict=True)), merge
        assert found == plain[merge], merge
        hits = json.loads((output / "manifest.json").read_text())["measured"]["hits"]
        assert hits == {name: pytest.approx(results[path]["masked"][name]) for name in ("HR@10", "NDCG@10")}, merge


def test_interest_0_is_the_ordinary_vector(exported, made, tmp_path):
    checkpoint, _, several = exported
    assert stage("export", options_of(made, checkpoint.name, tmp_path / "one", interests=1)) == 0
    ordinary = vectors_by_user(open_export(str(tmp_path / "one")))
    for user, own in vectors_by_user(open_export(str(several))).items():
        assert own.shape == (INTERESTS, 8)
        np.testing.assert_allclose(own[0], ordinary[user], rtol=1e-5, atol=1e-6)
        assert not np.allclose(own[1], own[0])
    plain = lists(tmp_path / "one", tmp_path / "plain", k=9)
    for merge in ("score", "quota"):  # of one interest, every way of merging gives the plain list
        assert lists(tmp_path / "one", tmp_path / merge, k=9, merge=merge) == plain
    assert lists(several, tmp_path / "first", k=9, interests=1) == plain


def test_several_interests_are_merged_in_two_steps_if_nothing_is_said(made, tmp_path):
    exported = pretrained(made)
    found = lists(exported, tmp_path / "auto", k=20)
    assert found == lists(exported, tmp_path / "two", k=20, merge="two_step", m=18)
    assert found == lists(exported, tmp_path / "in words", k=20, merge="two_step", interests=2)


def one_rank(rank: int, world_size: int, made: str, output: str) -> str:
    options = options_of(Path(made), "tuned", Path(output) / "vectors")
    config = {name.removeprefix("--"): value for name, value in options.items()}
    config = {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}
    stay_in_group()
    export.main(Export(**config))
    vectors, found = f"{output}/vectors", f"{output}/lists"
    retrieve.main(Retrieve(export=vectors, output=found, data=config["data"], k=10, index="ivf"))
    return ""


def test_two_ranks_write_what_one_writes(made, tmp_path):
    alone = made / "vectors-tuned"
    if not alone.exists():
        assert stage("export", options_of(made, "tuned", alone)) == 0
    run_ranks(one_rank, 2, str(made), str(tmp_path))
    export = open_export(str(tmp_path / "vectors"))
    export.manifest.check_parts(export.path, checksums=True)
    assert export.manifest.interests == INTERESTS and export.manifest.users == len(HELD_OUT)
    other = vectors_by_user(export)
    for user, own in vectors_by_user(open_export(str(alone))).items():
        np.testing.assert_allclose(other[user], own, rtol=1e-4, atol=1e-5)
    manifest = json.loads((tmp_path / "lists" / "manifest.json").read_text())
    assert [part["path"].split("-")[1] for part in manifest["parts"]] == ["0000", "0001"]
    # A small catalogue is one cluster, so the approximate lists are the exact ones.
    assert manifest["measured"]["recall"] == {"users": len(HELD_OUT), "recall@10": 1.0}
    found = dict(row for part in manifest["parts"] for row in rows_of(tmp_path / "lists" / part["path"]))
    assert found == lists(alone, tmp_path / "exact", k=10, merge="two_step", data=made / "prompts")


def changed_by(changed: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changed)


def test_items_of_the_history_may_compete_with_the_bias_of_the_export(made, tmp_path, capfd):
    """Lists of one interest are a sort of biased scores, with an index too; without --seen they are as ever."""
    exported, items = pretrained(made), open_export(str(pretrained(made))).item_vectors()[1]
    bias = CheckpointSettings.read(find_checkpoint(str(made / "run"))).repeat_bias
    assert json.loads((exported / "manifest.json").read_text())["repeat_bias"] == bias != 0
    left_out = lists(exported, tmp_path / "left_out", k=8, interests=1, merge="score", data=made / "data")
    assert not any(set(row) & set(WALKS[user][:-1]) for user, row in left_out.items())
    for bias in (-0.1, 0.5):
        weighed = Path(shutil.copytree(exported, tmp_path / f"bias {bias}"))
        change_json(weighed / "manifest.json", changed_by({"repeat_bias": bias}))
        expected = {}
        for user, vectors in vectors_by_user(open_export(str(weighed))).items():
            scores = items @ vectors[0]
            scores[sorted(set(WALKS[user][:-1]))] += np.float32(bias)
            expected[user] = np.argsort(-scores, kind="stable")[:8].tolist()
        assert expected != left_out
        for index in ("exact", "flat", "ivf"):
            options = {"k": 8, "interests": 1, "merge": "score", "data": made / "data", "seen": "weigh", "index": index}
            output = tmp_path / f"{index} {bias}"
            if index == "exact" or bias < 0:
                assert lists(weighed, output, **options) == expected
                said = capfd.readouterr().out
                assert f"items of the history weighed (repeat bias {bias}: " in said and "history weighed)" in said
                continue
            given = {"--export": weighed, "--output": output} | {f"--{name}": value for name, value in options.items()}
            assert stage("retrieve", given) == 2
            assert f"a history that --index {index} does not find; give --index exact" in capfd.readouterr().err


def rows_of(path: Path) -> list[tuple[int, list[int]]]:
    table = pq.read_table(path)
    return list(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


def test_what_is_written_names_items_users_scores_and_interests(made, tmp_path):
    exported = pretrained(made)
    lists(exported, tmp_path / "lists", k=6, merge="quota", interests=2)
    table = pq.read_table(tmp_path / "lists" / "lists")
    assert table.schema.names == ["user_id", "key", "item_ids", "item_keys", "scores", "interests"]
    assert table.schema.field("item_ids").type == pa.list_(pa.int64())
    export = open_export(str(exported))
    _, items = export.item_vectors()
    users = vectors_by_user(export)
    for row in table.to_pylist():
        assert row["key"] == f"user {row['user_id']}"
        assert row["item_keys"] == [f"item {item}" for item in row["item_ids"]]
        assert row["interests"] == [0, 0, 0, 1, 1, 1] and len(set(row["item_ids"])) == 6
        expected = [items[i] @ users[row["user_id"]][n] for i, n in zip(row["item_ids"], row["interests"], strict=True)]
        np.testing.assert_allclose(row["scores"], expected, rtol=1e-4, atol=1e-5)


def test_lists_are_as_long_as_asked_where_the_catalogue_allows(made, tmp_path, capfd):
    exported = pretrained(made)
    for index in ("exact", "hnsw", "ivf"):
        found = lists(exported, tmp_path / index, k=ITEMS, merge="quota", data=made / "data", index=index)
        for user, row in found.items():
            assert sorted(row) == sorted(set(range(ITEMS)) - set(WALKS[user][:-1])), index
    assert "places are empty: no items are left" in capfd.readouterr().out


def test_the_same_command_again_does_nothing_and_another_is_refused(made, tmp_path, capfd):
    exported = tmp_path / "vectors"
    options = options_of(made, "run", exported)
    assert stage("export", options) == 0
    first = (exported / "manifest.json").stat().st_mtime_ns
    assert stage("export", options) == 0
    assert "Already there" in capfd.readouterr().out
    assert (exported / "manifest.json").stat().st_mtime_ns == first
    assert stage("export", options | {"--interests": 2}) == 2
    assert f"{exported} holds another export" in capfd.readouterr().err

    given = {"--export": exported, "--output": tmp_path / "lists", "--k": 5}
    assert stage("retrieve", given) == 0
    assert "Written" in capfd.readouterr().out
    assert stage("retrieve", given) == 0
    assert "Already there" in capfd.readouterr().out
    assert stage("retrieve", given | {"--k": 6}) == 2
    assert "made with other options" in capfd.readouterr().err

    written = {
        "retrieve": (given, tmp_path / "lists", "hnsw", "search"),
        "export": (options, exported, "batch", "tokens"),
    }
    for command, (same, folder, group, option) in written.items():

        def drop(manifest: dict[str, Any], group: str = group, option: str = option) -> None:
            del manifest["settings"][group][option]  # written before there was this option: its default was done

        change_json(folder / "manifest.json", drop)
        assert stage(command, same) == 0
        assert "Already there" in capfd.readouterr().out


def test_an_index_is_exported_added_replaced_and_searched(made, tmp_path, capfd):
    """The vectors are computed once, and the lists are those of exact search, with items left out and interests."""
    exported = tmp_path / "vectors"
    options = options_of(made, "run", exported)
    assert stage("export", options) == 0
    vectors = [path for folder in ("items", "users") for path in (exported / folder).iterdir()]
    before, fingerprint = {path: path.stat().st_mtime_ns for path in vectors}, open_export(str(exported)).fingerprint
    expected = lists(exported, tmp_path / "exact", k=10, data=made / "data")
    for kind, said in {"hnsw": "Written", "flat": "Written", "none": "Already there"}.items():
        capfd.readouterr()
        assert stage("export", options | {"--index.kind": kind}) == 0
        output = capfd.readouterr().out
        assert said in output and (kind == "none" or f"index       {kind}, " in output)
    assert {path: path.stat().st_mtime_ns for path in vectors} == before
    assert lists(exported, tmp_path / "flat", k=10, data=made / "data") == expected
    settings = json.loads((tmp_path / "flat/manifest.json").read_text())["settings"]
    assert settings["index"] == "flat"
    assert "holds no" not in capfd.readouterr().out
    assert lists(exported, tmp_path / "hnsw", k=10, data=made / "data", index="hnsw") == expected
    assert "holds no hnsw index: it is built now and not kept. To keep one" in capfd.readouterr().out
    assert open_export(str(exported)).fingerprint == fingerprint
    new = options_of(made, "run", tmp_path / "new") | {"--index.kind": "auto"}
    assert stage("export", new) == 0
    assert stage("export", new) == 0
    assert "Already there" in capfd.readouterr().out


def harmed(made: Path, folder: Path, how: str) -> Path:
    """A copy of the export of four interests, harmed."""
    exported = pretrained(made)
    shutil.copytree(exported, folder)
    if how == "unfinished":
        (folder / "manifest.json").unlink()
    elif how == "one interest":
        shutil.rmtree(folder)
        assert stage("export", options_of(made, "run", folder, interests=1)) == 0
    elif how == "damaged":
        part = next((folder / "users").iterdir())
        part.write_bytes(part.read_bytes()[:-1])
    return folder


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ("unfinished", {}, "is not an export: it has no manifest.json"),
        ("damaged", {}, "is damaged"),
        ("one interest", {"--merge": "two_step"}, "two_step merges 2 interests, but"),
        ("", {"--interests": 5, "--merge": "score"}, "--interests is 5, but"),
        ("", {"--interests": 33}, "--interests is 33; it must be from 0 to 32 (0: all)"),
        ("", {"--k": ITEMS + 1}, f"--k is {ITEMS + 1}, but"),
        ("", {"--k": 0}, "--k is 0"),
        ("", {"--seen": "weigh"}, "--seen is weigh; give the dataset whose histories are weighed: --data"),
        ("", {"--m": 11, "--merge": "two_step"}, "--m is 11"),
        ("", {"--m": 5, "--merge": "quota"}, "only two_step uses m"),
        ("", {"--merge": "two_step", "--interests": 3}, "two_step merges 2"),
        ("", {"--interests": 3}, "two_step merges 2"),
        ("", {"--data": "other"}, "was made from another dataset than"),
        ("", {"--index": "ivf", "--ivf.clusters": ITEMS + 1}, f"--ivf.clusters is {ITEMS + 1}"),
        ("", {"--output": "taken"}, "already holds something that is not a finished set of lists (thesis.tex)"),
        ("", {"--output": "data"}, "holds something other than a set of lists"),
    ],
)
def test_refused_before_anything_is_written(made, tmp_path, capfd, how, options, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    write_dataset(tmp_path / "other", WALKS, items=ITEMS, vocabulary="another")
    write_dataset(tmp_path / "data", WALKS, items=ITEMS)
    exported = harmed(made, tmp_path / "vectors", how)
    given = {"--export": exported, "--output": tmp_path / "lists", "--k": 10} | options
    for name in {"--data", "--output"} & options.keys():
        given[name] = tmp_path / options[name]
    assert stage("retrieve", given) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "lists").exists() and (tmp_path / "taken" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("interests", [0, 33])
def test_an_export_of_no_or_too_many_interests_is_refused(made, tmp_path, capfd, interests):
    assert stage("export", options_of(made, "run", tmp_path / "no", interests=interests)) == 2
    assert f"--interests is {interests}; it must be from 1 to 32" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_an_export_goes_stale_when_the_dataset_grows(made, tmp_path, capfd):
    shutil.copytree(made / "data", tmp_path / "data")
    options = options_of(made, "run", tmp_path / "vectors") | {"--data": tmp_path / "data"}
    assert stage("export", options) == 0
    shutil.rmtree(tmp_path / "data")
    write_dataset(tmp_path / "data", [[*history, 1] for history in WALKS], items=ITEMS)
    assert stage("export", options) == 2
    differing = re.findall(r"^  (\w+): \w+ there, \w+ now$", capfd.readouterr().err, re.MULTILINE)
    assert differing == ["dataset_fingerprint"]
