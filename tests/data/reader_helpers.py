"""A dataset of three parts for the tests of damaged ones, and what is read of it."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from recgpt_torchrec.data.stream import SequenceStream
from tests.data.stream_helpers import pairs
from tests.support import walks, write_dataset

ITEMS = 9
HISTORIES = walks(24, ITEMS, shortest=4)
PART = "sequences/part-00001.parquet"


def write_parts(folder: Path) -> Path:
    """Three parts of two row groups of four users each; every column there is, two answers an item."""
    segments = [[0] * (len(h) - 1) + [1] for h in HISTORIES]
    answers = [[i % ITEMS for i in range(2 * (len(h) - 1))] for h in HISTORIES]
    more = {
        "answer_ids": pa.array(answers, pa.list_(pa.int64())),
        "answer_scores": pa.array([[0.5] * len(a) for a in answers], pa.list_(pa.float32())),
    }
    write_dataset(folder, HISTORIES, items=ITEMS, segments=segments, more=more, rows_per_group=4)
    return folder


def remove_part(data: Path) -> None:
    (data / PART).unlink()


def read_everything(stream: SequenceStream, epoch: int = 0) -> Counter:
    """All positions that are predicted in an epoch; every interaction of the dataset is accounted for."""
    found: Counter = Counter()
    read = 0.0
    for batch in stream.batches(epoch):
        found.update(pairs(batch))
        assert batch.histories.read is not None
        read += batch.histories.read.sum()
    assert read == pytest.approx(stream.dataset.manifest.entries)
    return found
