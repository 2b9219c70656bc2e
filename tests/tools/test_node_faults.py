"""Two nodes on one machine: what becomes of a run when one of them is unplugged."""

import json
import os
import pickle
import subprocess
import sys
import time
from datetime import UTC, datetime
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


def test_a_shifted_clock_is_that_of_every_module_and_is_understood_where_the_clock_is_right():
    """Also of modules imported afterwards: a launcher with two clocks took its own node for lost, and never started."""
    program = """
import datetime, pickle, sys, time, types
before = types.ModuleType("before"); exec("from datetime import datetime, UTC", before.__dict__)
sys.modules["before"] = before
from tools.faults.clock import shift_clock
true, since = datetime.datetime.now(datetime.UTC), time.monotonic()
shift_clock(30)
after = types.ModuleType("after"); exec("from datetime import datetime, UTC", after.__dict__)
assert before.datetime is after.datetime and isinstance(true, after.datetime)
assert abs(after.datetime.now(after.UTC).timestamp() - time.time()) < 5 and time.monotonic() - since < 5
sys.stdout.buffer.write(pickle.dumps(before.datetime.now(after.UTC) - datetime.timedelta(hours=1)))
"""
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    told = pickle.loads(done.stdout)
    assert type(told) is datetime and told.tzinfo is UTC
    assert abs(told.timestamp() - time.time() - 29 * 3600) < 10
