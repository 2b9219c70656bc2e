"""`pipelines/paper.py` from a log to its report, interrupted on the way, and the arithmetic of its tables."""

import csv
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import paper, paper_methods, paper_report, seed_tables, steps
from pipelines.experiment import from_root
from recgpt_torchrec import cli, config
from tests.tools.test_compare_recbole import stand_in
from tools import compare_recbole, synthetic_log

CONFIG = """
model: {dim: 8, layers: 1, max_len: 10}
loss: {candidates: all}
batch: {tokens: 200}
train: {epochs: 1}
"""
PROMPTS = """
prompts: {answers: 2}
"""
TUNE = """
tuning: {soft_targets: 0.3}
loss: {candidates: all}
batch: {tokens: 200}
train: {epochs: 1, validate_start: false}
"""
STUDENT = """
soft_targets: 0.3
"""
ANSWERS = """
prompts: {k: 0, answers: 2}
neighbours: {weight: 4.0}
"""
DATASETS = ("data", "data_items")
TITLES = [
    "prepare",
    "seed0/pretrain",
    "seed0/pretrain_validation",
    "seed0/pretrain_test",
    "seed0/k1/prompts",
    "seed0/fine_tuning",
    "seed0/fine_tuning_validation",
    "seed0/fine_tuning_test",
    "seed0/k1/recgpt",
    "seed0/k1/recgpt_validation",
    "seed0/k1/recgpt_test",
]


