"""The report: its numbers are those of evaluate, nothing in it is loaded or run, and bad input is told."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.reports import charts
from recgpt_torchrec.reports.charts import Scale, Series, line_chart
from recgpt_torchrec.reports.curves import thin
from recgpt_torchrec.reports.markup import table, tag
from recgpt_torchrec.reports.page import DATA
from recgpt_torchrec.reports.runs import names_of, run_folder
from tests.support import SMALL, read_epochs, stage, walks, write_dataset

USERS, ITEMS = 60, 30
TUNE = {"--loss.candidates": "all", "--batch.tokens": 60, "--train.epochs": 2, "--optimizer.warmup_steps": 2}
VOID = {"meta", "wbr", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its prompts, a run tuned on them, and evaluations of both beside them."""
    folder = tmp_path_factory.mktemp("report")
    write_dataset(folder / "data", walks(USERS, ITEMS, shortest=4, longest=14), items=ITEMS)
    training = {**SMALL, "--model.max_len": 8, **TUNE}
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **training}) == 0
    given = {"--data": folder / "data", "--checkpoint": folder / "run"}
    assert stage("generate_prompts", {**given, "--output": folder / "prompts", "--prompts.k": 1}) == 0
    tuning = {"--data": folder / "prompts", "--checkpoint": folder / "run", "--output": folder / "tuned", **TUNE}
    assert stage("prompt_tune", tuning) == 0
    assert stage("evaluate", {**given, "--output": folder / "run" / "test.json", "--recall.interests": 2}) == 0
    compared = {"--data": folder / "prompts", "--checkpoint": folder / "tuned", "--compare": folder / "run"}
    assert stage("evaluate", {**compared, "--output": folder / "tuned_test.json"}) == 0
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    options = {"--runs": [runs / "run", runs / "tuned"], "--output": runs / "report.html"}
    assert stage("report", options) == 0
    return (runs / "report.html").read_text()


