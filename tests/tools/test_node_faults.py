"""Two nodes on one machine: what becomes of a run when one of them is unplugged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults.nodes import explain_missing

MISSING = explain_missing()


@pytest.mark.alone
@pytest.mark.skipif(MISSING is not None, reason=f"no nodes can be made here: {MISSING}")
def test_a_run_whose_second_node_is_unplugged_ends_in_time_names_it_and_resumes_to_the_same_result(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tools.node_faults", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stall_seconds", "5", "--only", "training", "node 1 unplugged"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cell = json.loads((tmp_path / "cells" / "node_1_unplugged-training.json").read_text())
    assert cell["place"].startswith("a training step") and cell["ended"] and cell["seconds"] < 15
    assert cell["statuses"] == [70, -9] and cell["again"] == [0, 0] and cell["differences"] == []
    assert "rank 1: no heartbeat for" in cell["said"][0] and "on node1" in cell["said"][0]
