"""`tools/compare_recbole.py` with another program in RecBole's place: what it is given, how its scores are ranked."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import walks, write_dataset
from tools import compare_recbole

STAND_IN = """#!{python}
import json, sys
import numpy as np
job = json.load(open(sys.argv[-1]))
rows = [line.split("\\t") for line in open(job["log"] + "/log.inter").read().splitlines()[1:]]
scores = np.full((job["users"], job["items"]), np.nan, np.float32)
for user in {{int(row[0]) for row in rows if int(row[2]) >= 2}}:
    scores[user] = np.random.default_rng(user).integers(0, 9, job["items"])
np.save(job["scores"], scores)
curve = [{{"epoch": 1, "seconds": 60.0, "NDCG@10": 0.5}}, {{"epoch": 2, "seconds": 90.0, "NDCG@10": 0.1}}]
json.dump({{"model": job["model"], "train_s": 90.0, "curve": curve, "log": rows}}, open(job["result"], "w"))
"""


def plain_metrics(histories: list[list[int]], items: int, k: int, masked: bool) -> tuple[float, float]:
    """HR and NDCG by a plain loop over users and items."""
    hits = gains = users = 0.0
    for user, history in enumerate(histories):
        if len(history) < 3:
            continue
        scores = np.random.default_rng(user).integers(0, 9, items).astype(float)
        *seen, target = history
        rank = sum(
            (scores[item] > scores[target]) + (scores[item] == scores[target]) / 2
            for item in range(items)
            if item != target and not (masked and item in seen)
        )
        users += 1
        if rank < k and not (masked and target in seen):
            hits, gains = hits + 1, gains + 1 / math.log2(rank + 2)
    return hits / users, gains / users


def test_scores_are_ranked_by_our_metrics_and_a_result_is_kept(tmp_path: Path, capsys) -> None:
    histories = [*walks(40, 30, shortest=1, longest=12), [3, 4, 3]]
    write_dataset(tmp_path / "data", histories, items=30)
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    words = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--models", "BPR"]
    words += ["--minutes", "2", "--python", str(python)]
    compare_recbole.main(words)
    result = json.loads((tmp_path / "out/BPR.json").read_text())
    assert result["log"] == [
        [str(user), str(item), str(place)] for user, items in enumerate(histories) for place, item in enumerate(items)
    ]
    for how in ("masked", "unmasked"):
        for k in (5, 10, 20):
            expected = plain_metrics(histories, 30, k, how == "masked")
            assert (result[how][f"HR@{k}"], result[how][f"NDCG@{k}"]) == pytest.approx(expected)
    text = (tmp_path / "out/report.md").read_text()
    assert f"| {result['masked']['NDCG@10']:.4f} |" in text and "| 1.0 | 1.5 |" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["BPR.json", "log", "report.json", "report.md"]

    python.write_text("#!/bin/false")  # a result that is there is not made again
    compare_recbole.main(words)
    with pytest.raises(SystemExit, match="other minutes"):
        compare_recbole.main([*words, "--minutes", "3"])
    with pytest.raises(SystemExit, match="GRU4Rec: RecBole ended with status 1"):
        compare_recbole.main([*words, "--models", "GRU4Rec"])


def test_without_recboles_environment_it_says_how_to_make_it(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_recbole.main(["--data", "d", "--python", str(tmp_path / "none")])
    assert ended.value.code == 2 and "run make recbole" in capsys.readouterr().err
