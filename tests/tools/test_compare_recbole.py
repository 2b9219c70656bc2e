"""`tools/compare_recbole.py`: what models are given, what is kept, and, where it is installed, RecBole itself."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import budgeted, compare_recbole, recbole_model
from tools.small_run import SmallAttribute, walks, write_dataset

STAND_IN = """#!{python}
import json, sys
job = json.load(open(sys.argv[-1]))
rows = [line.split("\\t") for line in open(job["log"] + "/log.inter").read().splitlines()]
figures = {{f"{{m}}@{{k}}": k / 1000 for k in (5, 10, 20, 50, 100) for m in ("HR", "NDCG")}}
best = {{"epochs": 1.0, "seconds": 60.0, "train_s": 48.0, "masked": 0.5, "unmasked": 0.4}}
json.dump({{
    "model": job["model"], "stopped": "minutes", "seconds": 90.0, "train_s": 70.0, "epochs": 1.5, "best": best,
    "curve": [best], "masked": figures, "unmasked": figures, "options": {{"embedding_size": 64}}, "parameters": 5,
    "log": rows, "program": sys.argv[-2], "minutes": job["minutes"],
}}, open(job["result"], "w"))
"""
REAL = Path(compare_recbole.ROOT / compare_recbole.ENVIRONMENT)


def stand_in(tmp_path: Path) -> Path:
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    return python


def test_a_model_gets_the_log_with_its_parts_and_a_result_is_kept(tmp_path: Path, capsys) -> None:
    histories = [*walks(40, 30, shortest=1, longest=12), [3, 4, 3]]
    write_dataset(tmp_path / "data", histories, items=30)
    python = stand_in(tmp_path)
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--models", "BPR"]
    words += ["--minutes", "2", "--python", str(python)]
    compare_recbole.main(words)
    result = json.loads((tmp_path / "out/BPR.json").read_text())
    expected = [["user_id:token", "item_id:token", "timestamp:float", "part:float"]]
    for user, items in enumerate(histories):
        held_out = {len(items) - 2: 1, len(items) - 1: 2} if len(items) >= 3 else {}
        expected += [[str(each) for each in (user, item, n, held_out.get(n, 0))] for n, item in enumerate(items)]
    assert result["log"] == expected and result["program"].endswith("tools/recbole_model.py")
    test = budgeted.read_part(tmp_path / "out/log", "test")
    long = [user for user, items in enumerate(histories) if len(items) >= 3]
    assert test.users.tolist() == long and test.targets.tolist() == [histories[user][-1] for user in long]
    assert test.history.to_lists() == [histories[user][:-1] for user in long]
    training = budgeted.read_part(tmp_path / "out/log", "training").history.to_lists()
    assert training == [items[:-2] if len(items) >= 3 else items for items in histories]

    text = (tmp_path / "out/report.md").read_text()
    assert "| BPR | 2 | 1.0 | 0.8 | 1.0 | 0.5000 | time over, 1.5 minutes |" in text
    assert "| BPR | 0.0050 | 0.0050 | 0.0100 |" in text and "BPR: embedding_size 64; 5 parameters" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["BPR.json", "log", "report.json", "report.md"]

    python.write_text("#!/bin/false")  # a result that is there is not made again
    compare_recbole.main(words)
    with pytest.raises(SystemExit, match="GRU4Rec ended with status 1"):
        compare_recbole.main([*words, "--models", "GRU4Rec"])
    for more, said in (
        (["--minutes", "3"], "has other minutes"),
        (["--models", "S3Rec"], "S3Rec needs an attribute"),
        (["--models", "SASRec", "--python", str(tmp_path / "none")], "run make recbole"),
        (["--attribute", "class"], "items have no attributes"),
    ):
        with pytest.raises(SystemExit, match="2"):
            compare_recbole.main([*words, *more])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out/SASRec.json").exists()
    other = [items[::-1] for items in histories]  # in another dataset's log in the same folder
    write_dataset(tmp_path / "other", other, items=30)
    stand_in(tmp_path)
    compare_recbole.main([*words, "--data", str(tmp_path / "other"), "--models", "NARM"])
    rows = json.loads((tmp_path / "out/NARM.json").read_text())["log"][1:]
    assert [int(row[1]) for row in rows] == [item for items in other for item in items]


def test_what_a_split_by_time_leaves_aside_is_neither_trained_on_nor_a_target(tmp_path: Path) -> None:
    histories, starts = [[5, 6, 7, 8, 9, 1], [2, 3, 4], [1, 2]], [(2, 4), (0, 1), (2, 2)]
    write_dataset(tmp_path / "data", histories, items=10, hold_out="time", starts=starts)
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--models", "BPR"]
    compare_recbole.main([*words, "--python", str(stand_in(tmp_path))])
    rows = json.loads((tmp_path / "out/BPR.json").read_text())["log"]
    parts = {user: [int(row[3]) for row in rows[1:] if row[0] == user] for user in "012"}
    # the first item of a history is no target; training is 0, validation 1, test 2, neither 3
    assert parts == {"0": [0, 0, 1, 3, 2, 3], "1": [3, 2, 3], "2": [0, 0]}


def test_by_default_all_models_are_trained_but_for_the_one_without_attributes(tmp_path: Path, capsys) -> None:
    write_dataset(tmp_path / "data", walks(20, 10), items=10)
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--python", str(stand_in(tmp_path))]
    for name in ("ComiRec-SA", "ComiRec-DR"):  # done before
        compare_recbole.main([*words, "--models", "BPR", "--threads", "1"])
        result = json.loads((tmp_path / "out/BPR.json").read_text())
        del result["settings"]["train_batch_size"]  # of RecBole's models alone
        (tmp_path / f"out/{name}.json").write_text(json.dumps(result))
    compare_recbole.main([*words, "--threads", "1"])
    said = capsys.readouterr().out
    assert "SASRec (5 of 5): up to 30 minutes, at most 30 left in all" in said and "S3Rec is left out" in said
    report = json.loads((tmp_path / "out/report.json").read_text())["models"]
    assert list(report) == [name for name in compare_recbole.MODELS if name != "S3Rec"]


def test_comirec_is_trained_and_measured_in_this_environment(tmp_path: Path) -> None:
    name = "ComiRec-DR"
    write_dataset(tmp_path / "data", walks(150, 20), items=20)
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--models", name]
    compare_recbole.main([*words, "--minutes", "0.03", "--threads", "1", "--python", str(tmp_path / "none")])
    result = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert result["users"] == 150 and result["curve"] and result["options"]["dim"] == 64
    assert 0 < result["masked"]["HR@10"] <= 1 and result["unmasked"]["HR@100"] == 1  # of 20 items
    assert result["best"]["masked"] == max(point["masked"] for point in result["curve"])


@pytest.mark.skipif(not REAL.exists(), reason=f"there is no {compare_recbole.ENVIRONMENT}: make recbole")
@pytest.mark.parametrize("name", recbole_model.MODELS)
def test_recbole_trains_each_model_on_our_split(name: str, tmp_path: Path) -> None:
    histories = [*walks(120, 20), [3, 4], [5]]  # the last two have nothing held out
    classes = SmallAttribute.draw("item", "class", 21, 4, multiple=True)
    write_dataset(tmp_path / "data", histories, items=21, attributes=[classes])  # the last item is not in the log
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--models", name]
    compare_recbole.main([*words, "--minutes", "0.1", "--threads", "1"])
    result = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert result["users"] == 120 and result["curve"]
    # all 20 items of the log come before the one without interactions; S3-Rec knows it by its attribute
    assert result["unmasked"]["HR@50" if name == "S3Rec" else "HR@20"] == 1 and 0 < result["masked"]["HR@10"] < 1
    if name != "BPR":  # whose history RecBole masks, but for a target in it
        assert result["test_by_recbole"] == pytest.approx(result["unmasked"]["NDCG@10"], abs=0.001)
    assert np.isfinite(list(result["masked"].values())).all()
    assert (result["pretraining"] is None) == (name != "S3Rec")
    if name == "S3Rec":
        assert result["pretraining"]["epochs"] > 0 and result["options"]["item_attribute"] == "class"
    assert sorted(os.listdir(tmp_path / "out")) == [f"{name}.json", "log", "report.json", "report.md"]
