"""The stages recommend and run, and the Python API: thin callers of what other tests prove (15 s in all)."""

import doctest
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recgpt_torchrec as rg
from recgpt_torchrec import api
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.serving.keys import KeyTable, find_bucket
from tests.support import SMALL, stage, walks
from tests.test_events import write_log

SHORT = {name.removeprefix("--"): value for name, value in SMALL.items()} | {"train.epochs": 1, "model.dim": 16}
WALKS = walks(40, 30, longest=14)


@pytest.fixture(scope="module")
def log() -> pa.Table:
    """Item 29 is seen first or last alone, so it is never a training target."""
    rows = [(f"u{u}", f"i{item}", n) for u, walk in enumerate(WALKS) for n, item in enumerate(walk)]
    return pa.table(dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True)))


@pytest.fixture(scope="module")
def made(log: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A dataset and a run, through the API."""
    folder = tmp_path_factory.mktemp("api")
    table = folder / "items.csv"
    table.write_text("item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(29)))
    options = {"items": [str(table)], "item_attributes": ["title:text"]}
    data = rg.Dataset.prepare(log, output=folder / "data", min_count=1, options=options)
    assert rg.api.pretrain(data, folder / "run", options=SHORT, seed=3) == str(folder / "run")
    return folder, data


def test_importing_the_package_imports_neither_torch_nor_arrow() -> None:
    code = (
        "import sys, recgpt_torchrec as rg; dir(rg); rg.InputError\n"
        "assert not {'torch', 'pyarrow', 'jsonargparse'} & {*sys.modules}, sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_api_goes_from_a_table_to_lists(made: tuple[Path, Any], log: pa.Table, capsys: Any) -> None:
    folder, data = made
    assert (data.users, data.items, data.interactions) == (40, 30, log.num_rows)
    again = rg.Dataset.prepare(log, output=folder / "data", min_count=1, options=data_options(folder))
    assert again.path == data.path and "nothing to do" in capsys.readouterr().out
    figures = api.evaluate(data, folder / "run", folder / "test.json", baselines=False)
    assert 0 <= figures["results"]["pretrain"]["masked"]["HR@10"] <= 1
    vectors = api.export(data, folder / "run", folder / "vectors")
    lists = api.retrieve(vectors, folder / "lists", data, k=5)
    rows = pq.read_table(f"{lists}/lists", columns=["user_id", "item_ids"]).to_pylist()
    recommender = rg.Recommender.load(folder / "run", data)
    keys = KeyTable(recommender.dataset, "user"), KeyTable(recommender.dataset, "item")
    for row in rows[:5]:
        (user,) = keys[0].keys_of(np.array([row["user_id"]]))
        history = [f"i{item}" for item in WALKS[int(user[1:])]]
        answer = recommender.recommend(pa.array(history), 5, users=user)
        assert answer.items == keys[1].keys_of(np.array(row["item_ids"])) and isinstance(answer, rg.Recommendation)


def data_options(folder: Path) -> dict[str, Any]:
    return {"items": [str(folder / "items.csv")], "item_attributes": ["title:text"]}


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"train.epoch": 3}, {}, "unknown option --train.epoch; did you mean"),
        ({"train.epochs": "many"}, {}, "train.epochs"),
        ({"seed": 1}, {"seed": 2}, "seed is given twice"),
        ({}, {"output": "there"}, "output"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises((rg.InputError, TypeError), match=message):
        api.pretrain("data", "run", options=options, **more)
    with pytest.raises(rg.InputError, match="a set"):
        rg.Dataset.prepare({1}, output="there")


@pytest.mark.parametrize("module", ["api", "serving.keys", "serving.requests", "serving.request_file"])
def test_examples_in_docstrings_are_right(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"recgpt_torchrec.{module}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


def test_recommend_says_what_became_of_an_unusual_history(made: tuple[Path, Any], capsys: Any) -> None:
    folder, data = made
    given = {"--checkpoint": folder / "run", "--data": data.path, "--k": 3}
    assert stage("recommend", {**given, "--history": "i1", "--k": 31}) == 2
    assert f"--k is 31, but {data.path} has 30 items; give at most that many" in capsys.readouterr().err
    assert stage("recommend", {**given, "--history": "no,nope"}) == 0
    said = capsys.readouterr().out
    assert "popular items: none of its items is known" in said and "2 items of the history left out: no, nope" in said
    keys = said.rpartition("are such as ")[2].splitlines()[0].split(", ")
    assert len(keys) == 2 and {*keys} <= {f"i{item}" for item in range(30)}
    assert stage("recommend", {**given, "--history": '"a,b", i1'}) == 0  # quoted as in CSV
    assert "1 item of the history left out: a,b" in capsys.readouterr().out
    long = [f"i{item % 30}" for item in range(50)]
    assert stage("recommend", {**given, "--history": ",".join(long)}) == 0
    said = capsys.readouterr().out
    newest = SMALL["--model.max_len"]
    assert f"of its 50 items the newest {newest} are read" in said
    lines = folder / "histories.csv"
    lines.write_text("i1,i2\n")
    assert stage("recommend", {**{name: given[name] for name in ("--checkpoint", "--data")}, "--input": lines}) == 2
    assert "line 1 is no JSON object" in (said := capsys.readouterr().err) and '{"items": ["shoe", "hat"]}' in said


def test_a_folder_above_the_right_one_is_told_from_it(made: tuple[Path, Any], capsys: Any) -> None:
    folder, data = made
    assert stage("recommend", {"--checkpoint": folder, "--data": data.path, "--history": "i1"}) == 2
    assert f"Did you mean {folder}/run?" in capsys.readouterr().err
    assert stage("recommend", {"--checkpoint": folder / "run", "--data": folder, "--history": "i1"}) == 2
    assert f"Did you mean {folder}/data?" in capsys.readouterr().err
    assert stage("doctor", {"--data": folder, "--output": folder}) == 1
    assert f"Did you mean {folder}/data?" in capsys.readouterr().out


def test_recommend_prints_a_table_with_names_and_what_it_left_out(made: tuple[Path, Any], capsys: Any) -> None:
    folder, data = made
    given = {"--checkpoint": folder / "run", "--data": data.path, "--k": 3, "--user": "nobody"}
    capsys.readouterr()
    assert stage("recommend", {**given, "--history": "i3,none,i4", "--exclude": "i5"}) == 0
    printed = capsys.readouterr().out
    answer = rg.Recommender.load(folder / "run").recommend(["i3", "i4"], 3, exclude=["i5"])
    for rank, (key, score) in enumerate(zip(answer.items, answer.scores, strict=True), 1):
        name = f"Title {key[1:]}" if key != "i29" else ""
        assert f"{rank}  {key:<4}" in printed and name in printed and f"{score:.4f}" in printed
    assert "rank  item  title" in printed
    assert "unknown     1 item of the history left out: none" in printed
    assert "does not know nobody: the user vector is 0" in printed
    assert stage("recommend", {**given, "--history": "i3,none,i4", "--exclude": "i5", "--json": "true"}) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["items"] == answer.items and read["unknown"] == ["none"]
    assert stage("recommend", {**given, "--history": ""}) == 0
    assert "fallback    popular items: the history is empty" in capsys.readouterr().out


def test_recommend_answers_a_file_and_names_a_line_that_is_wrong(made: tuple[Path, Any], capsys: Any) -> None:
    folder, data = made
    requests = [{"items": ["i1", "i2"], "user": "u1"}, {"items": []}, {"items": ["i3", 4], "exclude": ["i9"]}]
    (folder / "in.jsonl").write_text("\n\n".join(map(json.dumps, requests)))
    given = {"--checkpoint": folder / "run", "--data": data.path, "--k": 4, "--input": folder / "in.jsonl"}
    assert stage("recommend", {**given, "--output": folder / "out.jsonl"}) == 0
    assert "answered    3 histories, 1 unknown item left out, 2 of strangers" in capsys.readouterr().out
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    recommender = rg.Recommender.load(folder / "run", data)
    one = recommender.recommend(["i1", "i2"], 4, users="u1")
    assert answers[0]["user"] == "u1" and answers[0]["items"] == one.items and answers[2]["unknown"] == [4]
    for line, message in [
        ('{"items": ["i1"], "usr": 1}', "line 2: a request has a field 'usr'"),
        ("{", "line 2 is no"),
    ]:
        (folder / "in.jsonl").write_text(f'{{"items": []}}\n{line}\n')
        assert stage("recommend", {**given, "--output": folder / "out2.jsonl"}) == 2
        assert message in capsys.readouterr().err and not list(folder.glob("out2*"))
    (folder / "in.jsonl").write_text('{"items": []}\n{"items": ["i1"], "time": 3}\n')
    assert stage("recommend", {**given, "--output": folder / "out2.jsonl"}) == 2
    assert "line 2: time 3: the model of" in capsys.readouterr().err and not list(folder.glob("out2*"))


def test_keys_under_hashed_ids_have_the_slot_of_their_hash(tmp_path: Path) -> None:
    """Those of the log have the ids that `prepare` gave them, and an unknown key that of its bucket, if it is used."""
    log = write_log(tmp_path / "log.csv", 30)
    options = {"--input": log, "--output": tmp_path / "data", "--min_count": 1, "--ids": "hash", "--item_rows": 25}
    assert stage("prepare", options) == 0
    table = KeyTable(Dataset.open(str(tmp_path / "data")), "item")
    rows = pq.read_table(tmp_path / "data" / "item_keys").to_pylist()
    assert table.ids_of([row["key"] for row in rows]).tolist() == [row["item_id"] for row in rows] and len(rows) > 30
    buckets = pq.read_table(tmp_path / "data" / "items", columns=["bucket", "item_id"]).to_pylist()
    slots = {row["bucket"]: row["item_id"] for row in buckets}
    news = [f"new {n}" for n in range(40)]
    assert table.ids_of(news).tolist() == [slots.get(find_bucket(key, 0, 25), -1) for key in news]


def test_run_goes_from_a_log_to_lists_and_a_second_run_finds_them(tmp_path: Path, capsys: Any) -> None:
    write_log(tmp_path / "log.csv", 40)
    options = {f"--pretrain.{name}": value for name, value in SHORT.items()}
    options |= {"--prepare.min_count": 1, "--k": 5, "--interests": 2, "--evaluate.baselines": "false"}
    given = {"--input": tmp_path / "log.csv", "--output": tmp_path / "all", **options}
    assert stage("run", given) == 0
    printed = capsys.readouterr().out
    steps = ["prepare", "pretrain", "evaluate", "export", "retrieve"]
    assert [line.split()[4] for line in printed.splitlines() if line.startswith("--- ") and " -> " in line] == steps
    assert f"\nWritten: {tmp_path / 'all'}/lists, in " in printed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*") if path.name != "steps.json"}
    assert stage("run", given) == 0
    printed = capsys.readouterr().out
    assert f"\nAlready there: {tmp_path / 'all'}/lists, in " in printed
    files = {
        path: path.stat().st_mtime_ns for path in before if path.is_file() and path.suffix in (".json", ".parquet")
    }
    assert all(before[path] == time for path, time in files.items()) and len(files) > 5
    assert stage("run", {**given, "--pretrain.data": "other"}) == 2
    assert "--pretrain.data is filled in by run" in capsys.readouterr().err
    assert stage("run", {**given, "--retrieve.k": 3}) == 2
    assert "--retrieve.k is set by --k" in capsys.readouterr().err
    assert stage("run", {**given, "--output": tmp_path / "other", "--prepare.user_column": "who"}) == 2
    assert "prepare: " in (said := capsys.readouterr().err) and "Name the right one with --prepare.user_column" in said
    # Figures with neighbours are kept as long as the folder is what it was.
    whole, near = tmp_path / "all", tmp_path / "near"
    raised = {**given, "--evaluate.neighbours.path": near}
    for count, kept in ((3, False), (3, True), (1, False)):
        shutil.rmtree(near, ignore_errors=True)
        assert stage("find_neighbours", {"--data": whole / "data", "--output": near, "--count": count}) == 0
        assert stage("run", raised) == 0
        assert (f"Already there: {whole / 'test.json'}" in capsys.readouterr().out) == kept
    assert "pretrain_neighbours" in json.loads((whole / "test.json").read_text())["results"]
    shutil.rmtree(near)
    assert stage("run", raised) == 2
    assert f"evaluate: {near} is not a" in capsys.readouterr().err
    # The folder of all stages is no run.
    for name, asked in (
        ("recommend", {"--checkpoint": whole, "--data": whole / "data", "--history": "a"}),
        ("report", {"--runs": [whole], "--output": tmp_path / "report.html"}),
    ):
        assert stage(name, asked) == 2
        assert f"Did you mean {whole}/model?" in capsys.readouterr().err
