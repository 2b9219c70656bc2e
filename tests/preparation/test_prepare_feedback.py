"""Places, dislikes and skips of a raw log, and what of it a split reads; `test_spark.py` compares the engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.places import FIRSTS, PLACE_VALUES
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.prepare import summary
from tests.preparation.prepare_helpers import make, read_keys, read_sequences
from tests.preparation.test_prepare_bad_input import message

LOG = """user_id,item_id,timestamp,label,place
u,a,1,click,1
u,d,5,show,3
u,b,5,show,1
u,c,5,click,2
u,a,6,hide,1
u,e,7,skip,
u,b,9,show,2
u,e,9,click,40000
u,d,11,show,1
u,a,12,click,1
u,c,12,hide,2
u,b,13,show,
v,a,1,click,1
v,b,2,click,1
v,c,3,click,1
v,d,4,click,1
v,e,5,click,1
"""
WORDS: dict[str, Any] = {"click_values": ["click"], "dislike_values": ["hide"], "skip_values": ["skip"]}
OPTIONS: dict[str, Any] = {"click_column": "label", **WORDS, "position_column": "place", "min_count": 1}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log.csv").write_text(LOG)
    return tmp_path / "log.csv"


def entries_of(folder: Path, user: str = "u") -> list[tuple[Any, ...]]:
    """Item key, segment id, time and place of each entry."""
    names = ("item_ids", "segment_ids", "timestamps", "places")
    return list(zip(*(read_sequences(folder, name)[user] for name in names), strict=True))


EXPECTED = [
    ("a", 0, 1, 1),
    ("b", 2, 5, 1),  # of one request in the order of the list: b was above c, which was chosen, and d below
    ("c", 0, 5, 2),
    ("d", 2, 5, 3),
    ("a", 3, 6, 1),
    ("e", 4, 7, 0),
    ("b", 2, 9, 2),
    ("e", 0, 9, 32767),
    ("d", 2, 11, 1),
    ("a", 0, 12, 1),
    ("c", 3, 12, 2),
    ("b", 2, 13, 0),
]


def test_kinds_of_feedback_and_places_in_the_order_of_the_list(tmp_path: Path, log: Path) -> None:
    result = make(log, tmp_path / "data", **OPTIONS)
    assert entries_of(tmp_path / "data") == EXPECTED
    manifest = result.manifest
    assert manifest.feedback == ["shown", "disliked", "skipped"] and manifest.segments == 5
    exposed = manifest.preparation["exposed"]
    assert (exposed["left"], exposed["disliked"], exposed["skipped"]) == (8, 2, 1)
    schema = pq.read_table(tmp_path / "data" / "sequences").schema
    assert schema.field("places").type == pa.list_(pa.int16())
    text = summary(Prepare(input=["log.csv"], output="data", **OPTIONS), result)
    assert "8 kept after an interaction" in text and "of those kept 2 disliked and 1 skipped" in text
    assert "1 places are beyond 32,767" in text


def test_ranges_of_numbers_tell_dislikes_from_skips(tmp_path: Path) -> None:
    values = {"a": 5, "b": 1, "c": 2, "d": 3, "e": 3.5, "f": 4}
    rows = [f"u,{item},{time},{value}" for time, (item, value) in enumerate(values.items())]
    rows += [f"v,{item},1,5" for item in values]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp,rating", *rows]))
    options = {"click_column": "rating", "click_from": 4, "min_count": 1}
    for name, ranges, expected in (
        ("low dislikes", {"dislike_to": 2, "skip_to": 3}, [0, 3, 3, 4, 2, 0]),
        ("low skips", {"dislike_to": 3, "skip_to": 1}, [0, 4, 3, 3, 2, 0]),
        ("dislikes alone", {"dislike_to": 3.5}, [0, 3, 3, 3, 3, 0]),
    ):
        make(tmp_path / "log.csv", tmp_path / name, **options, **ranges)
        assert read_sequences(tmp_path / name, "segment_ids")["u"] == expected


def test_places_counted_from_0_and_of_clicks_alone(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,rank\nu,a,1,0\nu,b,1,NA\nu,c,1,7\n")
    manifest = make(
        tmp_path / "log.csv", tmp_path / "data", position_column="rank", position_from=0, min_count=1
    ).manifest
    assert read_sequences(tmp_path / "data", "places") == {"u": [1, 8, 0]}  # an unknown place is the last of a request
    assert read_sequences(tmp_path / "data") == {"u": ["a", "c", "b"]}
    assert manifest.feedback == [] and manifest.segments == 3


def test_of_the_same_row_a_dislike_outlives_one_that_was_shown(tmp_path: Path) -> None:
    rows = "u,a,1,click\nu,b,2,show\nu,b,2,hide\nu,b,2,skip\nu,b,3,click\n"
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp,label\n" + rows)
    make(tmp_path / "log.csv", tmp_path / "data", click_column="label", **WORDS, min_count=1, duplicates="drop")
    assert read_sequences(tmp_path / "data", "segment_ids") == {"u": [0, 3, 0]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dislike_values": ["hate"]}, "--dislike_values hate: no row has 'hate' in label, whose values are"),
        ({"skip_values": ["skip", "leap"]}, "no row has 'leap' in label"),
        ({"position_column": "label"}, "--position_column label: no usable row has a number in it"),
        ({"position_column": "rank"}, "no column 'rank' for the position; it has"),
        ({"position_from": 2}, "have a place below 2, the least is 1; give the number of the first place"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, log: Path, options: dict[str, Any], said: str) -> None:
    assert said in message(tmp_path, log, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ("1 2 0", "1 rows have a place below 1, the least is 0; if places are counted from 0, pass --position_from 0"),
        ("1 2.5 3", "1 rows have a place that is no whole number, such as 2.5"),
    ],
)
def test_places_that_are_none_are_refused(tmp_path: Path, places: str, said: str) -> None:
    rows = [f"u,{item},1,{place}" for item, place in zip("abc", places.split(), strict=True)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp,place", *rows]))
    assert said in message(tmp_path, tmp_path / "log.csv", position_column="place", min_count=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"dislike_to": 2},
            "--dislike_to is about a column that tells clicks from others; name it with --click_column",
        ),
        ({"skip_values": ["x"]}, "--skip_values is about a column"),
        ({"click_column": "r", "click_from": 3, "dislike_to": 3}, "it must be below --click_from, which is 3"),
        ({"click_column": "r", "click_from": 3, "dislike_to": 1, "skip_to": 1}, "are both 1"),
        ({"click_column": "r", "dislike_values": ["x"]}, "name those that are clicks: --click_values"),
        ({"click_column": "r", "click_values": ["x"], "skip_to": 0}, "give --skip_values"),
        ({"click_column": "r", "click_values": ["x"], "skip_values": ["x,y"]}, "'x' is in --click_values and in"),
        ({"click_column": "r", **WORDS, "skip_values": ["hide"]}, "'hide' is in --dislike_values and in --skip_values"),
        ({"position_from": 0}, "--position_from belongs to --position_column"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        Prepare(input=["x"], output="y", **options)


# ----------------------------------------------------------------------------------------------- what a split reads


def read(dataset: Dataset, split: Any, feedback: bool = True, **options: Any) -> list[tuple[str, int]]:
    """Item key and segment id of the entries that are read of user u."""
    inputs = Inputs(features=[Feature(name="place", values=PLACE_VALUES)])
    reader = HistoryReader(
        dataset=dataset, split=split, max_len=20, prompts=True, feedback=feedback, inputs=inputs, **options
    )
    histories = reader.read(row_groups(dataset))
    users, items = (read_keys(Path(dataset.path), name, f"{name[:-1]}_id") for name in ("users", "items"))
    (row,) = [row for row, user in enumerate(histories.users) if users[user] == "u"]
    entries = slice(*histories.offsets[row : row + 2])
    assert histories.segments is not None and histories.places is not None
    assert histories.places[entries].tolist() == [place for *_, place in EXPECTED][: entries.stop - entries.start]
    pairs = zip(histories.items[entries], histories.segments[entries], strict=True)
    if histories.known is not None:
        assert [bool(known) for known in histories.known[entries]] == [
            not (segment and time in (5, 9) and item == "b") for item, segment, time, _ in EXPECTED
        ][: entries.stop - entries.start]
    return [(items[item], int(segment)) for item, segment in pairs]


def test_a_request_reads_what_was_shown_before_it_and_nothing_of_its_own_list(tmp_path: Path, log: Path) -> None:
    make(log, tmp_path / "data", **OPTIONS)
    dataset, entries = Dataset.open(str(tmp_path / "data")), [entry[:2] for entry in EXPECTED]
    assert read(dataset, "training") == entries[:3]  # up to the target c
    assert read(dataset, "validation") == entries[:6]  # e is the target; b was shown in the same list
    assert read(dataset, "test") == entries[:9]  # a is the target, d was shown before
    assert read(dataset, "all") == entries
    for split, stop in (("validation", 3), ("test", 8), ("all", 10)):
        assert read(dataset, split, feedback=False) == entries[:stop]


def test_a_dataset_from_before_reads_as_before(tmp_path: Path, log: Path) -> None:
    make(log, tmp_path / "data", **OPTIONS)
    dataset = Dataset.open(str(tmp_path / "data"))
    dataset.manifest.feedback = ["disliked"]
    assert len(read(dataset, "test")) == 9
    dataset.manifest.feedback = []  # entries of segments 3 and 4 are then unknown
    with pytest.raises(Exception, match="segment id 3 is none of 0"):
        read(dataset, "test")


def test_buckets_of_places_are_exact_at_first_and_grow() -> None:
    buckets = np.searchsorted(FIRSTS, np.arange(40_000), side="right")
    assert buckets[:9].tolist() == list(range(9))
    assert (np.diff(buckets) >= 0).all() and buckets.max() == PLACE_VALUES - 1 == buckets[128] == buckets[32_767]