def values_of(page: str) -> dict[str, Any]:
    """The JSON in a page."""
    found = re.search(f'<script type="application/json" id="{DATA}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


class Elements(HTMLParser):
    """Checks that elements are closed in order, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((name, dict(attributes)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def test_numbers_are_those_of_evaluate(runs: Path, page: str) -> None:
    values = values_of(page)
    for run, file in zip(values["runs"], (runs / "run" / "test.json", runs / "tuned_test.json"), strict=True):
        evaluation = json.loads(file.read_text())
        (shown,) = run["evaluations"]
        assert shown["users"] == evaluation["users"] and Path(shown["file"]).resolve() == file.resolve()
        assert [path["path"] for path in shown["paths"]] == list(evaluation["results"])
        for path in shown["paths"]:
            for how, figures in evaluation["results"][path["path"]].items():
                assert {name: each["value"] for name, each in path[how].items()} == figures
                for each in path[how].values():
                    assert each["low"] <= each["value"] + 1e-9 and each["value"] - 1e-9 <= each["high"]
            quality = evaluation["lists"]["paths"][path["path"]]
            assert (path["coverage"], path["novelty"]) == (quality["coverage"], quality["novelty"])
            assert f"{path['masked']['NDCG@10']['value']:.4f}" in page
        for each in shown["ahead"]:
            told = evaluation["ahead"]["of"][each["other"]]
            assert each["difference"] == {"value": told["difference"], "low": told["low"], "high": told["high"]}
        for name, title in (("by_length", "items in the history"), ("by_popularity", "training interactions of")):
            groups = next(groups for words, groups in shown["groups"].items() if words.startswith(title))
            for path in evaluation["results"]:
                lines = evaluation["groups"][path]["masked"][name]
                lines = lines if name == "by_length" else lines[::-1]
                got = [(group["users"], group["figures"].get(path, {}).get("value")) for group in groups]
                assert got == [(line["users"], line.get("NDCG@10")) for line in lines]
        losses = [[line.get("loss") for line in lines] for lines in (run["epochs"], read_epochs(Path(run["folder"])))]
        assert losses[0] == losses[1]
        assert (
            run["finished"] and run["tables"] and any("1" == value for name, value in run["facts"] if name == "Ranks")
        )


def gains(folder: Path, file: str, path: str) -> dict[int, float]:
    """NDCG@10 of every user, by a plain loop over the results by user."""
    rows = pq.read_table(folder / file).to_pydict()
    ranks = zip(rows["user_id"], rows[f"{path}_masked"], strict=True)
    return {user: 1 / float(np.log2(rank + 2)) if rank < 10 else 0.0 for user, rank in ranks}


def test_paired_differences_and_results_by_user_are_those_of_a_plain_loop(runs: Path, page: str) -> None:
    values = values_of(page)
    for file, of in ((runs / "run" / "test.json", runs / "run"), (runs / "tuned_test.json", runs)):
        evaluation = json.loads(file.read_text())
        for path, protocols in evaluation["results"].items():
            mine = gains(of, evaluation["per_user"]["file"], path)
            assert np.mean(list(mine.values())) == pytest.approx(protocols["masked"]["NDCG@10"], abs=1e-6)
            assert len(mine) == evaluation["users"]
    (comparison,) = values["comparisons"]
    assert comparison["reason"] is None
    told = {each["path"]: each for each in comparison["differences"] if each["metric"] == "NDCG@10"}
    assert {path: each["other"] for path, each in told.items()} == {
        "recgpt_1": "pretrain",
        "recgpt": "pretrain_two_step",
    }
    for path, each in told.items():
        ours, theirs = (
            gains(runs, "tuned_test.users.parquet", path),
            gains(runs / "run", "test.users.parquet", each["other"]),
        )
        assert each["difference"]["value"] == pytest.approx(
            np.mean([ours[user] - theirs[user] for user in ours]), abs=1e-6
        )
        assert each["difference"]["low"] <= each["difference"]["value"] <= each["difference"]["high"]


def test_a_page_is_closed_loads_nothing_and_runs_nothing(page: str) -> None:
    parser = Elements()
    parser.feed(page)
    assert not parser.open
    names = [name for name, _ in parser.seen]
    assert not {"img", "link", "iframe", "object", "form"} & set(names)
    assert [each["type"] for name, each in parser.seen if name == "script"] == ["application/json"]
    for _, attributes in parser.seen:
        assert "src" not in attributes and not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert names.count("polyline") >= 4 and names.count("circle") > 20


def test_examples_are_lists_with_prompts_in_readable_names(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "item_id,title\n" + "".join(f"item {i},Thing <{i}>\n" for i in range(0, ITEMS, 2))
    )
    options = {"--runs": [runs / "tuned"], "--names": tmp_path / "items.csv", "--output": tmp_path / "report.html"}
    assert stage("report", options) == 0
    page = (tmp_path / "report.html").read_text()
    evaluation = json.loads((runs / "tuned_test.json").read_text())
    (shown,) = values_of(page)["runs"][0]["evaluations"]
    assert len(shown["examples"]) == 8
    for example, given in zip(shown["examples"], evaluation["examples"], strict=True):
        assert example["user"] == f"user {given['user']}"
        assert [item["prompt"] == "generated" for item in example["history"]] == [s == 1 for s in given["segments"]]
        for path, items in given["lists"].items():
            names = [f"Thing <{item}>" if item % 2 == 0 else None for item in items]
            assert [each["name"] for each in example["lists"][path]] == names
            assert [each["key"] for each in example["lists"][path]] == [f"item {item}" for item in items]
            assert not {*items} & {item for item, s in zip(given["history"], given["segments"], strict=True) if s == 0}
    assert any(item["prompt"] for example in shown["examples"] for item in example["history"])
    assert "Thing &lt;2&gt;" in page and "Thing <" not in page


def test_bad_input_is_told(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(**options: Any) -> str:
        assert stage("report", {"--output": tmp_path / "r.html", **options}) == 2
        assert not (tmp_path / "r.html").exists()
        return capfd.readouterr().err

    assert "has no run.json" in refused(**{"--runs": [runs / "data"]})
    assert "does not exist" in refused(**{"--runs": [runs / "nothing"]})
    assert "names a run twice" in refused(**{"--runs": [runs / "run", f"{runs / 'run'}/"]})
    assert "--runs is empty" in refused()
    given = {"--runs": [runs / "run"]}
    assert "is not an evaluation" in refused(**given, **{"--evaluations": [runs / "run" / "run.json"]})
    assert "in none of the runs" in refused(**given, **{"--evaluations": [runs / "tuned_test.json"]})
    (tmp_path / "items.csv").write_text("id,name\n1,x\n")
    assert "--name_column" in refused(**given, **{"--names": tmp_path / "items.csv"})
    (tmp_path / "other.html").write_text("mine")
    assert stage("report", {**given, "--output": tmp_path / "other.html"}) == 2
    assert (tmp_path / "other.html").read_text() == "mine"


def test_what_is_missing_is_said(runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An unfinished run without evaluation; a run on another dataset; an evaluation without results by user."""
    shutil.copytree(
        runs / "run", tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints", "*.json", "*.parquet")
    )
    shutil.copy(runs / "run" / "run.json", tmp_path / "begun")
    with open(tmp_path / "begun" / "history.jsonl", "a") as file:
        file.write('{"epoch": 3, "st')  # a kill
    shutil.copytree(runs / "run", tmp_path / "other")
    file_of_other = tmp_path / "other" / "test.json"
    evaluation = json.loads(file_of_other.read_text())
    evaluation["vocabulary"] = "another"
    file_of_other.write_text(json.dumps(evaluation))
    shutil.copytree(runs / "run", tmp_path / "old")
    evaluation = json.loads((runs / "run" / "test.json").read_text())
    for name in ("per_user", "lists", "examples", "ahead", "vocabulary", "histories"):
        del evaluation[name]  # as earlier versions wrote it
    (tmp_path / "old" / "test.json").write_text(json.dumps(evaluation))
    options = {"--runs": [runs / "run", *(tmp_path / name for name in ("begun", "other", "old"))]}
    assert stage("report", {**options, "--output": tmp_path / "r.html"}) == 0
    said = capfd.readouterr().out
    values = values_of((tmp_path / "r.html").read_text())
    assert [run["finished"] for run in values["runs"]] == [True, False, True, True]
    assert "has no checkpoint yet" in values["notes"][0] and "different datasets" in values["notes"][2]
    assert values["notes"][1] == "begun: 1 lines of history.jsonl are damaged or incomplete, and left out."
    reasons = {each["run"]: each["reason"] for each in values["comparisons"]}
    assert reasons["begun"] == "begun has no evaluation on test"
    assert "fingerprints of the users and items are another" in reasons["other"]
    assert reasons["old"] is not None and all(reason in said for reason in reasons.values())
    assert len(values["runs"][1]["epochs"]) == 2


def test_evaluate_compares_with_a_run_and_refuses_what_cannot_be_compared(
    runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = {"--data": runs / "data", "--checkpoint": runs / "tuned", "--output": tmp_path / "test.json"}
    assert stage("evaluate", {**given, "--compare": runs / "run", "--users": 20}) == 0
    shown = capfd.readouterr()
    assert "20 shared users" in shown.out and "recgpt_1 against pretrain" in shown.out
    assert "over cooccurrence" not in shown.out and re.search(
        r"recgpt_1 is (ahead of|behind|level with) popularity", shown.out
    )
    assert "was tuned on histories with prompts, but" in shown.out + shown.err
    assert json.loads((tmp_path / "test.json").read_text())["without_prompts"] is True
    again = {**given, "--output": tmp_path / "x.json"}
    for other, words in (
        (tmp_path / "nothing.json", "does not exist"),
        (runs / "data", "has no evaluation on test"),
        (runs / "data" / "manifest.json", "is not an evaluation"),
    ):
        assert stage("evaluate", {**again, "--compare": other}) == 2
        assert words in capfd.readouterr().err
    assert stage("evaluate", {**again, "--compare": runs / "run" / "test.json", "--split": "validation"}) == 2
    assert "the splits are validation and test" in capfd.readouterr().err
    assert stage("evaluate", {**again, "--compare": runs / "run", "--per_user": "false"}) == 2
    evaluation = json.loads((tmp_path / "test.json").read_text())
    del evaluation["per_user"]
    (tmp_path / "old.json").write_text(json.dumps(evaluation))
    capfd.readouterr()
    assert stage("evaluate", {**again, "--compare": tmp_path / "old.json"}) == 2
    assert "has no results by user" in capfd.readouterr().err
    assert not (tmp_path / "x.json").exists() and not (tmp_path / "x.users.parquet").exists()


def test_small_pieces() -> None:
    assert names_of(["a/seed0/run", "a/seed1/run"]) == ["seed0/run", "seed1/run"]
    assert names_of(["x/one/", "y/two"]) == ["one", "two"] and names_of(["a/b/run"]) == ["b/run"]
    assert tag("p", "<b>", title='"&') == '<p title="&quot;&amp;"><b></p>'
    assert table(["a", "b"], [["1", "2"]]).count('class="n"') == 2
    points = [(float(step), float(step % 7)) for step in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100 and thinned[-1] == points[-1] and thin(points[:50], 100) == points[:50]
    assert thinned == sorted(thinned)
    for values in ([0.0], [3.0, 3.0], [-0.002, 0.004], [1e-9, 5e8], [float("nan")]):
        scale = Scale.around(values, True)
        assert 2 <= len(scale.ticks) <= 8 and all(-1e-6 <= scale.at(each) <= 100 + 1e-6 for each in scale.ticks)
    assert line_chart("none", [Series("a", "c0", [])]) == ""
    assert charts.short(12_500) == "12.5k" and charts.short(0.0) == "0"
    with pytest.raises(InputError):
        run_folder("nowhere/at/all")
