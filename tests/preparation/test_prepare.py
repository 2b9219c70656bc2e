"""What prepare makes of good input: order, ids, filtering, files."""

import json
import os
import random
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import ibis
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.kcore import k_core
from recgpt_torchrec.preparation.pipeline import group_size
from recgpt_torchrec.storage.folders import check_free, stage_folder
from tests.preparation.prepare_helpers import in_time_order, make, random_log, read_keys, read_sequences, write_csv


def plain_k_core(pairs: list[tuple[int, int]], k: int) -> list[tuple[int, int]]:
    """The definition, as a loop."""
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = [(user, item) for user, item in pairs if users[user] >= k and items[item] >= k]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with DuckDBEngine(str(tmp_path_factory.mktemp("engine"))) as engine:
        yield engine


@hypothesis_settings(max_examples=25)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60),
    k=st.integers(1, 5),
)
def test_k_core_agrees_with_a_plain_loop(engine: DuckDBEngine, pairs: list[tuple[int, int]], k: int) -> None:
    engine.connection.execute("CREATE OR REPLACE TABLE log (user BIGINT, item BIGINT)")
    engine.connection.executemany("INSERT INTO log VALUES (?, ?)", pairs)
    core = k_core(engine, ibis.table({"user": "int64", "item": "int64"}, name="log"), k)
    expected = plain_k_core(pairs, k)
    assert sorted(row["user"] for row in engine.rows(core.users)) == sorted({user for user, _ in expected})
    assert sorted(row["item"] for row in engine.rows(core.items)) == sorted({item for _, item in expected})
    assert core.left.interactions == len(expected)
    assert sum(step.interactions_removed for step in core.rounds) == len(pairs) - len(expected)
    assert sum(step.users_removed for step in core.rounds) == len({user for user, _ in pairs}) - core.left.users
    tables = engine.connection.execute("SELECT table_name FROM duckdb_tables() WHERE table_name <> 'log'").fetchall()
    engine.drop(*(name for (name,) in tables))


def test_sequences_are_the_log_in_time_order(tmp_path: Path) -> None:
    rows = random_log(400, users=20, items=30)
    make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data")
    assert read_sequences(tmp_path / "data") == in_time_order(rows)
    times = read_sequences(tmp_path / "data", "timestamps")
    assert all(row == sorted(row) for row in times.values())
    assert sum(map(len, times.values())) == 400


def test_k_core_of_a_whole_log_and_its_counts(tmp_path: Path) -> None:
    rows = random_log(500, users=60, items=60)
    result = make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", min_count=6)
    kept = set(plain_k_core([(int(user[1:]), int(item[1:])) for user, item, _ in rows], 6))
    expected = in_time_order([row for row in rows if (int(row[0][1:]), int(row[1][1:])) in kept])
    assert read_sequences(tmp_path / "data") == expected
    assert len(result.manifest.preparation["rounds"]) > 1
    assert result.manifest.interactions == sum(map(len, expected.values())) > 0


def test_item_counts_and_training_counts(tmp_path: Path) -> None:
    rows = random_log(60, users=25, items=8)
    make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data")
    sequences = in_time_order(rows)
    assert any(len(sequence) < 3 for sequence in sequences.values())
    count = Counter(item for _, item, _ in rows)
    train = Counter(
        item for sequence in sequences.values() for item in (sequence if len(sequence) < 3 else sequence[:-2])
    )
    table = pq.read_table(tmp_path / "data" / "items").to_pydict()
    assert dict(zip(table["key"], table["count"], strict=True)) == count
    assert dict(zip(table["key"], table["train_count"], strict=True)) == {key: train[key] for key in count}


def test_equal_times_keep_the_order_of_the_input(tmp_path: Path) -> None:
    rows = [("u", f"i{place}", 7) for place in random.Random(1).sample(range(3000), 3000)]
    make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": [item for _, item, _ in rows]}


def test_equal_times_keep_the_order_of_the_files_given(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "b.csv", [("u", "x", 7)])
    second = write_csv(tmp_path / "a.csv", [("u", "y", 7)])
    make([str(first), str(second)], tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ["x", "y"]}


def test_ids_are_not_in_order_of_first_appearance(tmp_path: Path) -> None:
    """Trap 1: with such ids, the held-out item of a user is often the largest id so far, plus one."""
    rows = [(f"u{place // 4}", f"i{place:04d}", place) for place in range(2000)]
    make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data")
    for name, column in (("items", "item_id"), ("users", "user_id")):
        places = [int(key[1:]) for key in read_keys(tmp_path / "data", name, column)]
        rising = sum(later > earlier for earlier, later in zip(places, places[1:], strict=False))
        assert 0.4 < rising / len(places) < 0.6  # as often up as down: neither rising nor falling


