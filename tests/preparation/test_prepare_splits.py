"""What `prepare --hold_out` holds out, against plain loops over the rows."""

import json
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.data.candidates import training_counts
from recgpt_torchrec.data.dataset import Dataset, Manifest, histories_fingerprint
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.prepare import summary
from tests.preparation.prepare_helpers import Row, make, random_log, read_keys, read_sequences, write_csv

EVENTS = st.lists(
    st.tuples(st.sampled_from("uvw"), st.sampled_from("abcdef"), st.integers(0, 9)), min_size=3, max_size=40
)


def read_starts(folder: Path) -> dict[str, tuple[int, int]]:
    """User key -> validation_start and test_start."""
    table = pq.read_table(folder / "sequences")
    starts = zip(table["validation_start"].to_pylist(), table["test_start"].to_pylist(), strict=True)
    return dict(zip(read_keys(folder, "users", "user_id"), starts, strict=True))


def read_train_counts(folder: Path) -> dict[str, int]:
    table = pq.read_table(folder / "items")
    return dict(zip(table["key"].to_pylist(), table["train_count"].to_pylist(), strict=True))


def check_dataset(folder: Path, manifest: Manifest, parts: list[list[Row]]) -> None:
    """Compare a dataset with the rows of its training, validation and test part, each in order."""
    users = sorted({row[0] for part in parts for row in part})
    histories = {user: [[row[1] for row in part if row[0] == user] for part in parts] for user in users}
    assert read_sequences(folder) == {user: sum(histories[user], []) for user in read_keys(folder, "users", "user_id")}
    starts = {user: (len(train), len(train) + len(valid)) for user, (train, valid, _) in histories.items()}
    assert read_starts(folder) == starts
    trained = Counter(row[1] for row in parts[0])
    items = {row[1] for part in parts for row in part}
    assert read_train_counts(folder) == {item: trained[item] for item in items}
    targets = [item for train, _, _ in histories.values() for item in train[1:]]
    record = manifest.preparation["split"]
    assert record["interactions"] == dict(zip(("training", "validation", "test"), map(len, parts), strict=True))
    assert record["training_targets"] == len(targets)
    assert record["items_without_target"] == len(items - set(targets))
    has_validation = [user for user, (train, valid, _) in histories.items() if train and valid]
    has_test = [user for user, (train, valid, test) in histories.items() if train + valid and test]
    assert (record["validation_users"], record["test_users"]) == (len(has_validation), len(has_test))
    unused = 0
    for user, (_, valid, test) in histories.items():
        unused += len(test) - 1 if user in has_test else len(valid) + len(test) - (user in has_validation)
    assert record["unused"] == unused


def order(rows: list[Row]) -> list[Row]:
    """By time; equal times keep the order of the log."""
    return sorted(rows, key=lambda row: row[2])


@hypothesis_settings(max_examples=20)
@given(rows=EVENTS, data=st.data())
def test_by_time_the_parts_begin_at_the_boundaries(tmp_path_factory, rows: list[Row], data: st.DataObject) -> None:
    times = sorted(row[2] for row in rows)
    assume(len(set(times)) > 2)
    validation, test = sorted(data.draw(st.permutations(sorted(set(times))[1:]))[:2])
    folder = tmp_path_factory.mktemp("time")
    options: dict[str, Any] = {"hold_out": "time", "test_from": str(test), "validation_from": str(validation)}
    made = make(write_csv(folder / "log.csv", rows), folder / "data", **options).manifest
    edges = (-1, validation, test, 99)
    parts = [[r for r in order(rows) if low <= r[2] < high] for low, high in zip(edges, edges[1:], strict=False)]
    check_dataset(folder / "data", made, parts)
    split = made.preparation["split"]
    assert made.hold_out == "time" and (split["validation_from"], split["test_from"]) == (validation, test)


