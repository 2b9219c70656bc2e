"""All stages compute the recorded figures on a small log; refactoring must not change them.

On the kind of processor that recorded it, everything is equal to the last bit (`RECGPT_GOLDEN=exact` asks for that).
On others sums round otherwise: floats then agree within a tolerance, and nearly all prompts and lists are the same.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden.record import RECORD, WORLD_SIZES
from tests.golden.stages import all_stages
from tools.ranks import run_ranks

EXACT = os.environ.get("RECGPT_GOLDEN") == "exact"
TOLERANCE = 0.0 if EXACT else 2e-3
RANKING_TOLERANCE = 0.0 if EXACT else 0.02
"""Of HR and NDCG, where one user's rank may differ by one: three of 160 users."""
SAME = 1.0 if EXACT else 0.99
"""Share of ids that must be equal: a score that rounds otherwise may change an answer."""


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_stage_computes_what_was_recorded(world_size, tmp_path):
    run_ranks(all_stages, world_size, tmp_path, timeout=280)
    record = RECORD / f"{world_size}-ranks"
    compare_figures(
        json.loads((tmp_path / "figures.json").read_text()), json.loads((record / "figures.json").read_text())
    )
    compare_arrays(tmp_path / "arrays.npz", record / "arrays.npz")


def compare_figures(found: Any, wanted: Any, place: str = "") -> None:
    """Nested figures: the same keys, equal texts and counts, floats within the tolerance."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), place
        for name in wanted:
            compare_figures(found[name], wanted[name], f"{place}/{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), place
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            compare_figures(one, other, f"{place}/{number}")
    elif isinstance(wanted, float):
        tolerance = RANKING_TOLERANCE if "HR@" in place or "NDCG@" in place or "/recall/" in place else TOLERANCE
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), place
    elif EXACT or "/recall/" not in place:  # the m that is best on validation may be another by a hair
        assert found == wanted, place


def compare_arrays(found: Path, wanted: Path) -> None:
    """Arrays of the same shapes: ids of a dataset equal, those the model answered nearly all, floats within it."""
    with np.load(found) as now, np.load(wanted) as then:
        assert set(now.files) == set(then.files)
        for name in then.files:
            assert now[name].shape == then[name].shape and now[name].dtype == then[name].dtype, name
            if name.startswith("data "):
                assert np.array_equal(now[name], then[name]), name
            elif then[name].dtype.kind in "iu":
                assert (now[name] == then[name]).mean() >= SAME, name
            else:
                close = np.isclose(now[name], then[name], rtol=TOLERANCE, atol=TOLERANCE)
                assert close.mean() >= SAME, name