def test_ids_depend_on_seed_and_keys_only(tmp_path: Path) -> None:
    rows = random_log(600, users=30, items=40)
    shuffled = random.Random(3).sample(rows, len(rows))
    (tmp_path / "split").mkdir()
    write_csv(tmp_path / "split" / "part-0.csv", shuffled[:150])
    write_csv(tmp_path / "split" / "part-1.tsv", shuffled[150:], delimiter="\t")
    one = make(write_csv(tmp_path / "one.csv", rows), tmp_path / "one", seed=5).manifest
    two = make(write_csv(tmp_path / "two.csv", shuffled), tmp_path / "two", seed=5).manifest
    three = make(tmp_path / "split", tmp_path / "three", seed=5).manifest
    other = make(tmp_path / "one.csv", tmp_path / "other", seed=6).manifest
    assert one.vocabulary == two.vocabulary == three.vocabulary != other.vocabulary
    assert one.sequences == two.sequences == three.sequences  # the files are the same to the byte
    assert one.item_parts == three.item_parts and one.user_parts == three.user_parts
    assert read_sequences(tmp_path / "one") == read_sequences(tmp_path / "other")


def test_duplicates_are_kept_or_dropped(tmp_path: Path) -> None:
    rows = [("u", "x", 1), ("u", "y", 2), ("u", "x", 1), ("u", "x", 3), ("v", "x", 1), ("u", "y", 2)]
    log = write_csv(tmp_path / "log.csv", rows)
    make(log, tmp_path / "kept")
    dropped = make(log, tmp_path / "dropped", duplicates="drop")
    assert read_sequences(tmp_path / "kept") == {"u": ["x", "x", "y", "y", "x"], "v": ["x"]}
    assert read_sequences(tmp_path / "dropped") == {"u": ["x", "y", "x"], "v": ["x"]}
    assert dropped.manifest.preparation["duplicates_dropped"] == 2


def test_parts_and_row_groups_are_as_asked_and_as_the_manifest_says(tmp_path: Path) -> None:
    rows = [(f"u{place % 50}", f"i{place % 7}", place) for place in range(500)]
    manifest = make(
        write_csv(tmp_path / "log.csv", rows), tmp_path / "data", rows_per_group=6, groups_per_part=4
    ).manifest
    assert [part.rows for part in manifest.sequences] == [24, 24, 2]
    for part in manifest.sequences + manifest.item_parts + manifest.user_parts:
        data = (tmp_path / "data" / part.path).read_bytes()
        assert (part.bytes, part.checksum) == (len(data), f"{zlib.crc32(data):08x}")
    file = pq.ParquetFile(tmp_path / "data" / manifest.sequences[0].path)
    assert [file.metadata.row_group(group).num_rows for group in range(4)] == [6, 6, 6, 6]
    assert sum(part.items for part in manifest.sequences) == manifest.interactions == 500
    assert Dataset.open(str(tmp_path / "data")).manifest == manifest


def test_row_group_size_follows_the_number_of_users() -> None:
    assert group_size(10) == 16
    assert group_size(22_363) == 350
    assert -(-22_363 // group_size(22_363)) == 64
    assert group_size(100_000_000) == 8192


def test_lists_longer_than_a_batch_and_users_across_batches(tmp_path: Path) -> None:
    rows = [("long", f"i{place % 11}", place) for place in range(70_000)] + [("short", "i1", 1)]
    make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", rows_per_group=1)
    sequences = read_sequences(tmp_path / "data")
    assert sequences["long"] == [f"i{place % 11}" for place in range(70_000)]
    assert sequences["short"] == ["i1"]


def test_a_second_run_finds_the_dataset_and_does_nothing(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(100, 10, 10))
    first = make(log, tmp_path / "data")
    changed = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    again = make(log, tmp_path / "data")
    assert not first.already_there and again.already_there
    assert again.manifest == first.manifest
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "log.csv"]  # no scratch, no half dataset


