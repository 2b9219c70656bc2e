"""Fixtures and settings every test shares."""

import os
from pathlib import Path

# One thread, in this process and in those it starts: sums round alike in every run, and a busy core does not stall two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Their checks are assertions of tests.
pytest.register_assert_rewrite("tests.distributed.training_helpers", "tests.tools.store_helpers")
settings.register_profile("shared_machine", deadline=None)  # a busy core makes single examples slow, not wrong
settings.load_profile("shared_machine")

LONGEST = (
    "tools/test_fuzz.py",
    "preparation/test_spark.py",
    "golden/test_golden.py",
    "launch/test_slurm.py",
    "distributed/test_reshard.py",
    "tools/test_check_gpu.py",
    "preparation/test_spark_faults.py",
    "preparation/test_spark_reading.py",
    "tools/test_benchmark.py",
    "tools/test_catalogue_benchmark.py",
    "tools/test_index_benchmark.py",
    "tools/test_kill_test.py",
    "tools/test_check_formats.py",
    "pipelines/test_daily.py",
    "pipelines/test_inputs.py",
    "pipelines/test_prompt_kinds.py",
    "checkpoints/test_storage.py",
    "distributed/test_signals.py",
    "catalogue/test_sharded.py",
    "model/test_fused_loss.py",
    "training/test_meter.py",
    "preparation/test_prepare_exposed.py",
    "preparation/test_reading_tables.py",
    "preparation/test_reading_values.py",
    "preparation/test_append.py",
    "test_appended_days.py",
    "test_events.py",
    "test_times.py",
)
"""Files of a dozen seconds and more, the longest first; `make test` deals files to processes in this order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONGEST` first: a long file that is dealt last leaves the other cores without work."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with Beauty.txt, Toys_and_Games.txt and ml-100k.inter, which no licence lets the project ship."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "Beauty.txt").exists():
        pytest.skip(f"the public data sets are not in {folder}")
    return folder