@hypothesis_settings(max_examples=15)
@given(rows=EVENTS, percent=st.integers(1, 99))
def test_a_share_is_the_time_before_which_that_share_lies_and_validation_is_as_large_as_test(
    tmp_path_factory, rows: list[Row], percent: int
) -> None:
    times = sorted(row[2] for row in rows)
    test = times[math.floor(len(times) * percent / 100)]
    tested = sum(time >= test for time in times)
    folder = tmp_path_factory.mktemp("share")
    log, options = write_csv(folder / "log.csv", rows), {"hold_out": "time", "test_from": f"{percent}%"}
    validation = times[len(times) - 2 * tested] if 2 * tested < len(times) else times[0]
    if times[0] == test or times[0] == validation:
        with pytest.raises(InputError, match="before all interactions|nothing is left to train on"):
            make(log, folder / "data", **options)
        return
    made = make(log, folder / "data", **options).manifest.preparation["split"]
    assert (made["validation_from"], made["test_from"]) == (validation, test)
    assert made["interactions"]["test"] == tested <= made["interactions"]["validation"]


@hypothesis_settings(max_examples=15)
@given(parts=st.lists(EVENTS, min_size=2, max_size=3), timed=st.booleans())
def test_given_files_are_the_parts_each_in_its_own_order(tmp_path_factory, parts: list[list[Row]], timed: bool) -> None:
    folder = tmp_path_factory.mktemp("given")
    files = [str(write_csv(folder / f"{number}.csv", part)) for number, part in enumerate(parts)]
    options: dict[str, Any] = {"hold_out": "given", "test_input": files[-1:], "validation_input": files[1:-1]}
    options["time_column"] = "timestamp" if timed else None
    made = make(files[:1], folder / "data", **options).manifest
    train, *valid, test = [order(part) if timed else part for part in parts]
    check_dataset(folder / "data", made, [train, *(valid or [[]]), test])
    assert [file["part"] for file in made.preparation["inputs"]] == ["training", "validation", "test"][
        :: 4 - len(parts)
    ]
    dataset = Dataset.open(str(folder / "data"))
    reader = HistoryReader(dataset=dataset, split="training", max_len=99, time_order=timed)
    reader.read(row_groups(dataset))  # times that decrease from one part to the next are no damage


def test_several_files_of_a_part_are_put_in_order_together(tmp_path: Path) -> None:
    files = [
        str(write_csv(tmp_path / f"{number}.csv", [("u", f"{number}{time}", time) for time in (number, 9)]))
        for number in range(4)
    ]
    made = make(files[1::-1], tmp_path / "data", hold_out="given", test_input=files[2:])
    assert read_sequences(tmp_path / "data") == {"u": ["00", "11", "19", "09", "22", "33", "29", "39"]}
    assert read_starts(tmp_path / "data") == {"u": (4, 4)}
    assert not made.manifest.has_validation and made.manifest.count_targets("validation") == 0


def test_none_and_last_are_the_same_sequences_that_mean_other_training_parts(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(200, users=9, items=8))
    last, none = (make(log, tmp_path / name, hold_out=name).manifest for name in ("last", "none"))
    assert [part.checksum for part in last.sequences] == [part.checksum for part in none.sequences]
    assert last.vocabulary == none.vocabulary
    opened = [Dataset.open(str(tmp_path / name)) for name in ("last", "none")]
    assert histories_fingerprint(opened[0]) != histories_fingerprint(opened[1])
    counts = pq.read_table(tmp_path / "none/items")
    assert counts["train_count"] == counts["count"]
    assert none.preparation["split"]["interactions"] == {"training": 200, "validation": 0, "test": 0}
    assert "hold_out" not in json.loads((tmp_path / "last/manifest.json").read_text())
    assert last.settings["hold_out"] == "last"
    assert json.loads((tmp_path / "none/manifest.json").read_text())["hold_out"] == "none"
    with pytest.raises(InputError, match="hold_out: last there, none now"):
        make(log, tmp_path / "last", hold_out="none")
    assert make(log, tmp_path / "none", hold_out="none").already_there


def test_a_file_that_moved_to_another_part_is_another_dataset(tmp_path: Path) -> None:
    one, two, three = (str(write_csv(tmp_path / f"{n}.csv", [("u", "a", n), ("u", "b", n)])) for n in range(3))
    make([one], tmp_path / "data", hold_out="given", validation_input=[two], test_input=[three])
    again = make([one], tmp_path / "data", hold_out="given", validation_input=[two], test_input=[three])
    assert again.already_there
    with pytest.raises(InputError, match=r"input files differ: .*1\.csv"):
        make([one, two], tmp_path / "data", hold_out="given", test_input=[three])