def test_an_empty_output_folder_is_used_and_other_file_systems_work(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(100, 10, 10))
    (tmp_path / "data").mkdir()
    here = make(log, tmp_path / "data").manifest
    uri = make(log, (tmp_path / "uri").as_uri()).manifest
    assert uri.sequences == here.sequences
    memory = make(log, "memory://prepare-test/data").manifest
    assert memory.sequences == here.sequences
    assert Dataset.open("memory://prepare-test/data").manifest == memory


def test_a_log_larger_than_the_memory_limit(tmp_path: Path) -> None:
    rows = random_log(60_000, users=900, items=700)
    result = make(write_csv(tmp_path / "log.csv", rows), tmp_path / "data", memory_limit="80MB", min_count=5)
    assert read_sequences(tmp_path / "data") == in_time_order(rows)
    assert result.manifest.interactions == 60_000


def test_the_manifest_says_what_was_read(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(100, 10, 10))
    make(log, tmp_path / "data", seed=3)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["settings"]["seed"] == 3
    (entry,) = manifest["preparation"]["inputs"]
    assert entry["path"] == str(log) and entry["bytes"] == log.stat().st_size
    assert entry["modified"] == str(log.stat().st_mtime_ns)
    assert manifest["preparation"]["lengths"]["max"] >= manifest["preparation"]["lengths"]["50%"]


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [("Beauty.txt", 22_363, 12_101, 198_502), ("Toys_and_Games.txt", 19_412, 11_924, 167_597)],
)
def test_public_datasets_have_their_published_size(
    shared_data: Path, tmp_path: Path, name: str, users: int, items: int, interactions: int
) -> None:
    manifest = make(shared_data / name, tmp_path / "data", min_count=5).manifest
    assert (manifest.users, manifest.items, manifest.interactions) == (users, items, interactions)
    expected = {line.split()[0]: line.split()[1:] for line in (shared_data / name).read_text().splitlines()}
    assert read_sequences(tmp_path / "data") == expected
    if name == "Beauty.txt":
        groups = [pq.ParquetFile(tmp_path / "data" / part.path).metadata.num_row_groups for part in manifest.sequences]
        assert groups == [16, 16, 16, 16]


def test_ml_100k_with_ratings(shared_data: Path, tmp_path: Path) -> None:
    manifest = make(shared_data / "ml-100k.inter", tmp_path / "data", min_count=5, rating_column="rating").manifest
    lines = [line.split("\t") for line in (shared_data / "ml-100k.inter").read_text().splitlines()[1:]]
    kept = set(plain_k_core([(int(user), int(item)) for user, item, *_ in lines], 5))
    assert (manifest.users, manifest.items, manifest.interactions) == (943, 1349, 99_287)
    assert len(kept) == 99_287
    ratings = Counter(rating for row in read_sequences(tmp_path / "data", "ratings").values() for rating in row)
    assert ratings == Counter(float(line[2]) for line in lines if (int(line[0]), int(line[1])) in kept)


def test_a_dataset_that_another_process_wrote_meanwhile_stays(tmp_path):
    path = tmp_path / "data"
    with pytest.raises(InputError, match="another process wrote .* during this run"), stage_folder(str(path)):
        path.mkdir()
        (path / "manifest.json").write_text("{}")
    assert [file.name for file in tmp_path.rglob("*")] == ["data", "manifest.json"]


HALF = """
import os, signal, sys
from recgpt_torchrec.storage.folders import stage_folder
with stage_folder(sys.argv[1]) as (fs, folder):
    print(folder, flush=True)
    if sys.argv[2:]:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def test_what_a_kill_left_is_deleted_and_what_another_process_writes_is_not(tmp_path):
    command = [sys.executable, "-c", HALF, str(tmp_path / "data")]
    killed = subprocess.run([*command, "killed"], capture_output=True, text=True).stdout.strip()
    assert os.path.isdir(killed)
    writing = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writing.stdout is not None
        folder = writing.stdout.readline().strip()
        with stage_folder(str(tmp_path / "data")):
            assert os.path.isdir(folder) and not os.path.exists(killed)
    finally:
        writing.kill()
        writing.wait()


def test_an_output_that_is_a_link_stays_one_and_a_mounted_disk_is_refused_before_the_work(tmp_path):
    (tmp_path / "disk/data").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/data")
    with stage_folder(str(tmp_path / "link")) as (_, folder):
        assert Path(folder).parent == tmp_path / "disk"
        Path(folder, "manifest.json").write_text("{}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/data/manifest.json").exists()
    with pytest.raises(InputError, match="--output /proc is a mount point"):
        check_free("/proc", "dataset")
