"""Fixtures and settings every test shares."""

import os
from pathlib import Path

# One thread, in this process and in those it starts: sums round alike in every run, and a busy core does not stall two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.distributed.training_helpers")  # its check is an assertion of tests
settings.register_profile("shared_machine", deadline=None)  # a busy core makes single examples slow, not wrong
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with Beauty.txt, Toys_and_Games.txt and ml-100k.inter, which no licence lets the project ship."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "Beauty.txt").exists():
        pytest.skip(f"the public data sets are not in {folder}")
    return folder
