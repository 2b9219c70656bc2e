"""What prepare says when input, an option or the output folder cannot be used; it leaves no file behind."""

import errno
import gzip
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import explain_lack
from recgpt_torchrec.preparation.reading.duckdb_reader import explained
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.storage import folders
from tests.preparation.prepare_helpers import make, random_log, read_sequences, write_csv
from tests.support import change_json

GOOD = "user_id,item_id,timestamp\nu,a,1\n"


def message(folder: Path, input: Path | list[str], **options: Any) -> str:
    """The error of a prepare that must fail, and leave the folder as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as caught:
        make(input, folder / "data", **options)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value)


def file(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("log.parquet", GOOD, "log.parquet: cannot be read as parquet"),
        ("log.csv", b"PAR1\x15\x04", "is not csv but a Parquet file; pass --input_format parquet"),
        ("log.csv", gzip.compress(GOOD.encode(), mtime=0), "is not csv but gzip data; name it so that it ends in .gz"),
        ("log.csv", GOOD.encode("utf-16"), "is not csv in UTF-8 text but in UTF-16; pass --encoding utf-16"),
        ("log.csv.gz", GOOD, "log.csv.gz: cannot be read as csv"),
        (
            "log.csv.gz",
            gzip.compress(random.Random(0).randbytes(9000), mtime=0)[:5000],
            "log.csv.gz: cannot be read as csv",
        ),
        ("log.csv", '{"user_id": 1, "item_id": 2}\n', "pass --input_format jsonl"),
        ("log.csv", GOOD.replace(",", ";"), "Pass --separator semicolon"),
        ("log.tsv", GOOD, "Pass --separator comma"),
        ("log.jsonl", GOOD, "is not JSON lines: its first line is 'user_id,item_id,timestamp'"),
        ("log.jsonl", '[{"user_id": 1},\n{"user_id": 2}]', "write one object per line"),
        ("log.txt", GOOD.replace("item_id", "item"), "its lines do not look like histories"),
        ("log.txt", "user_id:token\titem_id:token\n1\t2\n", "pass --input_format recbole"),
        ("log.inter", GOOD, "is not a RecBole file"),
        ("log.inter", "user_id:int\titem_id:token\n", "is not a RecBole file"),
    ],
)
def test_a_file_that_is_not_what_its_format_says(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    text = message(tmp_path, file(tmp_path, name, content))
    assert expected in text
    assert str(tmp_path / name) in text


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    text = message(tmp_path, file(tmp_path, "log.csv", "who,item_id,timestamp\nu,a,1\n"))
    assert "no column 'user_id' for the user; it has 'who', 'item_id', 'timestamp'" in text
    assert "--user_column" in text
    text = message(tmp_path, file(tmp_path, "log.csv", "user_id,item_id,when\nu,a,1\n"))
    assert "no column 'timestamp' for the time" in text and "--time_column null" in text
    text = message(tmp_path, file(tmp_path, "log.csv", GOOD), rating_column="stars")
    assert "no column 'stars' for the rating" in text and "--rating_column" in text
    text = message(tmp_path, file(tmp_path, "log.jsonl", '{"who": 1, "item_id": 2, "timestamp": 3}\n' * 20))
    assert "no column 'user_id' for the user; it has 'item_id', 'timestamp', 'who'" in text
    pq.write_table(pa.table({"who": [1], "what": [2]}), tmp_path / "log.parquet")
    assert "it has 'who', 'what'" in message(tmp_path, tmp_path / "log.parquet")
    text = message(tmp_path, file(tmp_path, "log.inter", "user_id:token\tmovie:token\ttimestamp:float\n"))
    assert "no column 'item_id' for the item; it has 'user_id', 'movie', 'timestamp'" in text


def test_missing_input(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(20, 3, 3))
    assert "gone.csv: no such file" in message(tmp_path, [str(log), str(tmp_path / "gone.csv")])
    assert "no such file" in message(tmp_path, [str(tmp_path / "*.tsv")])
    assert "no file system for this URI" in message(tmp_path, ["nowhere://gone"])
    (tmp_path / "empty").mkdir()
    assert "no file there has a known ending" in message(tmp_path, [str(log), str(tmp_path / "empty")])


def test_an_unknown_ending(tmp_path: Path) -> None:
    log = file(tmp_path, "log.dat", GOOD)
    text = message(tmp_path, log)
    assert "log.dat: its ending does not say what format it is" in text and "--input_format csv" in text
    make(log, tmp_path / "data", input_format="csv")
    assert read_sequences(tmp_path / "data") == {"u": ["a"]}


@pytest.mark.parametrize("content", ["", "user_id,item_id,timestamp\n"])
def test_empty_input(tmp_path: Path, content: str) -> None:
    assert "log.csv: empty, there are no rows" in message(tmp_path, file(tmp_path, "log.csv", content))
    make([str(tmp_path / "log.csv"), str(file(tmp_path, "more.csv", GOOD))], tmp_path / "data")
    assert read_sequences(tmp_path / "data") == {"u": ["a"]}


def test_no_usable_row(tmp_path: Path) -> None:
    text = message(tmp_path, file(tmp_path, "log.csv", "user_id,item_id,timestamp\n,a,1\nu,b,soon\nu,c,x\n"))
    assert "none of the 3 rows can be used (1 no user, 2 unreadable time)" in text
    assert "log.csv, row 2: ,a,1" in text


def test_nothing_left_after_k_core_says_what_would_leave_something(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(300, users=60, items=60))
    text = message(tmp_path, log, min_count=9)
    assert "with --min_count 9: the log has 300 usable rows of 60 users and 60 items" in text
    assert "--min_count 3 would leave" in text or "--min_count 4 would leave" in text
    single = file(tmp_path, "single.csv", GOOD)
    assert "1 keeps everything" in message(tmp_path, single, min_count=3)


def test_sequences_are_not_mixed_with_timed_files(tmp_path: Path) -> None:
    files = [str(file(tmp_path, "a.txt", "u a b\n")), str(file(tmp_path, "b.csv", GOOD))]
    assert "prepare them separately" in message(tmp_path, files)


def test_an_output_folder_that_holds_something_else(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(20, 3, 3))
    (tmp_path / "data").mkdir()
    file(tmp_path / "data", "thesis.tex", "years of work")
    assert "already holds something that is not a finished dataset (thesis.tex)" in message(tmp_path, log)
    (tmp_path / "data" / "thesis.tex").unlink()
    (tmp_path / "data").rmdir()
    file(tmp_path, "data", "a file")
    assert "is a file" in message(tmp_path, log)


def test_an_output_folder_that_holds_another_dataset(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(100, 5, 5))
    make(log, tmp_path / "data")
    assert "min_count: 1 there, 2 now" in message(tmp_path, log, min_count=2)
    other = write_csv(tmp_path / "other.csv", random_log(100, 5, 5))
    assert f"input files differ: {other}" in message(tmp_path, other)
    write_csv(log, random_log(90, 5, 5))
    assert f"input files differ: {log}" in message(tmp_path, log)


def test_a_dataset_with_prompts_is_not_taken_for_the_one_it_was_made_from(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(100, 5, 5))
    make(log, tmp_path / "data")
    change_json(tmp_path / "data/manifest.json", lambda values: values["settings"].update(prompts={"k": 2}))
    assert "prompts.k: 2 there, None now" in message(tmp_path, log)


def test_a_finished_dataset_with_a_missing_part_is_not_taken_for_finished(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(100, 5, 5))
    make(log, tmp_path / "data")
    (tmp_path / "data" / "items" / "part-00000.parquet").unlink()
    assert "items/part-00000.parquet is missing" in message(tmp_path, log)


def test_memory_limit_and_scratch_that_cannot_be_used(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(20, 3, 3))
    assert "--memory_limit lots is not a size" in message(tmp_path, log, memory_limit="lots")


def test_a_scratch_folder_whose_name_the_engine_cannot_use(tmp_path: Path) -> None:
    """DuckDB takes what follows the ? for something else, and fails at its first commit."""
    (tmp_path / "q?x").mkdir()
    log = write_csv(tmp_path / "log.csv", random_log(20, 3, 3))
    said = message(tmp_path, log, scratch=str(tmp_path / "q?x"))
    assert f"scratch folder {tmp_path}/q?x: " in said and said.endswith("; name another with --scratch")


@pytest.mark.parametrize(
    "error",
    [
        duckdb.TransactionException("Failed to commit: No space left on device"),
        duckdb.IOException('Could not write file "/scratch/spill/1": No space left on device'),
        duckdb.IOException('Could not write file "/scratch/spill/1": Disk quota exceeded'),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_scratch_folder_is_not_taken_for_a_damaged_log(error: Exception) -> None:
    log = InputFile(path="log.csv", format="csv", bytes=1, modified="")
    with pytest.raises(
        InputError, match="scratch folder /scratch: .*(No space left|quota).*; free space there, or name"
    ):
        with explain_lack("/scratch"), explained(log, Path("/scratch")):
            raise error
    with pytest.raises(InputError, match="log.csv: cannot be read as csv: .*another error"):
        with explain_lack("/scratch"), explained(log, Path("/scratch")):
            raise duckdb.IOException("another error")


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_csv(tmp_path / "log.csv", random_log(200, 20, 20))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_manifest", full)
    assert "cannot write" in message(tmp_path, log)
    (tmp_path / "data").mkdir()
    assert "No space left on device" in message(tmp_path, log)


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recgpt_torchrec.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_program_prints_a_summary_and_the_next_command(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", random_log(300, 10, 10))
    second = file(tmp_path, "b.csv", "user_id,item_id,timestamp\n,a,1\nu99,a,1\n")
    done = program("--input", str(first), str(second), "--output", str(tmp_path / "data"), "--min_count", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "read        302 rows of 2 files" in done.stdout
    assert "rejected    1 row (0.33%): 1 no user" in done.stdout
    assert "round 1 removed 1 user, 1 item, 1 interaction" in done.stdout
    assert "10 users, 10 items, 300 interactions" in done.stdout
    assert f"python -m recgpt_torchrec.pretrain --data {tmp_path / 'data'} --output" in done.stdout
    yaml = file(tmp_path, "prepare.yaml", f"input: [{first}, {second}]\noutput: {tmp_path / 'data'}\nmin_count: 3\n")
    again = program("--config", str(yaml), "--min_count", "2")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    one = file(tmp_path, "one.yaml", f"input: {first}\noutput: {tmp_path / 'one'}\ntime_column: null\n")
    assert program("--config", str(one)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--input", "x.csv", "--output", "data", "--minn", "3"], "unknown option --minn"),
        (["--input", "x.csv", "--output", "data", "--min_count", "few"], "min_count"),
        (["--input", "x.csv", "--output", "data", "--min_count", "0"], "at least 1"),
        (["--input", "x.csv", "--output", "data", "--input_format", "xml"], "input_format"),
        (["--input", "x.csv", "--output", "data", "--rows_per_group=-1"], "--rows_per_group is -1"),
        (["--output", "data"], "prepare: error: --input must be given\n"),
        (["--input", "x.csv", "--output", "data"], "recgpt_torchrec.prepare: error: --input x.csv: no such file"),
    ],
)
def test_the_program_ends_with_status_2_and_one_readable_message(arguments: list[str], expected: str) -> None:
    done = program(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_type_in_yaml_is_a_readable_message(tmp_path: Path) -> None:
    yaml = file(tmp_path, "prepare.yaml", f"input: [3]\noutput: {tmp_path / 'data'}\n")
    done = program("--config", str(yaml))
    assert done.returncode == 2 and f"{yaml}: input is [3]; it must be one or more strings" in done.stderr


def test_help_explains_every_option() -> None:
    import dataclasses

    from recgpt_torchrec.cli import parser_for
    from recgpt_torchrec.config import Prepare

    done = program("--help")
    assert done.returncode == 0
    described = {action.dest: action.help for action in parser_for(Prepare, "prepare")._actions}
    for field in dataclasses.fields(Prepare):
        assert f"--{field.name} " in done.stdout
        assert len(described[field.name] or "") > 15
