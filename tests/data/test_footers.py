"""Footers are read several at a time, once per dataset, and give what a plain loop over the parts gives."""

import threading

import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.errors import InputError
from tests.support import promise_of, walks, write_dataset


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "data", walks(40, 9), rows_per_group=2, groups_per_part=2)
    return tmp_path / "data"


def parts_of(folder) -> list:
    return [folder / part.path for part in Dataset.open(str(folder)).manifest.sequences]


def test_they_are_read_in_parallel_and_come_in_order(folder, monkeypatch):
    dataset = Dataset.open(str(folder))
    parts = dataset.manifest.sequences
    assert len(parts) == 10
    first_waits, read, opened = threading.Event(), Dataset.open_part, []

    def open_part(self, part):
        if part == parts[0]:  # it is answered last
            assert first_waits.wait(10)
        opened.append(part)
        if len(opened) == len(parts) - 1:
            first_waits.set()
        return read(self, part)

    monkeypatch.setattr(Dataset, "open_part", open_part)
    found = row_groups(dataset)
    assert opened[-1] == parts[0]
    expected = []
    for index, path in enumerate(parts_of(folder)):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                items = file.read_row_group(group, columns=["item_ids"])["item_ids"].to_pylist()
                expected.append(RowGroup(index, group, len(items), sum(map(len, items))))
    assert found == expected


def test_they_are_read_once_per_dataset(folder, monkeypatch):
    dataset, read = Dataset.open(str(folder)), Dataset.open_part
    opened: list = []
    told: list[int] = []

    def open_part(self, part):
        opened.append(part)
        return read(self, part)

    monkeypatch.setattr(Dataset, "open_part", open_part)
    first = row_groups(dataset, told.append)
    columns = dataset.columns
    assert len(opened) == len(told) == 10
    assert row_groups(dataset) == first and dataset.columns == columns and len(opened) == 10
    assert row_groups(Dataset.open(str(folder))) == first and len(opened) == 20


def test_of_several_damaged_parts_the_first_is_named(folder):
    dataset, paths = Dataset.open(str(folder)), parts_of(folder)
    sound = pq.read_table(paths[3])
    paths[7].write_bytes(b"PAR1" * 9)
    pq.write_table(sound.drop_columns("item_ids"), paths[3])
    vars(dataset.manifest.sequences[3]).update(promise_of(paths[3]))
    paths[5].write_bytes(b"")
    with pytest.raises(InputError, match=r"00003\.parquet has no column item_ids"):
        row_groups(dataset)
    pq.write_table(sound, paths[3])  # nothing is remembered of a part that could not be used
    vars(dataset.manifest.sequences[3]).update(promise_of(paths[3]))
    with pytest.raises(InputError, match=r"00005\.parquet cannot be read as Parquet"):
        row_groups(dataset)


def test_a_part_that_is_lost_after_it_was_read_is_lost(folder):
    dataset = Dataset.open(str(folder), damaged="skip")
    before = row_groups(dataset)
    part = dataset.manifest.sequences[4]
    dataset.lose_part(part, "was lost by an earlier run")
    after = row_groups(dataset)
    assert [group for group in after if group.part != 4] == [group for group in before if group.part != 4]
    assert [group for group in after if group.part == 4] == [RowGroup(4, 0, part.rows, part.items)]