@pytest.mark.parametrize("split", ["time", "given"])
def test_shown_rows_decide_nothing(tmp_path: Path, split: str) -> None:
    """Boundaries, counts and parts are those of the log without them, and no split's history ends with one."""
    rows = random_log(400, users=9, items=8)
    clicked = [(*row, int(number % 3 > 0)) for number, row in enumerate(rows)]
    cut = sorted(row[2] for row in rows)[300]

    def write(name: str, wanted: list[tuple[str, str, int, int]]) -> str:
        lines = ["user_id,item_id,timestamp,click", *(",".join(map(str, row)) for row in wanted)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    manifests = {}
    for name, chosen in (("all", clicked), ("clicks", [row for row in clicked if row[3]])):
        options: dict[str, Any] = {"hold_out": split, "click_column": "click"} if name == "all" else {"hold_out": split}
        inputs = [write(f"{name}.csv", chosen)]
        if split == "time":
            options["test_from"] = "80%"
        else:
            inputs = [write(f"{name}-1.csv", [row for row in chosen if row[2] < cut])]
            options["test_input"] = [write(f"{name}-2.csv", [row for row in chosen if row[2] >= cut])]
        manifests[name] = make(inputs, tmp_path / name, **options).manifest
    assert manifests["all"].preparation["split"] == manifests["clicks"].preparation["split"]
    assert manifests["all"].preparation["exposed"]["left"] > 20
    assert read_starts(tmp_path / "all") == read_starts(tmp_path / "clicks")
    assert read_train_counts(tmp_path / "all") == read_train_counts(tmp_path / "clicks")
    for part in ("training", "validation", "test"):
        found = []
        for name, prompts in (("all", False), ("clicks", False), ("all", True)):
            dataset = Dataset.open(str(tmp_path / name))
            reader = HistoryReader(dataset=dataset, split=part, max_len=999, prompts=prompts)
            found.append(reader.read(row_groups(dataset)))
        assert found[0].items.tolist() == found[1].items.tolist()
        assert found[0].offsets.tolist() == found[1].offsets.tolist()
        segments, ends = found[2].segments, found[2].offsets[1:][found[2].lengths > 0]
        assert segments is not None and not segments[ends - 1].any()


def test_nothing_at_or_after_the_test_boundary_influences_training_or_validation(tmp_path: Path) -> None:
    """Rows after it get other users, items and times; histories, counts of candidates and targets stay."""
    rows = order(random_log(600, users=20, items=12))
    test, validation = rows[500][2], rows[400][2]
    later = rows[500:]
    changed = [(a[0], b[1], 10**6 - c[2]) for a, b, c in zip(later, later[::-1], later[7:] + later[:7], strict=True)]
    changed += [(row[0], later[0][1], 10**6) for row in later[:40]]
    assert {row[0] for row in rows[:400]} == {f"u{n}" for n in range(20)}
    found = []
    for name, log in (("one", rows), ("other", rows[:500] + changed)):
        options: dict[str, Any] = {"hold_out": "time", "test_from": str(test), "validation_from": str(validation)}
        make(write_csv(tmp_path / f"{name}.csv", log), tmp_path / name, **options)
        dataset = Dataset.open(str(tmp_path / name))
        inputs: list[Any] = [dataset.manifest.vocabulary, training_counts(dataset).tolist()]
        for part in ("training", "validation"):
            reader = HistoryReader(dataset=dataset, split=part, max_len=20)
            histories = reader.read(row_groups(dataset))
            inputs += [histories.users.tolist(), histories.items.tolist(), histories.offsets.tolist()]
            inputs.append(None if histories.held_out is None else histories.held_out.tolist())
        found.append((inputs, read_sequences(tmp_path / name)))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize("first", ["last", "time", "given", "none"])
@pytest.mark.parametrize("second", ["last", "time", "given", "none"])
def test_an_extended_dataset_marks_what_the_earlier_training_part_held(tmp_path: Path, first: str, second: str) -> None:
    """With `given`, the earlier training part holds later interactions than its test part."""
    rows = order(random_log(240, users=8, items=9))
    early, files = rows[:160], {}
    given_parts = {"train": early[::2] + early[-9:], "test": [row for row in early[1::2] if row not in early[-9:]]}
    given_parts["train"] = list(dict.fromkeys(given_parts["train"]))
    logs = {"early": early, "all": rows, **given_parts, "late": rows[160:]}
    for name, chosen in logs.items():
        files[name] = str(write_csv(tmp_path / f"{name}.csv", chosen))
    options: dict[str, dict[str, Any]] = {name: {"hold_out": name} for name in ("last", "time", "given", "none")}
    options["time"] |= {"test_from": "80%"}
    inputs = [files["train"]] if first == "given" else [files["early"]]
    make(inputs, tmp_path / "old", **options[first], **({"test_input": [files["test"]]} if first == "given" else {}))
    inputs = [files["early"]] if second == "given" else [files["all"]]
    more = {"test_input": [files["late"]]} if second == "given" else {}
    manifest = make(inputs, tmp_path / "new", vocabulary=str(tmp_path / "old"), **options[second], **more).manifest

    old = {user: [row for row in early if row[0] == user] for user in {row[0] for row in early}}
    if first == "last":
        trained = {row for rows_of in old.values() for row in (rows_of[:-2] if len(rows_of) >= 3 else rows_of)}
    elif first == "time":
        trained = {row for row in early if row[2] < early[160 - 2 * 32][2]}
    else:
        trained = set(given_parts["train"] if first == "given" else early)
    marks = {user: [int(row in trained) for row in rows if row[0] == user] for user in {row[0] for row in rows}}
    assert read_sequences(tmp_path / "new", "trained") == marks
    ends = {user: len(rows_of) for user, rows_of in marks.items()}
    if second == "last":
        ends = {user: length - 2 if length >= 3 else length for user, length in ends.items()}
    elif second != "none":
        ends = {user: start for user, (start, _) in read_starts(tmp_path / "new").items()}
    targets = sum(not mark for user, of_user in marks.items() for mark in of_user[1 : ends[user]])
    assert manifest.preparation["extends"]["new_targets"] == targets


@pytest.mark.parametrize(
    ("text", "boundary"),
    [
        ("12", Boundary(12)),
        ("-3", Boundary(-3)),
        ("9007199254740993", Boundary(9007199254740993)),
        ("1.5e3", Boundary(1500)),
        ("-0.25", Boundary(-1, 0.75)),
        ("1970-01-02", Boundary(86400)),
        ("2024-05-01T12:00:00.5+02:00", Boundary(int(datetime(2024, 5, 1, 10, tzinfo=UTC).timestamp()), 0.5)),
    ],
)
def test_a_boundary_is_a_number_or_a_moment(text: str, boundary: Boundary) -> None:
    assert Boundary.parse("--test_from", text) == boundary


def test_boundaries_with_fractions_and_dates_divide_as_their_times_do(tmp_path: Path) -> None:
    lines = ["user_id,item_id,timestamp", "u,a,0.1", "u,b,881250949.1", "u,c,881250949.2", "v,d,881250949.3"]
    (tmp_path / "numbers.csv").write_text("\n".join(lines) + "\n")
    moments = {"test_from": "881250949.2", "validation_from": "881250949.1"}
    make(tmp_path / "numbers.csv", tmp_path / "numbers", hold_out="time", **moments)
    assert read_starts(tmp_path / "numbers") == {"u": (1, 2), "v": (0, 0)}
    lines = ["user_id,item_id,timestamp", *(f"u,{day},2024-05-0{day}T00:00:00Z" for day in range(1, 6))]
    (tmp_path / "dates.csv").write_text("\n".join(lines) + "\n")
    make(tmp_path / "dates.csv", tmp_path / "dates", hold_out="time", test_from="2024-05-04")
    assert read_starts(tmp_path / "dates") == {"u": (1, 3)}


TIMED = {"hold_out": "time", "test_from": "5"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**TIMED, "test_from": "99"}, r"--test_from 99 is after all interactions: .* from 0 to 9"),
        ({**TIMED, "test_from": "0"}, r"--test_from 0 is before all interactions or at the first"),
        ({**TIMED, "test_from": "1970-01-02"}, r"--test_from 1970-01-02 \(time 86400\) is after all interactions"),
        ({**TIMED, "validation_from": "7"}, r"--validation_from 7 \(time 7\) is not before --test_from 5"),
        ({**TIMED, "validation_from": "5"}, r"--validation_from 5 .* is not before --test_from 5"),
        ({**TIMED, "test_from": "4.9", "validation_from": "4.5"}, r"the validation part is empty"),
        ({**TIMED, "validation_from": "-1"}, r"--validation_from -1 is before all interactions"),
        ({**TIMED, "test_from": "3"}, r"7 of 10 interactions are in the test part, so nothing is left to train on"),
    ],
)
def test_boundaries_that_leave_a_part_empty_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    log = write_csv(tmp_path / "log.csv", [("u", f"i{time}", time) for time in range(10)])
    with pytest.raises(InputError, match=said):
        make(log, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hold_out": "time"}, "--hold_out time needs --test_from"),
        ({**TIMED, "time_column": None}, "--hold_out time needs times"),
        ({**TIMED, "test_from": "soon"}, "--test_from is soon; it must be a number"),
        ({**TIMED, "test_from": "100%"}, "--test_from is 100%; a share must be"),
        ({**TIMED, "validation_from": "nan"}, "--validation_from is nan; it must be"),
        ({"test_from": "5"}, "--test_from belongs to --hold_out time, but --hold_out is last"),
        ({"hold_out": "given", "test_input": ["x"], "test_from": "5"}, "--test_from belongs to --hold_out time"),
        ({"validation_input": ["x"]}, "--validation_input belongs to --hold_out given"),
        ({"hold_out": "given"}, "--hold_out given needs --test_input"),
    ],
)
def test_options_that_do_not_fit_what_is_held_out_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Prepare(input=["log.csv"], output="data", **options)