class InProcess:
    """Runs `python -m recgpt_torchrec.STAGE ...` in this process, which spares ten imports of torch."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.interrupt_at: int | None = None
        self.baselines: Callable[[list[str]], None] | None = None
        """In the place of `tools/compare_recbole.py`."""

    def __call__(self, command: list[str], log: Path | None = None) -> int:
        if len(self.ran) == self.interrupt_at:
            raise KeyboardInterrupt
        assert command[:2] == ["python", "-m"]
        self.ran.append(command)
        if command[2] == "tools.compare_recbole":
            assert self.baselines is not None
            self.baselines(command[3:])
            return 0
        module = importlib.import_module(command[2])
        stage = command[2].rpartition(".")[2]
        config_class = getattr(config, "".join(word.title() for word in stage.split("_")))
        before, sys.argv = sys.argv, [stage, *command[3:]]
        try:
            cli.run(config_class, getattr(module, "main", None) or module.run, command[2])
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        finally:
            sys.argv = before
        return 0


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    made = InProcess()
    monkeypatch.setattr(steps, "execute", made)
    return made


def test_from_a_log_to_the_report_interrupted_and_done_once(tmp_path, executor, capsys):
    log, configs = tmp_path / "log.csv", tmp_path / "configs"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    (configs / "paper.yaml").write_text(CONFIG)
    (configs / "paper_prompts.yaml").write_text(PROMPTS)
    (configs / "tiny_tune.yaml").write_text(TUNE)
    words = ["--dataset", f"tiny={log}", "--output", str(tmp_path / "out"), "--configs", str(configs)]
    words += ["--seeds", "1", "--ranks", "1", "--k", "0", "1"]

    executor.interrupt_at = 6
    with pytest.raises(SystemExit) as ended:
        paper.main(words)
    assert ended.value.code == 130
    assert "the same command resumes here" in capsys.readouterr().err

    executor.interrupt_at = None
    paper.main(words)
    assert len(executor.ran) == len(TITLES)  # nothing that was done before the interruption ran again
    said = capsys.readouterr().out
    assert "step 6 of 11: tiny/seed0/fine_tuning: done before" in said
    assert "step 7 of 11: tiny/seed0/fine_tuning_validation (" in said and " left)" in said

    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert sorted(report["steps"]) == sorted(f"tiny/{title}" for title in TITLES)
    found = report["datasets"]["tiny"]
    on_test = json.loads((out / "tiny/seed0/k1/recgpt_test.json").read_text())["results"]
    for path in ("recgpt_1", "recgpt"):
        expected = {metric: {"mean": v, "sd": None, "values": [v]} for metric, v in on_test[path]["masked"].items()}
        assert found["results"]["test"][path]["masked"] == expected
    assert {"pretrain", "pretrain_two_step", "fine_tuning"} <= found["results"]["test"].keys()
    # m is chosen on validation, and test is measured with it
    grid = json.loads((out / "tiny/seed0/k1/recgpt_validation.json").read_text())["recall"]
    assert grid["validation"][f"{grid['m']}_{grid['n']}"] == max(grid["validation"].values())
    assert f"--recall.m {grid['m']}" in report["steps"]["tiny/seed0/k1/recgpt_test"]["command"]
    # K = 0 is fine-tuning, drawn and never chosen; 10_0 is one step
    control = json.loads((out / "tiny/seed0/fine_tuning_test.json").read_text())["results"]
    assert found["k"]["chosen"] == 1 and found["k"]["test"]["0"] == {
        "recgpt_1": control["fine_tuning"]["masked"],
        "recgpt": control["fine_tuning_two_step"]["masked"],
    }
    on_validation = json.loads((out / "tiny/seed0/k1/recgpt_validation.json").read_text())["results"]["recgpt_1"]
    assert list(found["m_n"]["validation"]) == [f"{m}_{10 - m}" for m in range(10, 0, -1)]
    assert found["m_n"]["validation"]["10_0"]["mean"] == on_validation["masked"]["NDCG@10"]
    # the control takes as many optimizer steps as the prompted run
    (training,) = found["training"]
    assert training["k1/recgpt"]["steps"] == pytest.approx(training["fine_tuning"]["steps"], abs=1)
    text = (out / "report.md").read_text()
    for words_in_it in ("Table 2", "Table 3", "Variant_1", "Sensitivity", "m_n", "python -m recgpt_torchrec.prepare"):
        assert words_in_it in text
    for file in report["figures"]["tiny"]:
        assert (out / file).read_bytes().startswith(b"\x89PNG")

    paper.main(words)
    assert len(executor.ran) == len(TITLES)  # a second run starts no stage
    (configs / "tiny_tune.yaml").write_text(TUNE.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(SystemExit) as ended:
        paper.main(words)
    assert ended.value.code == 2
    assert "settings.train.epochs: 1 there, 2 now" in capsys.readouterr().err


def test_a_split_by_time_longer_lists_methods_and_baselines_are_in_the_report(tmp_path, executor, monkeypatch):
    log, configs = tmp_path / "log.csv", tmp_path / "configs"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    for name, text in (("paper", CONFIG), ("paper_prompts", PROMPTS), ("paper_tune", TUNE)):
        (configs / f"{name}.yaml").write_text(text)
    words = ["--dataset", f"tiny={log}", "--output", str(tmp_path / "out"), "--configs", str(configs)]
    words += ["--seeds", "1", "--ranks", "1", "--k", "1", "--lists", "20"]
    items = sorted({row["item_id"] for row in csv.DictReader(log.open())})
    (tmp_path / "items.csv").write_text("\n".join(["item_id,class", *(f"{item},{item[-1]}" for item in items)]))
    words += ["--baselines", "all", "--minutes", "2", "--items", f"tiny={tmp_path}/items.csv"]
    monkeypatch.setattr(paper, "RECBOLE", __file__)  # as if it were there
    python = stand_in(tmp_path)

    def train_baselines(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(python))  # of ComiRec
            compare_recbole.main([*arguments, "--python", str(python)])

    executor.baselines = train_baselines
    paper.main([*words, "--hold_out", "time", "--test_from", "85%"])
    found = json.loads((tmp_path / "out/report.json").read_text())["datasets"]["tiny"]
    assert found["hold_out"] == ["--hold_out", "time", "--test_from", "85%"]
    assert found["baselines"].keys() == paper_report.BASELINES.keys()
    folder = tmp_path / "out/tiny/seed0"
    assert json.loads((folder / "k1/prompts/manifest.json").read_text())["hold_out"] == "time"
    for path, run in (("recgpt", "k1/recgpt"), ("cooccurrence", "pretrain")):
        ten, twenty = (json.loads((folder / f"{run}_test{ending}.json").read_text()) for ending in ("", "_20"))
        for metric, value in {**ten["results"][path]["masked"], **twenty["results"][path]["masked"]}.items():
            assert found["lists"][path]["masked"][metric]["mean"] == value
        assert found["quality"][path] == {"10": ten["lists"]["paths"][path], "20": twenty["lists"]["paths"][path]}
    for row in found["paired"]:
        one, other = (found["lists"][row[side]]["masked"][row["metric"]]["mean"] for side in ("path", "other"))
        assert row["difference"] == pytest.approx(one - other, abs=1e-6)
        assert row["low"] <= row["difference"] <= row["high"]
    without_neighbours = {pair for pair in paper_methods.AGAINST if not pair[0].endswith("_neighbours")}
    assert {(row["path"], row["other"]) for row in found["paired"]} == without_neighbours
    assert {row["metric"] for row in found["paired"]} == {"HR@10", "NDCG@10", "HR@20", "NDCG@20"}
    # each baseline beside ours, measured on the same users of a dataset with the same ids and split
    assert list(found["trained_baselines"]) == list(compare_recbole.MODELS)
    manifests = [json.loads((tmp_path / f"out/tiny/{data}/manifest.json").read_text()) for data in DATASETS]
    assert manifests[0]["vocabulary"] == manifests[1]["vocabulary"] and "attributes" not in manifests[0]
    assert [part["checksum"] for part in manifests[0]["sequences"]] == [
        p["checksum"] for p in manifests[1]["sequences"]
    ]
    rows = (tmp_path / "out/report.md").read_text().splitlines()
    at = rows.index("## The paper's baselines")
    assert rows[at:].index("### tiny, test, masked") < rows[at:].index("### tiny, test, unmasked")
    assert "| ComiRec-SA | 0.0050 | 0.0050 | 0.0100 | 0.0100 |" in rows[at:]
    threads = f"{os.cpu_count()} threads"
    assert f"| S3Rec, {threads} | 1.0 | 0.8 | 1.5 | 2 | 0.5000 | time over |" in rows[at:]
    ours = found["results"]["validation"]["pretrain"]["masked"]["NDCG@10"]["mean"]
    spent = found["training"][0]["pretrain"]["train_s"] / 60
    assert f"| Pre-train |  |  | {spent:.1f} |  | {ours:.4f} |  |" in rows[at:]
    assert found["lists"]["SASRec"]["masked"]["HR@20"]["mean"] == 0.02
    text = (tmp_path / "out/report.md").read_text()
    assert "Split by time (`--hold_out time --test_from 85%`" in text and "| HR@20 | NDCG@20 |" in text


def test_a_student_learns_the_answers_of_a_teacher_which_has_a_row_in_the_report(tmp_path, executor):
    log, configs, out = tmp_path / "log.csv", tmp_path / "configs", tmp_path / "out"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    files = {"paper": CONFIG, "paper_prompts": PROMPTS, "paper_tune": TUNE, "original": CONFIG}
    for name, text in (files | {"paper_student": STUDENT, "paper_answers": ANSWERS}).items():
        (configs / f"{name}.yaml").write_text(text)
    words = ["--dataset", f"tiny={log}", "--output", str(out), "--configs", str(configs)]
    words += ["--seeds", "1", "--ranks", "1", "--k", "1"]
    paper.main(words)
    ran = len(executor.ran)
    assert ran == len(paper.parse(words).planned())
    # The teacher, its answers with neighbours, and the student, which alone reads them.
    pretrain, generate = (
        [" ".join(c) for c in executor.ran if c[2].endswith(stage)] for stage in ("pretrain", "generate_prompts")
    )
    teacher, student = pretrain
    assert "paper_student" not in teacher and "/tiny/data " in teacher and "/seed0/teacher" in teacher
    assert f"paper_student.yaml --data {from_root(str(out))}/tiny/seed0/answers" in student
    assert (
        "paper_answers.yaml" in generate[0]
        and f"--neighbours.path {from_root(str(out))}/tiny/neighbours" in generate[0]
    )
    assert "--neighbours" not in generate[1] and "/seed0/pretrain" in generate[1]
    run = json.loads((out / "tiny/seed0/pretrain/run.json").read_text())
    assert run["config"]["soft_targets"] == 0.3
    report = json.loads((out / "report.json").read_text())["datasets"]["tiny"]
    figures = {}
    for name in ("teacher", "pretrain"):
        of_run = json.loads((out / f"tiny/seed0/{name}_test.json").read_text())["results"]["pretrain"]["masked"]
        figures[name] = of_run["NDCG@10"]
        assert report["results"]["test"][name]["masked"]["NDCG@10"]["mean"] == figures[name]
    assert report["differences"]["pretrain - teacher"]["mean"] == figures["pretrain"] - figures["teacher"]
    text = (out / "report.md").read_text()
    assert "| the teacher of Pre-train | " in text and "pretrain - teacher" in text
    # Every model is measured with the scores of neighbours raised as well.
    for path, run in (("pretrain", "pretrain"), ("fine_tuning", "fine_tuning"), ("recgpt_1", "k1/recgpt")):
        of_run = json.loads((out / f"tiny/seed0/{run}_test.json").read_text())["results"][f"{path}_neighbours"]
        for how in ("masked", "unmasked"):
            assert report["results"]["test"][f"{path}_neighbours"][how]["HR@10"]["mean"] == of_run[how]["HR@10"]
            assert report["lists"][f"{path}_neighbours"][how]["HR@10"]["mean"] == of_run[how]["HR@10"]
    assert "| RecGPT_1, neighbours raised | " in text and "pretrain_neighbours - pretrain" in report["differences"]
    assert ("pretrain_neighbours", "pretrain") in {(row["path"], row["other"]) for row in report["paired"]}
    # Two seeds share two teachers, whose answers are averaged; all of it counts as time to train.
    two = [*words, "--teachers", "2", "--seeds", "2", "--output", str(tmp_path / "two")]
    (configs / "paper_answers_several.yaml").write_text(ANSWERS.replace("answers: 2", "answers: 3"))
    before = len(executor.ran)
    paper.main(two)
    assert len(executor.ran) - before == 2 * ran - 2 == len(paper.parse(two).planned())  # one dataset, one report
    (averaged,) = [" ".join(c) for c in executor.ran if "--averaged_with" in c]
    assert f"--averaged_with {from_root(str(tmp_path))}/two/tiny/seed1/answers --output" in averaged
    assert "paper_answers_several.yaml" in averaged
    assert all("paper_student_several" not in " ".join(command) for command in executor.ran)  # there is no such file
    answers = json.loads((tmp_path / "two/tiny/seed0/answers/manifest.json").read_text())["settings"]["prompts"]
    assert answers["answers"] == 3
    assert f"{from_root(str(tmp_path))}/two/tiny/seed0/teacher --" in averaged and averaged.endswith(
        "/tiny/seed0/answers"
    )
    seeds = [c[c.index("--seed") + 1] for c in executor.ran[before:] if c[2].endswith("pretrain")]
    assert seeds == ["1", "0", "0", "1"]  # two teachers, two students
    students = [line for line in map(" ".join, executor.ran[before:]) if "paper_student.yaml" in line]
    assert len(students) == 2 and all("/two/tiny/seed0/answers --output" in student for student in students)
    of_two = json.loads((tmp_path / "two/report.json").read_text())["datasets"]["tiny"]["training"]
    assert [list(each)[:2] for each in of_two] == 2 * [["teacher_2", "teacher"]]
    assert of_two[0]["teacher_2"] == of_two[1]["teacher"]
    ran = len(executor.ran)
    # Other options of the student are another student.
    (configs / "paper_student.yaml").write_text(STUDENT.replace("0.3", "0.5"))
    with pytest.raises(SystemExit):
        paper.main(words)
    assert len(executor.ran) == ran
    original = paper.parse([*words, "--settings", "original"])
    assert not original.has_teacher("tiny") and not original.uses_neighbours("tiny")
    assert paper.Paper("tiny", original, steps.RecordedSteps("x", "x", [])).student_config is None
    assert len(original.planned()) == before - 5  # neighbours; the teacher, its answers and two measurements


def test_a_data_set_is_measured_on_both_splits_with_its_own_configurations():
    words = ["--dataset", f"ml100k={__file__}", "--hold_out", "last", "time", "--test_from", "90%"]
    options = paper.parse(words)
    assert {name: source.hold_out for name, source in options.datasets.items()} == {
        "ml100k": [],
        "ml100k_time": ["--hold_out", "time", "--test_from", "90%"],
    }
    assert not any("baselines" in kind for kind in options.planned())
    options.baseline_minutes, options.items = 30, {"ml100k": "items.csv"}
    planned = [kind for kind in options.planned() if kind.rpartition(" ")[2] in ("prepare", "baselines")]
    assert planned == [
        f"{name} {kind}" for name in ("ml100k", "ml100k_time") for kind in ("prepare", "prepare", "baselines")
    ]
    by_time = paper.Paper("ml100k_time", options, steps.RecordedSteps("x", "x", []))
    assert (by_time.config, by_time.tune_config) == ("configs/ml100k.yaml", "configs/ml100k_tune.yaml")
    assert by_time.folder.endswith("/ml100k_time")
    original = paper.Paper("ml100k", paper.parse([*words, "--settings", "original"]), by_time.steps)
    assert (original.config, original.tune_config) == ("configs/original.yaml", "configs/original_tune.yaml")
    assert original.prompts_config == "configs/paper_prompts.yaml"
    assert original._share_users(original.config) == ["--batch.users", "128"]  # on two ranks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", f"x={__file__}", "--hold_out", "time"], "takes --test_from"),
        (["--dataset", f"x={__file__}", "--test_from", "90%"], "both belong to it"),
        (["--dataset", f"x={__file__}", "--hold_out", "time", "--validation_from", "8"], "takes --test_from"),
        (["--dataset", "no-equals"], "is not NAME=FILE"),
        (["--dataset", "x=/no/such/file"], "there is no /no/such/file"),
        (["--dataset", f"x={__file__}", f"x={__file__}"], "choose another name"),
        (["--dataset", f"x={__file__}", "--k", "0"], "one of them at least 1"),
        (["--dataset", f"x={__file__}", "--k", "9"], "0 to 8 prompts"),
        (["--dataset", f"x={__file__}", "--minutes", "0"], "--minutes more than 0"),
        (["--dataset", f"x={__file__}", "--lists", "10"], "lists of 5 and 10 are always measured"),
        (["--dataset", f"x={__file__}", "--seeds", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        paper.main([*words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mean_and_sample_deviation():
    values = [0.05, 0.06, 0.055, 0.0525]
    made = seed_tables.mean_and_deviation(values)
    assert made["mean"] == pytest.approx(np.mean(values)) and made["sd"] == pytest.approx(np.std(values, ddof=1))
    assert seed_tables.mean_and_deviation([0.3]) == {"mean": 0.3, "sd": None, "values": [0.3]}
    with pytest.raises(ValueError, match="no value"):
        seed_tables.mean_and_deviation([])


def test_figures_are_taken_over_seeds_path_by_path():
    def result(value: float) -> dict[str, Any]:
        return {"masked": {"HR@5": value}, "unmasked": {"HR@5": value + 1}}

    made = seed_tables.over_seeds([{"recgpt": result(1), "only here": result(9)}, {"recgpt": result(3)}])
    assert list(made) == ["recgpt"]
    assert made["recgpt"]["masked"]["HR@5"] == {"mean": 2, "sd": pytest.approx(2**0.5), "values": [1, 3]}
    assert made["recgpt"]["unmasked"]["HR@5"]["mean"] == 3


def test_the_best_of_each_column_is_bold_and_missing_figures_are_dashes():
    def one(mean: float, sd: float | None = None) -> dict[str, Any]:
        return {"mean": mean, "sd": sd}

    lines = seed_tables.table("", ("a", "b"), [("x", [one(0.5, 0.01), one(0.1)]), ("y", [None, one(0.2)])])
    assert lines[2:] == ["| x | **0.5000** ± 0.0100 | 0.1000 |", "| y | – | **0.2000** |"]


def test_published_figures_have_four_cells_and_the_highest_is_the_highest():
    published = json.loads((Path(paper_report.__file__).parent / "published.json").read_text())
    rows = published["table_2"]
    for name in ("sports", "beauty", "toys", "yelp"):
        found = {row["name"]: row[name] for row in rows if name in row}
        assert all(len(cells) == 4 for cells in found.values())
        for column, best in enumerate(found["highest published"]):
            assert best >= max(cells[column] or 0 for cells in found.values())
