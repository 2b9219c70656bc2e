"""The dataset that tests of damaged ones damage."""

import shutil
from pathlib import Path

import pytest

from tests.data.reader_helpers import write_parts


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("undamaged") / "data")


@pytest.fixture
def data(undamaged, tmp_path) -> Path:
    return shutil.copytree(undamaged, tmp_path / "data")
