"""`pipelines/prompt_kinds.py`: kinds of prompts from finished models of `pipelines/paper.py`, and what it counts."""

import json

import numpy as np
import pytest

from pipelines import paper, prompt_kinds, steps
from pipelines.prompt_kinds import BY_NAME, CONTROL, KINDS, count_foretold
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.split import Starts
from recgpt_torchrec.prompts.intervals import Intervals
from tests.pipelines.test_paper import ANSWERS, CONFIG, PROMPTS, STUDENT, TUNE, InProcess
from tests.support import change_json, read_sequences
from tools import synthetic_log


def test_every_kind_is_tuned_on_with_the_controls_loss_and_steps_and_done_once(tmp_path, monkeypatch, capsys):
    executor = InProcess()
    monkeypatch.setattr(steps, "execute", executor)
    log, configs, out = tmp_path / "log.csv", tmp_path / "configs", tmp_path / "out"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    files = {"": CONFIG, "_prompts": PROMPTS, "_tune": TUNE, "_student": STUDENT, "_answers": ANSWERS}
    for ending, text in files.items():
        (configs / f"paper{ending}.yaml").write_text(text)
    common = ["--seeds", "1", "--ranks", "1"]
    made = ["--dataset", f"tiny={log}", "--output", str(tmp_path / "paper"), "--k", "1", "--configs", str(configs)]
    paper.main([*made, *common])
    executor.ran.clear()
    kinds = ["drawn", "seen", "teacher", "last"]
    words = ["--paper", str(tmp_path / "paper"), "--dataset", "tiny", "--output", str(out), "--kinds", *kinds, *common]
    prompt_kinds.main(words)
    commands = [" ".join(command) for command in executor.ran]
    # Prompts of best (control, last), drawn, seen and teacher; soft: drawn and its control; hard: all and theirs.
    assert sum("generate_prompts" in command for command in commands) == 4
    tunings = [command for command in commands if "prompt_tune" in command]
    assert len(tunings) == 2 + 5 and len(commands) == 4 + 2 * len(tunings)
    assert sum("--tuning.soft_targets 0.0" in command for command in tunings) == 5
    assert sum("--tuning.prompts false" in command for command in tunings) == 2
    assert sum("--tuning.predict_from last" in command for command in tunings) == 1
    assert sum("paper/tiny/seed0/teacher " in command for command in commands) == 1
    assert sum("out/tiny/seed0/drawn/prompts --output" in command for command in tunings) == 3
    steps_of = {
        json.loads((out / f"tiny/seed0/{kind}/{loss}/best.json").read_text())["checkpoint"]
        for loss, kind in [("soft", "none_drawn"), ("soft", "drawn"), *(("hard", kind) for kind in [CONTROL, *kinds])]
    }
    assert len(steps_of) == 1  # as many optimizer steps

    rows = json.loads((out / "report.json").read_text())["tiny"]
    assert [(row["loss"], row["kind"], row["control"]) for row in rows] == [
        ("soft", "none_drawn", None),
        ("soft", "drawn", "none_drawn"),
        ("hard", CONTROL, None),
        *(("hard", kind, CONTROL) for kind in kinds),
    ]
    for row in rows:
        path = "fine_tuning" if row["control"] is None else "recgpt_1"
        measured = json.loads((out / f"tiny/seed0/{row['kind']}/{row['loss']}_test.json").read_text())["results"][path]
        assert row["results"]["NDCG@10"]["mean"] == measured["masked"]["NDCG@10"]
        control = next(
            each for each in rows if (each["loss"], each["kind"]) == (row["loss"], row["control"] or row["kind"])
        )
        expected = row["results"]["HR@50"]["mean"] - control["results"]["HR@50"]["mean"]
        assert (row["gain"] or {}).get("HR@50", {"mean": 0.0})["mean"] == pytest.approx(expected)
    drawn = next(row for row in rows if row["kind"] == "drawn")
    assert drawn["foretold"] == foretold_by_hand(out / "tiny/seed0/drawn/prompts")
    text = (out / "report.md").read_text()
    assert "| `drawn`: drawn among its 50 best" in text and "tiny, hard" in text

    prompt_kinds.main(words)
    assert len(executor.ran) == len(commands)
    best = tmp_path / "paper/tiny/seed0/pretrain/best.json"
    model = best.read_text()
    change_json(best, lambda told: told.update(value=0))
    assert refusal(words, capsys).count("was run with other options or inputs before") == 1
    best.write_text(model)
    assert "seed1/pretrain; run pipelines/paper.py" in refusal([*words, "--seeds", "2"], capsys)
    assert "nothing is left of --kinds seen" in refusal([*words, "--kinds", "seen", "--losses", "soft"], capsys)
    (configs / "paper_tune.yaml").write_text(TUNE.replace("0.3", "0.4"))
    assert "paper_tune.yaml has changed since tiny/seed0/fine_tuning was made with it" in refusal(words, capsys)
    assert len(executor.ran) == len(commands)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the pipeline says when it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        prompt_kinds.main(words)
    return capsys.readouterr().err + str(ended.value)


def foretold_by_hand(folder) -> dict[str, float]:
    """Row by row: every user of the log has at least three items, the last two of which are held out."""
    counts = {part: [0, 0] for part in ("training", "validation", "test")}
    rows = read_sequences(folder)
    assert Dataset.open(str(folder)).manifest.hold_out == "last"
    for items, segments in zip(rows["item_ids"], rows["segment_ids"], strict=True):
        chosen = [place for place, segment in enumerate(segments) if segment == 0]
        for number, (first, second) in enumerate(zip(chosen, chosen[1:], strict=False), 2):
            part = {0: "test", 1: "validation"}.get(len(chosen) - number, "training") if len(chosen) > 2 else "training"
            prompts = items[first + 1 : second]
            counts[part][0] += bool(prompts)
            counts[part][1] += items[second] in prompts
    return {part: hits / all_ for part, (all_, hits) in counts.items()}


def test_foretold_counts_each_interaction_in_its_part_and_only_where_prompts_precede_it():
    # Users 0: a b c d e (training a b c), 1: a b (no held-out part); -1 is an interval without prompts.
    histories = Intervals(
        users=np.arange(2),
        items=np.array([1, 2, 3, 4, 5, 6, 7]),
        offsets=np.array([0, 5, 7]),
        prompts=np.array([[2, 9], [9, 8], [4, -1], [-1, -1], [5, 5], [9, 7], [-1, -1]]),
        segments=np.zeros((7, 2), np.int8),
        answers=np.zeros((7, 0), np.int64),
        answer_scores=np.zeros((7, 0), np.float32),
    )
    counts = count_foretold(histories, Starts.of(np.array([5, 2]), "last"))
    assert counts.tolist() == [[3, 2], [1, 1], [0, 0]]  # 2, 3 and 7 in training; 4 in validation; 5 has no prompts


def test_every_kind_has_its_prompts_and_its_control():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    for kind in KINDS:
        assert BY_NAME[kind.made_as].prompts == kind.prompts or kind.tuning
        for loss in kind.losses:
            control = kind.control(loss)
            assert control is None or (control in names and loss in BY_NAME[control].losses)
