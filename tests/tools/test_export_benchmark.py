"""The benchmark of exports: a way writes every item, and the delta holds the tenth that has moved."""

import argparse
from pathlib import Path

import pytest

from recgpt_torchrec.retrieval.exports.reading import open_export
from tools import write_dataset
from tools.benchmarks import export


def test_exports_and_deltas_are_measured(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_dataset.main(["--items", "3000", "--users", str(export.USERS), "--output", str(data)])
    kind = export.kind_of(3000, argparse.Namespace(dim=8, ranks=1), tmp_path)
    assert len(kind.ways) == 2 + 3 + 1 and len(kind.ratios) == 2 * 4
    figures = kind.ways["delta of a tenth, 1 ranks"]()
    assert figures["rows_s"] > 0 and figures["seconds"] > 0 and figures["peak_MiB"] >= 0
    assert open_export(str(tmp_path / "since")).manifest.items == 3000
    assert kind.ways["write_table, with ids and keys"]()["MB"] > 3000 * 8 * 4 / 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "since"]


def test_one_block_in_ten_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BLOCK_BYTES", 2**12)
    rows = 2**12 // (4 * 8)
    before, after = (list(export.blocks(5, 21 * rows, 8, moved)) for moved in (False, True))
    assert sum(ids.size for ids, _ in after) == 21 * rows - 5
    moved = [not (a == b).all() for (_, a), (_, b) in zip(before, after, strict=True)]
    assert sum(moved) == len(moved[::10])