def test_given_files_that_leave_a_part_empty_or_are_named_twice_are_refused(tmp_path: Path) -> None:
    many = str(write_csv(tmp_path / "many.csv", [(f"u{n % 3}", f"i{n % 4}", n) for n in range(60)]))
    few = str(write_csv(tmp_path / "few.csv", [("stranger", "strange", 1)]))
    with pytest.raises(InputError, match=r"--test_input: no interaction .* test part .* --min_count 5"):
        make([many], tmp_path / "data", hold_out="given", test_input=[few], min_count=5)
    with pytest.raises(InputError, match="is named by --input and by --test_input"):
        make([many], tmp_path / "data", hold_out="given", test_input=[str(tmp_path / "m*.csv")])
    with pytest.raises(InputError, match="--validation_input .*gone.csv: no such file"):
        make(
            [many], tmp_path / "data", hold_out="given", test_input=[few], validation_input=[str(tmp_path / "gone.csv")]
        )
    (tmp_path / "lines.txt").write_text("u a b c\n")
    with pytest.raises(InputError, match="--hold_out time: .*lines.txt is of the format sequences"):
        make(tmp_path / "lines.txt", tmp_path / "data", hold_out="time", test_from="50%")


def test_the_summary_says_what_is_held_out_and_which_items_get_no_training_target(tmp_path: Path) -> None:
    """A product whose only views are the last two of each user is never trained on."""
    rows: list[Row] = [(f"u{n}", f"i{place}", place) for n in range(3) for place in range(3)]
    rows += [(f"u{n}", "fresh", 10 + place) for n in range(3) for place in range(2)]
    config = Prepare(input=[str(write_csv(tmp_path / "log.csv", rows))], output=str(tmp_path / "data"), min_count=1)
    text = summary(config, make(config.input, config.output))
    assert "--hold_out last: interactions 9 training, 3 validation, 3 test" in text
    assert "of 3 users 3 have a validation item and 3 have a test item" in text
    assert "targets     2 of 4 items (50.0%) are never a training target: their interactions are held out" in text
    none = make(config.input, tmp_path / "none", hold_out="none")
    text = summary(config, none)
    assert "nothing (--hold_out none): all 15 interactions are trained on" in text
    assert "1 of 4 items (25.0%)" in text  # i0 is first in every history, so it is never predicted
    timed = make(config.input, tmp_path / "time", hold_out="time", test_from="10", validation_from="2")
    text = summary(config, timed)
    assert "validation from time 2, test from time 10, interactions 6 training, 3 validation, 6 test" in text
    assert "3 held-out interactions are neither ranked nor in a history before one" in text
