"""Runs all code of docs/vector_stores.md, and compares the lists that it finds with a plain loop."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tools.store_helpers import item_key, postgres_server, random_vectors, write_delta_folder, write_export_folder
from tools.documented.blocks import ROOT, commands, read_blocks
from tools.stores import __main__ as command

BLOCKS = [*read_blocks(ROOT / "docs" / "vector_stores.md")]
POSTGRES = "postgresql://postgres@localhost/postgres"
DIM = 8


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the exports and deltas that the page speaks of."""
    items = random_vectors(300, DIM)
    base = write_export_folder(tmp_path / "vectors/mine", items, random_vectors(20, DIM, seed=1))
    write_export_folder(tmp_path / "vectors/two", items, random_vectors(20, 2, DIM, seed=4))
    changes = [random_vectors(9, DIM, seed=2), random_vectors(20, DIM, seed=3, first=290)]
    first = write_delta_folder(tmp_path / "vectors/mine-0900", base.state, changes[0], [], 300)
    second = write_delta_folder(tmp_path / "vectors/mine-1000", first.state, changes[1], [], 310)
    now = {**items, **changes[0], **changes[1]}
    write_export_folder(tmp_path / "vectors/mine-now", now, random_vectors(20, DIM, seed=1), state=second.state)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def best_of(query: np.ndarray, without: list[str] | None = None) -> list[tuple[str, float]]:
    """The ten best items and their scores, by a plain loop."""
    scores = [(item_key(item), float(query @ vector)) for item, vector in random_vectors(300, DIM).items()]
    return sorted((pair for pair in scores if pair[0] not in (without or [])), key=lambda pair: -pair[1])[:10]


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_finds_the_lists_of_a_plain_loop(folder):
    for package in ("lancedb", "milvus_lite", "pgvector", "duckdb_extension_vss"):
        pytest.importorskip(package, reason="make stores installs it")
    query = random_vectors(20, DIM, seed=1)[0]
    names: dict[str, Any] = {}
    stores = 0
    with postgres_server() as uri:
        for block in (each.code for each in BLOCKS if each.language == "python"):
            names.pop("found", None)
            exec(compile(block.replace(POSTGRES, uri), "docs/vector_stores.md", "exec"), names)
            if "found" in names:
                stores += 1
                assert [key for key, _ in names["found"]] == [key for key, _ in best_of(query)], block
                np.testing.assert_allclose([score for _, score in names["found"]], [s for _, s in best_of(query)], 1e-4)
        names["database"].close()
    names["client"].close()
    assert stores == 4
    without = [key for key, _ in best_of(query, names["excluded"])]
    for name in ("by_lance", "by_milvus", "by_postgres", "by_duckdb"):
        assert names[name] == without, name
    two = random_vectors(20, 2, DIM, seed=4)[0]
    first, second = ([key for key, _ in best_of(vector)] for vector in two)
    assert names["merged"] == [*first[:9], next(key for key in second if key not in first[:9])]


def test_the_commands_of_the_page_run_in_order(folder, monkeypatch, capsys):
    pytest.importorskip("lancedb", reason="make stores installs it")
    lines = [line for block in BLOCKS if block.language == "bash" and not block.mark for line in commands(block.code)]
    assert [line.split()[3] for line in lines] == ["load", "apply", "show", "compare"]
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line)[2:])
        assert command.main() == 0, line
    assert "100.0% equal" in capsys.readouterr().out
