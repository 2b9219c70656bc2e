"""`pipelines/scaling.py`: its points on a small log, the logs of its shares, and its report."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import scaling, steps
from recgpt_torchrec.data.dataset import Dataset
from tests.pipelines.test_paper import InProcess
from tools import synthetic_log
from tools.small_run import walks, write_dataset

CONFIG = """
model: {dim: 8, layers: 1, max_len: 10}
loss: {candidates: all}
batch: {tokens: 200}
train: {epochs: 1}
"""


def small_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[InProcess, Path, list[str]]:
    """What runs the stages, the output folder, and the words of the command line."""
    executor = InProcess()
    monkeypatch.setattr(steps, "execute", executor)
    log, configs, out = tmp_path / "log.csv", tmp_path / "configs", tmp_path / "out"
    synthetic_log.main(["--output", str(log), "--users", "120", "--items", "60", "--mean_events", "10"])
    configs.mkdir()
    (configs / "paper.yaml").write_text(CONFIG)
    words = ["--dataset", f"tiny={log}", "--output", str(out), "--configs", str(configs), "--ranks", "1"]
    return executor, out, words


def test_every_point_is_trained_on_its_data_and_measured_on_the_same_users(tmp_path, monkeypatch):
    executor, out, words = small_log(tmp_path, monkeypatch)
    words += ["--layers", "2", "--dims", "16", "--shares", "0.5", "1"]
    scaling.main(words)
    stages = [command[2].rpartition(".")[2] for command in executor.ran]
    assert stages == ["prepare", "prepare", *4 * ["pretrain", "evaluate"]]

    points = json.loads((out / "report.json").read_text())["tiny"]
    shapes = [(point["axis"], point["value"], point["layers"], point["dim"]) for point in points]
    assert shapes == [("base", 1, 1, 8), ("layers", 2, 2, 8), ("dim", 16, 1, 16), ("share", 0.5, 1, 8)]
    tests = [json.loads(path.read_text()) for path in sorted((out / "tiny/seed0").glob("*_test.json"))]
    assert len(tests) == 4 and len({test["users"] for test in tests}) == 1
    for point, name in zip(points, ["base", "layers_2", "dim_16", "share_0.5"], strict=True):
        measured = json.loads((out / f"tiny/seed0/{name}_test.json").read_text())["results"]["pretrain"]["masked"]
        assert point["results"]["NDCG@10"]["mean"] == measured["NDCG@10"]
    whole, half = (Dataset.open(str(out / f"tiny/{name}")).manifest for name in ("data", "share_0.5"))
    assert half.vocabulary == whole.vocabulary and half.items == whole.items
    assert 0.3 < half.interactions / whole.interactions < 0.7
    text = (out / "report.md").read_text()
    assert "share: 1 layer, dim 8, 0.5 of the users" in text
    assert (out / "figures/tiny.png").read_bytes().startswith(b"\x89PNG")
    ran = len(executor.ran)
    scaling.main(words)
    assert len(executor.ran) == ran


def test_a_share_is_split_where_the_whole_log_is(tmp_path, monkeypatch):
    executor, out, words = small_log(tmp_path, monkeypatch)
    words.append("--layers")
    executor.interrupt_at = 2  # both datasets are prepared, nothing is trained
    with pytest.raises(SystemExit):
        scaling.main([*words, "--dims", "--shares", "0.5", "--hold_out", "time", "--test_from", "80%"])
    whole, half = (Dataset.open(str(out / f"tiny/{name}")).manifest.preparation for name in ("data", "share_0.5"))
    for boundary in ("test_from", "validation_from"):
        assert whole["split"][boundary] == half["split"][boundary] > 0
    (tmp_path / "configs/paper.yaml").write_text(f"{CONFIG}neighbours: {{share: 0.2}}\n")
    with pytest.raises(SystemExit, match="trains with neighbours"):
        scaling.main([*words, "--output", str(tmp_path / "other")])


def test_a_smaller_share_is_part_of_a_larger_one_and_histories_are_whole(tmp_path):
    histories = walks(users=40, items=15, seed=3)
    dataset = write_dataset(tmp_path / "data", histories)
    found = {}
    for share in (0.25, 0.5):
        file = tmp_path / f"{share}.parquet"
        scaling.write_share(dataset, file, share)
        rows = pq.read_table(file).to_pylist()
        users = [key for part in dataset.manifest.user_parts for key in keys(dataset, part)]
        items = [key for part in dataset.manifest.item_parts for key in keys(dataset, part)]
        kept: dict[int, list[int]] = {}
        for row in sorted(rows, key=lambda row: row["timestamp"]):
            kept.setdefault(users.index(row["user_id"]), []).append(items.index(row["item_id"]))
        assert len(kept) == round(share * 40)
        assert kept == {user: histories[user] for user in kept}
        found[share] = set(kept)
    assert found[0.25] < found[0.5]


def keys(dataset, part):
    with dataset.open_part(part) as parquet:
        return parquet.read(columns=["key"])["key"].to_pylist()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shares", "1.5"], "a share is more than 0 and at most 1"),
        (["--layers", "0"], "must be at least 1"),
        (["--hold_out", "time"], "takes --test_from"),
        (["--dataset", "tiny"], "is not NAME=FILE"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, capsys, words, said):
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id\n")
    with pytest.raises(SystemExit) as ended:
        scaling.main(["--dataset", f"tiny={log}", "--output", str(tmp_path / "out"), *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err
