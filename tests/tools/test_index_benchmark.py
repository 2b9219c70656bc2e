"""The benchmark of indexes: a toy size builds, opens and measures, and drawn vectors are as it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools.benchmarks import index


def test_a_toy_size_gives_a_table_and_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    words = ["--items", "3000", "--dim", "8", "--groups", "20", "--kinds", "ivf", "--queries", "30"]
    assert index.main([*words, "--set", "ivf.clusters=30", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    values = figures["kinds"]["ivf"]
    assert figures["items"] == 3000 and values["parameters"] == {"ivf.clusters": 30, "ivf.probes": 64}
    assert values["measured"]["recall@50"] == 1.0 and values["bytes"] > 3000 * 8 * 4
    for opened in ("cold", "one_thread", "all_threads"):
        assert values[opened]["open_seconds"] < 30 and values[opened]["queries_per_second"] > 0
    line = capfd.readouterr().out.splitlines()[-1].split()
    assert line[0] == "ivf" and line[3:5] == ["1.0000", "1.0000"]


def test_drawn_items_lie_in_groups_and_have_unequal_norms() -> None:
    items = np.concatenate(list(index.draw_items(70_000, 8, 20)))
    assert items.shape == (70_000, 8) and items.dtype == np.float32
    norms = np.linalg.norm(items, axis=1)
    assert np.percentile(norms, 90) > 1.5 * np.percentile(norms, 10)
    users = index.draw_users(items[::100], 50)
    closest = (users @ items[::100].T).max(axis=1)
    assert users.shape == (50, 8) and (closest > (users @ items[::100].mean(axis=0))).all()
