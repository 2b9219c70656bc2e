"""`pipelines/ladder.py`: its rungs lead from the paper's settings to ours, and a small ladder is climbed once."""

import json
from pathlib import Path

import pytest

from pipelines import ladder, steps
from pipelines.ladder_rungs import PRETRAIN, TUNE, climb, read_options
from recgpt_torchrec.config import Pretrain, PromptTune
from tests.pipelines.test_paper import CONFIG, PROMPTS, InProcess
from tests.pipelines.test_paper import TUNE as TUNE_CONFIG
from tools import synthetic_log

ORIGINAL = """
model: {dim: 8, layers: 1, max_len: 10, activation: relu, history_in: false}
loss: {candidates: bce}
batch: {users: 30}
train: {epochs: 1}
"""
ORIGINAL_TUNE = """
tuning: {targets: last, predict_from: last}
batch: {users: 30}
train: {epochs: 1}
"""


@pytest.mark.parametrize(
    ("kind", "rungs", "ending", "ours"), [(Pretrain, PRETRAIN, "", "beauty"), (PromptTune, TUNE, "_tune", "paper_tune")]
)
def test_the_rungs_lead_from_the_papers_settings_to_ours_option_by_option(kind, rungs, ending, ours):
    ours = f"configs/{ours}.yaml"
    reached = read_options(kind, f"configs/original{ending}.yaml")
    made = climb(kind, rungs, f"configs/original{ending}.yaml", ours)
    for step in made:
        assert all(reached[name] != value for name, value in step.added.items()), step.rung
        reached |= step.added
    assert reached == read_options(kind, ours)
    # In the order of the rungs; ours may keep what the paper has, and trains with neighbours in no configuration.
    names = [step.rung.name for step in made]
    assert names == [rung.name for rung in rungs if rung.name in names]
    assert {rung.name for rung in rungs} - {*names} <= {"neighbours", "windows", "rest"}


def words_for(folder: Path, files: dict[str, str]) -> list[str]:
    """A log and a folder of configurations, the original ones and `files`, and the options for one seed of it."""
    log, configs = folder / "log.csv", folder / "configs"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    for name, text in {**files, "original": ORIGINAL, "original_tune": ORIGINAL_TUNE}.items():
        (configs / f"{name}.yaml").write_text(text)
    words = ["--dataset", f"tiny={log}", "--output", str(folder / "out"), "--configs", str(configs)]
    return [*words, "--seeds", "1", "--ranks", "1"]


def test_a_small_ladder_is_climbed_once_and_says_what_each_rung_gains(tmp_path, monkeypatch):
    executor = InProcess()
    monkeypatch.setattr(steps, "execute", executor)
    out = tmp_path / "out"
    files = {"paper": CONFIG, "paper_prompts": PROMPTS, "paper_tune": TUNE_CONFIG}
    files["tiny"] = f"{CONFIG}neighbours: {{share: 0.2}}\n"  # from one rung on
    words = [*words_for(tmp_path, files), "--rungs", "pretrain.original", "prompt_tune.soft_targets"]
    ladder.main(words)
    ran = len(executor.ran)
    # prepare and neighbours; two rungs of pre-training, from the last of which is tuned; one of tuning; each measured
    assert ran == 2 + 2 * 2 + 1 + 2
    stages = [command[2].rpartition(".")[2] for command in executor.ran]
    assert stages[:2] == ["prepare", "find_neighbours"] and stages.count("find_neighbours") == 1
    rows = json.loads((out / "report.json").read_text())["tiny"]
    names = [f"{row['stage']}.{row['rung']}" for row in rows]
    assert names == ["pretrain.original", "pretrain.batch", "prompt_tune.soft_targets"]
    trained = [command for command in executor.ran if command[2].endswith(("pretrain", "prompt_tune"))]
    original, batch, tuned = (" ".join(command) for command in trained)
    assert "--loss" not in original and "--loss.candidates all" in batch and "--model.activation gelu" in batch
    assert "--batch.users 0" in batch and "--tuning.soft_targets 0.3" in tuned
    path = f"--neighbours.path {executor.ran[1][executor.ran[1].index('--output') + 1]}"
    assert "--neighbours" not in original and path in batch and "--neighbours.share 0.2" in batch
    assert "--neighbours" not in tuned
    before = None
    for row, path in zip(rows, ["pretrain"] * 2 + ["recgpt"], strict=True):
        file = out / f"tiny/seed0/{row['stage']}/{row['rung']}_test.json"
        figures = json.loads(file.read_text())["results"][path]["masked"]
        assert row["results"][path]["NDCG@10"]["mean"] == figures["NDCG@10"]
        assert (row["gain"] or {}).get("NDCG@10", {}).get("mean") == (before and figures["NDCG@10"] - before)
        before = figures["NDCG@10"]
    text = (out / "report.md").read_text()
    assert "| `pretrain.batch` pretrain: smaller batches" in text and "gain in NDCG@10" in text
    ladder.main(words)
    assert len(executor.ran) == ran


def test_ours_without_a_choice_is_ours_with_the_papers_options_there(tmp_path, monkeypatch):
    executor = InProcess()
    monkeypatch.setattr(steps, "execute", executor)
    out = tmp_path / "out"
    ours = "model: {dim: 8, layers: 1, max_len: 10}\nloss: {candidates: all}\ntrain: {epochs: 1}\n"
    words = [*words_for(tmp_path, {"tiny": ours, "tiny_tune": TUNE_CONFIG}), "--rungs", "pretrain.batch"]
    without = [*words, "--without", "loss", "decoder"]
    assert ladder.Climb("tiny", ladder.parse(without)).last == "batch"
    ladder.main(without)
    rows = json.loads((out / "report.json").read_text())["tiny"]
    names = [f"{row['stage']}.{row['rung']}" for row in rows]
    assert names == ["pretrain.batch", "without.loss", "without.decoder"]
    runs = [out / "tiny/seed0" / run for run in ("pretrain/batch", "without/loss", "without/decoder")]
    whole, without_loss, without_decoder = (json.loads((run / "run.json").read_text())["config"] for run in runs)
    assert (whole["loss"]["candidates"], whole["model"]["activation"], whole["batch"]["users"]) == ("all", "gelu", 0)
    assert {name for name, value in without_loss.items() if value != whole[name]} == {"output", "loss"}
    assert without_loss["loss"] == {**whole["loss"], "candidates": "bce"}
    assert without_decoder["model"] == {**whole["model"], "activation": "relu"}
    tests = [json.loads(run.with_name(f"{run.name}_test.json").read_text()) for run in runs]
    figures = [test["results"]["pretrain"]["masked"] for test in tests]
    for row, own in zip(rows[1:], figures[1:], strict=True):
        for metric in ("HR@10", "NDCG@10"):
            assert row["gain"][metric]["mean"] == figures[0][metric] - own[metric]
    assert "| `without.loss` pretrain: softmax over all items" in (out / "report.md").read_text()
    assert ladder.parse(words).without == []
    assert ladder.parse([*words, "--without"]).without == [rung.name for rung in PRETRAIN[1:]]


def test_a_data_set_without_a_file_of_its_own_ends_at_what_the_preset_chooses_for_beauty():
    options = ladder.parse(["--dataset", f"toys={__file__}", f"beauty={__file__}"])
    toys, beauty = (ladder.Climb(name, options).rungs for name in ("toys", "beauty"))
    assert toys == beauty and any("model.history_in" in step.added for step in toys["pretrain"])


def test_an_unknown_rung_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        ladder.main(["--dataset", f"x={__file__}", "--rungs", "pretrain.magic", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and "choose among pretrain.original" in capsys.readouterr().err
