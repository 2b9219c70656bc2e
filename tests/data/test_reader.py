"""Damaged datasets: each damage is reported with its place, or skipped, counted and listed once on any ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.damage import SetAside
from recgpt_torchrec.data.reading.reader import Reader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from tests.data.reader_helpers import HISTORIES, PART, read_everything, remove_part
from tests.data.stream_helpers import MAX_LEN, expected_pairs, stream_of
from tests.support import change_json, overwrite, rewrite, walks, write_dataset


def put(column: str, value: Any, at: int | None = None) -> Callable[[list[dict[str, Any]]], None]:
    """Damage row 1 of row group 1: its whole value, or one entry."""

    def change(rows: list[dict[str, Any]]) -> None:
        if at is None:
            rows[5][column] = value
        else:
            rows[5][column][at] = value

    return change


def back_in_time(rows: list[dict[str, Any]]) -> None:
    rows[5]["timestamps"][1:3] = [7, 3]


ROWS = [
    (put("user_id", None), "the user id is null"),
    (put("user_id", -1), "user id -1 is outside 0 to 23"),
    (put("user_id", 24), "user id 24 is outside 0 to 23"),
    (put("item_ids", None), "the list of item_ids is null; a user without items has an empty one"),
    (put("item_ids", None, 2), "a value in item_ids is null"),
    (put("item_ids", -3, 0), r"item id -3 is outside the vocabulary \(0 to 8\)"),
    (put("item_ids", 9, -1), r"item id 9 is outside the vocabulary \(0 to 8\)"),
    (put("item_ids", 2**40, 1), "item id 1099511627776 is outside"),
    (put("segment_ids", None), "the list of segment_ids is null"),
    (put("segment_ids", None, 0), "a value in segment_ids is null"),
    (put("segment_ids", [0, 0]), r"the list of segment_ids has 2 values, its item_ids require \d"),
    (put("segment_ids", 3, 1), "segment id 3 is none of 0"),
    (put("timestamps", []), "the list of timestamps has 0 values"),
    (put("timestamps", None, 1), "a value in timestamps is null"),
    (back_in_time, "its times are not in order: 3 comes after 7"),
    (put("answer_ids", [1]), r"the list of answer_ids has 1 values, its item_ids require \d+"),
    (put("answer_ids", 9, 0), "answer id 9 is outside the vocabulary"),
    (put("answer_scores", []), "the list of answer_scores has 0 values"),
    (put("answer_scores", float("nan"), 1), "answer score nan is not a number"),
]


@pytest.mark.parametrize(("change", "reason"), ROWS, ids=[reason for _, reason in ROWS])
def test_a_damaged_row_is_named_with_part_row_group_and_row(data, change, reason):
    rewrite(data, change, part=1)
    dataset = Dataset.open(str(data), damaged="stop")
    reader, groups = Reader(dataset, answers=2, times=True), row_groups(dataset)
    assert sum(reader.read(group).table.num_rows for group in (*groups[:3], *groups[4:])) == 20
    place = f"{data}: {PART}, row group 1, row 1: {reason}"
    with pytest.raises(InputError, match=place + ".* run prepare again, or leave .*out: --stream.damaged skip"):
        reader.read(groups[3])


@pytest.mark.parametrize(("change", "reason"), ROWS, ids=[reason for _, reason in ROWS])
def test_a_damaged_row_that_is_set_aside_stays_as_a_user_without_history(data, change, reason):
    intact = Reader(Dataset.open(str(data)), answers=2, times=True)
    expected = [intact.read(group) for group in row_groups(intact.dataset)]
    rewrite(data, change, part=1)
    log = SetAside(str(data / "damaged.jsonl"), limit=1)
    reader = Reader(Dataset.open(str(data)), answers=2, times=True, set_aside=log)
    for number, group in enumerate(row_groups(reader.dataset)):
        rows, wanted = reader.read(group), expected[number].table.to_pylist()
        if number == 3:
            assert len(log.listed()) == 1
            wanted[1] = {"user_id": 0, **{name: [] for name in list(wanted[1])[1:]}}
        assert rows.table.to_pylist() == wanted
        assert rows.table.schema == expected[number].table.schema
        others = [row for row in range(4) if (number, row) != (3, 1)]
        assert rows.lengths[others].tolist() == expected[number].lengths[others].tolist()


def test_only_columns_that_are_read_are_checked(data):
    rewrite(data, back_in_time, part=1)
    rewrite(data, put("answer_ids", []), part=2)
    dataset = Dataset.open(str(data))
    for group in row_groups(dataset):
        assert Reader(dataset).read(group).table.schema.names == ["user_id", "item_ids", "segment_ids"]


def test_several_damaged_rows_of_a_group_are_counted_in_the_message(data):
    def change(rows: list[dict[str, Any]]) -> None:
        rows[1]["item_ids"][0], rows[2]["user_id"] = 77, None

    rewrite(data, change)
    dataset = Dataset.open(str(data))
    with pytest.raises(
        InputError, match=r"row 1: item id 77 .*\(and 1 more rows of this row group\); restore the file"
    ):
        Reader(dataset).read(row_groups(dataset)[0])


def test_other_types_of_whole_numbers_are_read_as_they_are(data):
    def tables() -> list[pa.Table]:
        dataset = Dataset.open(str(data))
        return [Reader(dataset, answers=2, times=True).read(group).table for group in row_groups(dataset)]

    expected = tables()
    types = {"user_id": pa.uint32(), "item_ids": pa.large_list(pa.int16()), "answer_scores": pa.list_(pa.float64())}
    rewrite(data, lambda rows: None, part=1, types=types)
    assert tables() == expected


# ------------------------------------------------------------------------------------------------ whole parts


def truncated(data: Path) -> None:
    (data / PART).write_bytes((data / PART).read_bytes()[:-50])


def without_footer(data: Path) -> None:
    overwrite(data / PART, slice(-300, None))


def with_changed_footer(data: Path) -> None:
    overwrite(data / PART, slice(-100, -99))


def of_other_rows(data: Path) -> None:
    def add_row(manifest: dict[str, Any]) -> None:
        manifest["sequences"][1]["rows"] += 1

    change_json(data / "manifest.json", add_row)


def with_types(**types: pa.DataType | None) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        def empty(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                row |= {name: None for name in types}

        rewrite(data, empty, part=1, types=types)

    return change


PARTS = [
    (remove_part, r"is missing \(the manifest promises 8 rows in \d+ bytes\)"),
    (truncated, r"is damaged: it has \d+ bytes, the manifest promises \d+"),
    (without_footer, "cannot be read as Parquet"),
    (
        with_changed_footer,
        r"cannot be read as Parquet \(the checksum of its footer is \w{8}, the manifest",
    ),
    (of_other_rows, "has 8 rows, the manifest promises 9"),
    (with_types(item_ids=None), "has no column item_ids, only .*user_id"),
    (with_types(user_id=None), "has no column user_id, only .*item_ids"),
    (with_types(segment_ids=None), "has no column segment_ids, which the dataset has"),
    (with_types(user_id=pa.string()), "has a column user_id of type string, it must be int64"),
    (with_types(item_ids=pa.int64()), "has a column item_ids of type int64, it must be list<item: int64>"),
    (with_types(item_ids=pa.list_(pa.float64())), "has a column item_ids of type list<element: double>"),
]


@pytest.mark.parametrize(("harm", "reason"), PARTS, ids=[reason for _, reason in PARTS])
def test_a_part_that_cannot_be_used_is_named(data, harm, reason):
    harm(data)
    with pytest.raises(InputError, match=f"{data}: the part {PART} {reason}.*; restore the file or run prepare again$"):
        row_groups(Dataset.open(str(data)))
    with pytest.raises(InputError, match="--stream.damaged skip$"):
        row_groups(Dataset.open(str(data), damaged="stop"))


@pytest.mark.parametrize(("harm", "reason"), PARTS, ids=[reason for _, reason in PARTS])
def test_a_part_that_is_set_aside_counts_with_the_rows_that_the_manifest_promises(data, harm, reason, tmp_path):
    harm(data)
    dataset = Dataset.open(str(data), damaged="skip")
    rows = dataset.manifest.sequences[1].rows
    log = SetAside(str(tmp_path / "damaged.jsonl"), limit=rows)
    stream = stream_of(dataset, set_aside=log)
    wanted = expected_pairs([h[:-1] if n // 8 != 1 else [] for n, h in enumerate(HISTORIES)], "newest", MAX_LEN)
    assert read_everything(stream) == wanted
    ((part, row_group, row, there, why),) = log.listed()
    assert (part, row_group, row, there) == (PART, None, None, rows) and why in dataset.lost_parts.values()
    assert log.summary() == f"Damaged: {rows} rows were left out, listed in {log.path}"
    with pytest.raises(InputError, match=f"{rows} rows are damaged, more than --stream.damaged_limit 7; .*{PART}"):
        stream_of(dataset, set_aside=SetAside(str(tmp_path / "other.jsonl"), limit=7))
    assert not (tmp_path / "other.jsonl").exists()


def test_a_checksum_that_differs_is_found_where_it_is_asked_for(data):
    path = data / PART
    path.write_bytes(path.read_bytes()[:400] + b"!" + path.read_bytes()[401:])
    assert Dataset.open(str(data)).lost_parts == {}
    with pytest.raises(InputError, match=f"{PART} is damaged: its checksum is .{{8}}, the manifest promises"):
        Dataset.open(str(data), checksums=True)
    assert list(Dataset.open(str(data), checksums=True, damaged="skip").lost_parts) == [PART]


def test_the_vocabulary_is_never_set_aside(data):
    (data / "items/part-00000.parquet").unlink()
    with pytest.raises(InputError, match="items/part-00000.parquet is missing .* run prepare again$"):
        Dataset.open(str(data), damaged="skip")


def test_a_row_group_that_cannot_be_read_counts_with_all_its_rows(tmp_path):
    histories = walks(400, 300, shortest=9)
    data = write_dataset(tmp_path / "data", histories, rows_per_group=100, groups_per_part=2)
    path = tmp_path / "data" / PART
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    overwrite(path, slice(column.data_page_offset, column.data_page_offset + 300))
    with pytest.raises(InputError, match=rf"{PART}, row group 0: cannot be read \(.*\); restore the file or run"):
        read_everything(stream_of(data))
    log = SetAside(str(tmp_path / "damaged.jsonl"), limit=100)
    kept = [h if not 200 <= n < 300 else [] for n, h in enumerate(histories)]
    assert read_everything(stream_of(data, set_aside=log, tokens=1000)) == expected_pairs(kept, "newest", MAX_LEN)
    ((part, row_group, row, rows, _),) = log.listed()
    assert (part, row_group, row, rows) == (PART, 0, None, 100)


# ------------------------------------------------------------------------------------------------ the manifest


def test_a_part_that_is_replaced_while_a_run_reads_it_is_named(data):
    dataset = Dataset.open(str(data))
    groups = row_groups(dataset)
    pq.write_table(pq.read_table(data / PART), data / PART, row_group_size=3)
    with pytest.raises(InputError, match=f"{PART} cannot be read as Parquet .the checksum of its footer is"):
        Reader(dataset).read(groups[2])
    dataset.manifest.sequences[1].footer = None  # as of an earlier version
    with pytest.raises(InputError, match=f"{PART}, row group 0: has 3 rows, it had 4 when its file was first opened"):
        Reader(dataset).read(groups[2])


def manifest_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda data: change_json(data / "manifest.json", change)


MANIFESTS = [
    (lambda data: (data / "manifest.json").unlink(), "is not a dataset: it has no manifest.json"),
    (lambda data: (data / "manifest.json").write_bytes(b"\xff{}"), "manifest.json is not valid JSON"),
    (lambda data: (data / "manifest.json").write_text("[1]"), "manifest.json is not valid JSON"),
    (manifest_with(lambda m: m.update(format_version=2)), "format version 2, .*; update the program, or run prepare"),
    (manifest_with(lambda m: m.update(format_version="x")), "format version x, .*; run prepare"),
    (manifest_with(lambda m: m.update(sequences=3)), "manifest.json is damaged: "),
    (manifest_with(lambda m: m["sequences"][0].pop("rows")), "manifest.json is damaged: .*'rows'"),
    (manifest_with(lambda m: m.update(colour="red")), "manifest.json is damaged: .*'colour'"),
    (manifest_with(lambda m: m.update(users="many")), "manifest.json is damaged: users is 'many'"),
    (manifest_with(lambda m: m["sequences"][0].update(rows=-1)), "damaged: rows of sequences/part-00000.parquet is -1"),
    (manifest_with(lambda m: m["sequences"].append(m["sequences"][0])), "damaged: it lists .*-00000.parquet more than"),
    (manifest_with(lambda m: m.update(users=0)), "is empty: 0 users, 9 items, "),
    (manifest_with(lambda m: m.update(sequences=[])), "is empty: 24 users, 9 items, 0 entries"),
]


@pytest.mark.parametrize(("harm", "reason"), MANIFESTS, ids=[reason for _, reason in MANIFESTS])
@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_a_manifest_that_cannot_be_used_is_refused_with_what_is_wrong(data, harm, reason, damaged):
    harm(data)
    with pytest.raises(InputError, match=f"{data}.*{reason}"):
        Dataset.open(str(data), damaged=damaged)
