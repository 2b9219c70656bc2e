"""`pipelines/feedback.py` from a log to its report, and what the arm `as_interactions` is trained and measured on."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from pipelines import feedback
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.split import cut
from tests.pipelines.test_paper import InProcess, executor
from tests.preparation.prepare_helpers import make, read_sequences

__all__ = ["executor"]  # a fixture
TUNE = """
loss: {candidates: all}
batch: {tokens: 200}
train: {epochs: 1}
"""
CONFIG = TUNE + "model: {dim: 8, layers: 1, max_len: 10}"


def write_log(path: Path, users: int = 60, items: int = 25) -> Path:
    """Ratings 1 to 5, most of them 3 and more."""
    source = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id", "timestamp", "rating"))
        for user in range(users):
            for time in range(source.randrange(12, 25)):
                writer.writerow((f"u{user}", f"i{source.randrange(items)}", time, source.choice([1, 2, 3, 4, 5, 5])))
    return path


def test_from_a_log_to_the_report_and_done_once(tmp_path: Path, executor: InProcess) -> None:  # noqa: F811
    configs, out = tmp_path / "configs", tmp_path / "out"
    configs.mkdir()
    (configs / "tiny.yaml").write_text(CONFIG)
    (configs / "tiny_tune.yaml").write_text(TUNE)
    words = ["--input", str(write_log(tmp_path / "log.csv")), "--output", str(out), "--configs", str(configs)]
    words += ["--name", "tiny", "--seeds", "1", "--prompts", "exposed:2", "both:1"]
    feedback.main(words)
    assert len(executor.ran) == len(feedback.parse(words).planned())

    report = json.loads((out / "report.json").read_text())
    runs = ["pretrain", "without", "exposed_2", "both_1", "as_interactions"]
    assert list(report["results"]) == list(report["training"]) == runs
    on_test = json.loads((out / "tiny/seed0/exposed_2_test.json").read_text())["results"]
    assert (
        report["results"]["exposed_2"]["test one step"]["masked"]["HR@5"]["mean"]
        == on_test["recgpt_1"]["masked"]["HR@5"]
    )
    assert (
        report["results"]["exposed_2"]["test two steps"]["masked"]["HR@5"]["mean"]
        == on_test["recgpt"]["masked"]["HR@5"]
    )
    figures = [report["results"][run]["test one step"]["masked"]["NDCG@10"]["mean"] for run in ("both_1", "without")]
    assert report["differences"]["test one step"]["both_1"]["mean"] == pytest.approx(figures[0] - figures[1])
    best = json.loads((out / "tiny/seed0/without/best.json").read_text())["value"]
    assert report["results"]["without"]["validation"]["masked"]["NDCG@10"]["mean"] == best
    steps = [report["training"][run][0]["steps"] for run in runs[1:]]
    assert max(steps) - min(steps) <= 1  # the same effort for all
    users = {json.loads((out / f"tiny/seed0/{run}_test.json").read_text())["users"] for run in runs}
    assert len(users) == 1
    text = (out / "report.md").read_text()
    for part in ("minus that of the control", "test one step, unmasked", "co-occurrence", "--prompts.source exposed"):
        assert part in text

    feedback.main(words)
    assert len(executor.ran) == len(feedback.parse(words).planned())  # a second run starts no stage


def test_shown_rows_as_interactions_leave_ids_and_held_out_items_as_they_were(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv")
    made = make(log, tmp_path / "data", click_column="rating", click_from=3, min_count=5).manifest
    feedback.write_as_interactions(Dataset.open(str(tmp_path / "data")), tmp_path / "other.csv")
    other = make(tmp_path / "other.csv", tmp_path / "other", time_column=None).manifest
    assert other.vocabulary == made.vocabulary and other.interactions > made.interactions
    entries, segments = (read_sequences(tmp_path / "data", column) for column in ("item_ids", "segment_ids"))
    for user, items in read_sequences(tmp_path / "other").items():
        pairs = list(zip(entries[user], segments[user], strict=True))
        clicked = [item for item, segment in pairs if segment == 0]
        assert items[-3:] == clicked[-3:]  # the last two are held out, and no shown row is known just before them
        third_last = [place for place, (_, segment) in enumerate(pairs) if segment == 0][-3]
        assert items[:-3] == [item for item, _ in pairs[:third_last]]
    for split in ("validation", "test"):
        offsets = np.cumsum([0, *(len(items) for items in read_sequences(tmp_path / "other").values())])
        assert cut(offsets, split).row.size == made.users


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "/no/such/file"], "there is no /no/such/file"),
        (["--input", __file__, "--prompts", "shown:1"], "is not SOURCE:K"),
        (["--input", __file__, "--prompts", "exposed:9"], "K from 1 to 8"),
        (["--input", __file__, "--prompts", "both:1", "both:1"], "each kind once"),
        (["--input", __file__, "--seeds", "0"], "at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        feedback.main([*words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
