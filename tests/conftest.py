"""Fixtures and settings every test shares."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared_machine", deadline=None)  # a busy core makes single examples slow, not wrong
settings.load_profile("shared_machine")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with Beauty.txt, Toys_and_Games.txt and ml-100k.inter, which no licence lets the project ship."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "Beauty.txt").exists():
        pytest.skip(f"the public data sets are not in {folder}")
    return folder
