"""One table of bad input over all stages: what is wrong, the command, how it ends, and the message to the user.

`python -m tests.test_bad_input table.md` writes the table. Each kind must end with a status that is not 0, without a
traceback, with a message that names the file or option and a way out, and must leave nothing half-written.
"""

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from tests.support import SMALL, change_json, overwrite, rewrite, stage, walks, write_dataset
from tools.mutations import hostile_pickles
from tools.ranks import run_ranks

USERS, ITEMS, ANSWERS = 40, 20, 2
PART = "sequences/part-00001.parquet"
PLACE = f"{PART}, row group 1, row 1"
OF_PROMPTS = "sequences/part-0000-00000.parquet"
PROMPTED = f"{OF_PROMPTS}, row group 1, row 1"
TUNE = {"--optimizer.warmup_steps": 2, "--train.epochs": 1, "--loss.candidates": "all", "--batch.tokens": 60}
TRAINING = {**SMALL, "--model.max_len": 8, **TUNE}
OPTIONS: dict[str, dict[str, Any]] = {
    "prepare": {"--input": "log.csv", "--output": "new", "--min_count": 1},
    "pretrain": {"--data": "data", "--output": "new", **TRAINING},
    "generate_prompts": {"--data": "data", "--checkpoint": "run", "--output": "new", "--prompts.k": 1},
    "prompt_tune": {"--data": "prompts", "--checkpoint": "run", "--output": "new", **TUNE},
    "evaluate": {"--data": "data", "--checkpoint": "run", "--output": "new.json"},
    "export": {"--data": "data", "--checkpoint": "run", "--output": "new"},
}
SHOWN = ("--data", "--input", "--output", "--checkpoint")
"""Options that the table shows although every case of the stage has them."""
LEFT_BY_TRAINING = re.compile(
    r"new/(run\.json|run\.lock|history\.jsonl|damaged\.jsonl|tensorboard/.*|checkpoints)?$|new$|new/tensorboard$"
)
"""Files that a run may leave if the error ends it during training; no checkpoint, complete or partial."""


@dataclass(frozen=True)
class Bad:
    """A kind of bad input."""

    stage: str
    kind: str
    harm: Callable[[Path], object]
    """Makes the input bad, in a folder that holds `log.csv`, `data`, `run` and `prompts`."""
    names: str
    """File with its place, or option, in the message."""
    remedy: str
    """Words of the remedy in the message."""
    options: dict[str, Any] = field(default_factory=dict)
    in_training: bool = False
    """Whether the error comes only during training, so that the run's folder exists."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.kind}"


def no_damage(folder: Path) -> None:
    pass


def log(content: str | bytes, name: str = "log.csv") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def row(column: str, value: Any, at: int | None = None, of: str = "data") -> Callable[[Path], None]:
    """Damage row 1 of row group 1: a whole value, or one entry of a list."""

    def change(rows: list[dict[str, Any]]) -> None:
        if at is None:
            rows[5][column] = value
        else:
            rows[5][column][at] = value

    return lambda folder: rewrite(folder / of, change, part=int(of == "data"))


def column(of: str = "data", **types: pa.DataType | None) -> Callable[[Path], None]:
    """Give columns other types, or none."""

    def emptied(rows: list[dict[str, Any]]) -> None:
        for values in rows:
            values |= {name: None for name in types}

    return lambda folder: rewrite(folder / of, emptied, part=int(of == "data"), types=types)


def manifest(change: Callable[[dict[str, Any]], object], of: str = "data") -> Callable[[Path], None]:
    return lambda folder: change_json(folder / of / "manifest.json", change)


def only_held_out(users: int) -> Callable[[Path], object]:
    """Let the manifest record for how many users an item is held out."""
    split = {
        "interactions": {"training": 1, "validation": users, "test": users},
        "validation_users": users,
        "test_users": users,
        "unused": 0,
        "training_targets": 1,
        "items_without_target": 0,
    }
    return manifest(lambda m: m.update(preparation={"split": split}))


def part(change: Callable[[Path], object], path: str = f"data/{PART}") -> Callable[[Path], object]:
    return lambda folder: change(folder / path)


def overwrite_page(path: Path) -> None:
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    overwrite(path, slice(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def flip_bit_of_table(folder: Path) -> None:
    (checkpoint,) = folder.glob("run/checkpoints/step-*")
    written = FileSystemReader(checkpoint).read_metadata().storage_data
    place = next(place for index, place in written.items() if index.fqn.startswith("model.tables.embedding_bags.item"))
    data = bytearray((checkpoint / place.relative_path).read_bytes())
    table = torch.load(io.BytesIO(data[place.offset : place.offset + place.length]))
    data[data.index(table.numpy().tobytes(), place.offset)] ^= 1
    (checkpoint / place.relative_path).write_bytes(data)


def change_digit(path: str, name: str) -> Callable[[Path], None]:
    """Change the first digit of a number in a JSON file, and nothing else."""

    def change(folder: Path) -> None:
        text = (folder / path).read_text()
        at = text.index(f'"{name}": ') + len(f'"{name}": ')
        (folder / path).write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])

    return change


def metadata_of(folder: Path) -> Path:
    return next(folder.glob("run/checkpoints/*/checkpoint.json"))


def reopen_epoch_and(harm: Callable[[Path], object]) -> Callable[[Path], None]:
    """Mark the run's epoch as unfinished, so that the run resumes from its checkpoint, and damage the checkpoint."""

    def reopen_and_damage(folder: Path) -> None:
        unfinished = {"finished": False, "position": {"epoch": 0, "queues": None}}
        change_json(metadata_of(folder), lambda values: values["progress"].update(unfinished))
        harm(folder)

    return reopen_and_damage


def other_dataset(folder: Path) -> None:
    write_dataset(folder / "other", walks(USERS, ITEMS), items=ITEMS, vocabulary="another")


def divide_by_time(harm: Callable[[Path], object] = no_damage, of: str = "data") -> Callable[[Path], None]:
    """Make a dataset one with --hold_out time, and damage it then."""

    def divided(rows: list[dict[str, Any]]) -> None:
        for values in rows:
            values |= {"validation_start": 1, "test_start": 2}

    def divide_and_damage(folder: Path) -> None:
        for number in range(len(json.loads((folder / of / "manifest.json").read_text())["sequences"])):
            rewrite(folder / of, divided, part=number, types={"validation_start": pa.int64(), "test_start": pa.int64()})
        manifest(lambda m: m.update(hold_out="time"), of)(folder)
        harm(folder)

    return divide_and_damage


def write_foreign_file(folder: Path) -> None:
    (folder / "new").mkdir()
    (folder / "new/thesis.txt").write_text("years of work")
    log(GOOD)(folder)


GOOD = "user_id,item_id,timestamp\nu,a,1\nu,b,2\n"
PREPARE_AGAIN = "run prepare again"
SKIP = "--stream.damaged skip"
CASES = [
    # ------------------------------------------------------------------------------------------------- prepare
    Bad("prepare", "no such file", no_damage, "--input gone.csv", "no such file", {"--input": "gone.csv"}),
    Bad("prepare", "a folder without logs", lambda f: (f / "in").mkdir(), "in", "known ending", {"--input": "in"}),
    Bad("prepare", "text that is named parquet", log(GOOD, "log.parquet"), "log.parquet", "cannot be read as parquet",
        {"--input": "log.parquet"}),
    Bad("prepare", "a compressed file cut off", log(gzip.compress(os.urandom(9000))[:5000], "log.csv.gz"),
        "log.csv.gz", "cannot be read as csv", {"--input": "log.csv.gz"}),
    Bad("prepare", "UTF-16 text", log(GOOD.encode("utf-16")), "log.csv", "pass --encoding utf-16"),
    Bad("prepare", "JSON lines that are named csv", log('{"user_id": 1, "item_id": 2}\n'), "log.csv",
        "pass --input_format jsonl"),
    Bad("prepare", "fields separated by semicolons", log(GOOD.replace(",", ";")), "log.csv",
        "Pass --separator semicolon"),
    Bad("prepare", "a first line without names", log("1,a,1511544170\n"), "log.csv",
        "--header false with columns by place"),
    Bad("prepare", "a column twice", log(GOOD.replace("item_id", "user_id", 1)), "2 columns 'user_id'", "rename them"),
    Bad("prepare", "years of two digits", log("user_id,item_id,timestamp\nu,a,31-12-18\n"), "log.csv, row 2",
        "--time_format '%d-%m-%y'"),
    Bad("prepare", "a format of times that is none", log(GOOD), "--time_format '%Q'", "give strptime's codes",
        {"--time_format": "%Q"}),
    Bad("prepare", "lists in a column of text", log('user_id,item_id,timestamp\nu,"a,b,c",1\n'), "column 'item_id'",
        "--list_separator"),
    Bad("prepare", "rows of a table that are named txt", log("1 13 5 978300860\n2 14 1 978300861\n", "log.txt"),
        "log.txt", "--input_format csv --separator space --header false", {"--input": "log.txt"}),
    Bad("prepare", "an object for a user", log('{"user_id": {"$oid": "1"}, "item_id": 2}\n', "log.jsonl"), "'user_id'",
        "--user_column 'user_id.$oid'", {"--input": "log.jsonl", "--time_column": "null"}),
    Bad("prepare", "Python's literals", log("{'user_id': 1}\n", "log.jsonl"), "log.jsonl", "json.dumps",
        {"--input": "log.jsonl"}),
    Bad("prepare", "a condition with a query", log(GOOD), "--where", "Give an SQL condition",
        {"--where": "timestamp > (select 1)"}),
    Bad("prepare", "a condition on no column", log(GOOD), "--where: log.csv has no column 'price'", "it has 'user_id'",
        {"--where": "price > 1"}),
    Bad("prepare", "words for clicks that are not there", log(GOOD), "--click_values buy", "Give words of that column",
        {"--click_column": "item_id", "--click_values": "buy"}),
    Bad("prepare", "an encoding that is not the file's", log(GOOD.replace("a", "é")), "--encoding ascii",
        "give another --encoding", {"--encoding": "ascii"}),
    Bad("prepare", "a separator for a log without one", log('{"user_id": 1}\n', "log.jsonl"), "--separator",
        "no file of --input is a table", {"--input": "log.jsonl", "--separator": ";"}),
    Bad("prepare", "a column is missing", log(GOOD.replace("user_id", "who")), "no column 'user_id'", "--user_column"),
    Bad("prepare", "an empty file", log(""), "log.csv", "there are no rows"),
    Bad("prepare", "no row has a user and a time", log("user_id,item_id,timestamp\n,a,1\nu,b,soon\n"), "log.csv, row 2",
        "none of the 2 rows can be used"),
    Bad("prepare", "nobody has as many interactions as asked for", log(GOOD), "--min_count 9", "keeps everything",
        {"--min_count": 9}),
    Bad("prepare", "an option that does not exist", log(GOOD), "--min_cuont", "did you mean --min_count?",
        {"--min_cuont": 5}),
    Bad("prepare", "a word where a number belongs", log(GOOD), "--min_count is few", "whole number",
        {"--min_count": "few"}),
    Bad("prepare", "a boundary that is no time", log(GOOD), "--test_from is soon", "a share of the interactions",
        {"--hold_out": "time", "--test_from": "soon"}),
    Bad("prepare", "a boundary in another unit than the log's times", log(GOOD), "--test_from 2024-05-01 (time 17145",
        "in the unit of the log", {"--hold_out": "time", "--test_from": "2024-05-01"}),
    Bad("prepare", "a boundary without a hold-out by time", log(GOOD), "--test_from belongs to --hold_out time",
        "or leave --test_from out", {"--test_from": "90%"}),
    Bad("prepare", "a hold-out by time without a boundary", log(GOOD), "--hold_out time needs --test_from",
        "such as 90%", {"--hold_out": "time"}),
    Bad("prepare", "a file in two parts", log(GOOD), "log.csv is named by --input and by --test_input",
        "leave it out of the other", {"--hold_out": "given", "--test_input": "log.csv"}),
    Bad("prepare", "no such test file", log(GOOD), "--test_input gone.csv", "no such file",
        {"--hold_out": "given", "--test_input": "gone.csv"}),
    Bad("prepare", "the output holds something else", write_foreign_file, "thesis.txt",
        "Name a folder that does not exist or is empty"),
    # ------------------------------------------------------------------------------------------------ pretrain
    Bad("pretrain", "no dataset", lambda f: shutil.rmtree(f / "data"), "data", "prepare --input LOG --output"),
    Bad("pretrain", "manifest: no JSON", lambda f: (f / "data/manifest.json").write_text("{"), "data/manifest.json",
        PREPARE_AGAIN),
    Bad("pretrain", "manifest: of a newer version", manifest(lambda m: m.update(format_version=2)),
        "dataset format version 2", "update the program"),
    Bad("pretrain", "manifest: an entry is missing", manifest(lambda m: m["sequences"][0].pop("bytes")),
        "data/manifest.json", PREPARE_AGAIN),
    Bad("pretrain", "manifest: a negative number", manifest(lambda m: m.update(users=-3)), "users is -3",
        PREPARE_AGAIN),
    Bad("pretrain", "manifest: a part listed twice", manifest(lambda m: m["sequences"].append(m["sequences"][0])),
        "sequences/part-00000.parquet more than once", PREPARE_AGAIN),
    Bad("pretrain", "a dataset without users", manifest(lambda m: m.update(users=0, sequences=[])), "data is empty",
        "prepare a log with interactions"),
    Bad("pretrain", "a part is missing", part(Path.unlink), f"{PART} is missing", SKIP),
    Bad("pretrain", "a part is cut off", part(lambda p: os.truncate(p, 900)), f"{PART} is damaged", SKIP),
    Bad("pretrain", "a part is no Parquet", part(lambda p: overwrite(p, slice(None))), f"{PART} cannot be read", SKIP),
    Bad("pretrain", "one byte of a part has changed", part(flip_bit), f"{PART} is damaged: its checksum", SKIP,
        {"--stream.checksums": "true"}),
    Bad("pretrain", "a part has other rows than promised", manifest(lambda m: m["sequences"][1].update(rows=9)),
        f"{PART} has 8 rows", SKIP),
    Bad("pretrain", "a column is missing", column(item_ids=None), f"{PART} has no column item_ids", SKIP),
    Bad("pretrain", "a column of another type", column(item_ids=pa.list_(pa.string())), "item_ids of type list", SKIP),
    Bad("pretrain", "no lists", column(item_ids=pa.int64()), f"{PART} has a column item_ids of type int64", SKIP),
    Bad("pretrain", "a part of the vocabulary is missing", part(Path.unlink, "data/items/part-00000.parquet"),
        "items/part-00000.parquet is missing", PREPARE_AGAIN, {SKIP.split()[0]: "skip"}),
    Bad("pretrain", "a row group cannot be read", part(overwrite_page), f"{PART}, row group 1", SKIP, in_training=True),
    Bad("pretrain", "an item id outside the vocabulary", row("item_ids", 77, 0), PLACE, SKIP, in_training=True),
    Bad("pretrain", "a negative item id", row("item_ids", -1, 0), PLACE, SKIP, in_training=True),
    Bad("pretrain", "a null among the item ids", row("item_ids", None, 0), PLACE, SKIP, in_training=True),
    Bad("pretrain", "a null instead of a list", row("item_ids", None), PLACE, SKIP, in_training=True),
    Bad("pretrain", "a user id that is null", row("user_id", None), PLACE, SKIP, in_training=True),
    Bad("pretrain", "a user id outside the vocabulary", row("user_id", USERS), PLACE, SKIP, in_training=True),
    Bad("pretrain", "times that are not in order", row("timestamps", 99, 0), PLACE, SKIP,
        {"--stream.time_order": "true"}, in_training=True),
    Bad("pretrain", "fewer times than items", row("timestamps", [1]), PLACE, SKIP, {"--stream.time_order": "true"},
        in_training=True),
    Bad("pretrain", "more damaged rows than may be left out", row("item_ids", 77, 0), PLACE, "a higher limit",
        {"--stream.damaged": "skip", "--stream.damaged_limit": 0}, in_training=True),
    Bad("pretrain", "a lost part of more rows than may be left out", part(Path.unlink), f"{PART}: is missing",
        "a higher limit", {"--stream.damaged": "skip", "--stream.damaged_limit": 7}),
    Bad("pretrain", "parts of a history that are not in order", divide_by_time(row("validation_start", 3)), PLACE, SKIP,
        in_training=True),
    Bad("pretrain", "a part that starts after the history", divide_by_time(row("test_start", 99)), PLACE, SKIP,
        in_training=True),
    Bad("pretrain", "no start of a part", divide_by_time(row("test_start", None)), PLACE, SKIP, in_training=True),
    Bad("pretrain", "a dataset by time without the starts of its parts", manifest(lambda m: m.update(hold_out="time")),
        "has no column test_start, validation_start", SKIP),
    Bad("pretrain", "manifest: an unknown hold_out", manifest(lambda m: m.update(hold_out="first")),
        "hold_out is 'first'", PREPARE_AGAIN),
    Bad("pretrain", "nobody has a validation item", manifest(lambda m: m.update(preparation={"lengths": {"max": 2}})),
        "the longest history has 2", "--hold_out none"),
    Bad("pretrain", "a sample larger than the users with a validation item", only_held_out(30),
        "--train.validate_users is 31, but 30 users of data have a validation item", "or 0 for all",
        {"--train.validate_users": 31}),
    Bad("pretrain", "validations within an epoch, and nothing is held out",
        manifest(lambda m: m.update(hold_out="none")),
        "--train.validate_steps is 5, but data holds nothing out", "Leave the option out",
        {"--train.validate_steps": 5}),
    Bad("pretrain", "a sample to validate on, and nothing is held out", manifest(lambda m: m.update(hold_out="none")),
        "--train.validate_users is 5, but data holds nothing out", "Leave the option out",
        {"--train.validate_users": 5}),
    Bad("pretrain", "fewer steps than none", no_damage, "--train.steps is -1", "at least 0", {"--train.steps": -1}),
    Bad("pretrain", "validations every -5 steps", no_damage, "--train.validate_steps is -5", "at least 0",
        {"--train.validate_steps": -5}),
    Bad("pretrain", "a sample of -5 users", no_damage, "--train.validate_users is -5", "at least 0",
        {"--train.validate_users": -5}),
    Bad("pretrain", "a number of steps for a run of epochs that is there", no_damage, "--train.steps: 0 there, 9 now",
        "--initial run", {"--output": "run", "--train.steps": 9}),
    Bad("evaluate", "a sample larger than the users with a test item", only_held_out(30),
        "--users is 31, but 30 users of data have a test item", "or 0 for all", {"--users": 31}),
    Bad("evaluate", "a sample of -5 users", no_damage, "--users is -5", "at least 0", {"--users": -5}),
    Bad("evaluate", "an items part without counts",
        part(lambda path: pq.write_table(pq.read_table(path).drop_columns("train_count"), path),
        "data/items/part-00000.parquet"), "part-00000.parquet is damaged", PREPARE_AGAIN),
    Bad("pretrain", "more epochs for a run that is there", no_damage, "--train.epochs: 1 there, 9 now",
        "--initial run", {"--output": "run", "--train.epochs": 9}),
    Bad("pretrain", "options that do not go together", no_damage, "--model.heads 3", "must divide",
        {"--model.heads": 3}),
    Bad("pretrain", "a width that no kernel takes", no_damage, "it has 10 columns", "data_parallel would fit",
        {"--model.dim": 10, "--tables.sharding": "table_wise"}),
    Bad("pretrain", "the same width, rows over ranks", no_damage, "cannot be sharded row_wise: it has 10 columns",
        "--tables.user.sharding data_parallel", {"--model.dim": 10, "--tables.sharding": "row_wise"}),
    Bad("pretrain", "a grid on one node", no_damage, "user table cannot be sharded grid: it needs several nodes",
        "--tables.user.sharding row_wise would fit", {"--tables.user.sharding": "grid"}),
    Bad("pretrain", "rows in the host's memory without a GPU", no_damage, "--tables.kernel uvm_caching of the item",
        "needs CUDA; on cpu use fused", {"--tables.item.kernel": "uvm_caching"}),
    Bad("pretrain", "manifest: a part outside the folder",
        manifest(lambda m: m["sequences"][0].update(path="../elsewhere.parquet")), "'../elsewhere.parquet'",
        PREPARE_AGAIN),
    Bad("pretrain", "manifest: rows beyond any file", manifest(lambda m: m["sequences"][0].update(rows=2**60)),
        "rows is 1152921504606846976", PREPARE_AGAIN),
    Bad("pretrain", "manifest: more rows than bytes", manifest(lambda m: m["user_parts"][0].update(rows=10**12)),
        "promises 1,000,000,000,000 rows", PREPARE_AGAIN),
    Bad("pretrain", "manifest: users without a row", manifest(lambda m: m.update(users=10**9)),
        "promises 1,000,000,000 users, but 40 rows", PREPARE_AGAIN),
    Bad("pretrain", "manifest: true as a number", manifest(lambda m: m.update(items=True)), "items is True",
        PREPARE_AGAIN),
    Bad("pretrain", "manifest: a digit has changed", change_digit("data/manifest.json", "interactions"),
        "its checksum is", PREPARE_AGAIN),
    Bad("pretrain", "an alias in the configuration",
        lambda f: (f / "c.yaml").write_text("model: &m {dim: 8}\nloss: *m\n"), "c.yaml, line 2", "write the value out",
        {"--config": "c.yaml"}),
    Bad("pretrain", "a class in the configuration",
        lambda f: (f / "c.yaml").write_text("model: {class_path: subprocess.Popen, init_args: {args: [ls]}}"),
        "c.yaml: unknown option model.class_path", "did you mean", {"--config": "c.yaml"}),
    Bad("pretrain", "a Python object in the configuration",
        lambda f: (f / "c.yaml").write_text("seed: !!python/object/apply:os.system [ls]"), "c.yaml, line 1",
        "is not YAML", {"--config": "c.yaml"}),
    Bad("pretrain", "the checkpoint to resume from has another number of steps",
        reopen_epoch_and(lambda f: change_json(metadata_of(f), lambda m: m["progress"].update(step=-1))),
        "progress.step is -1", "restore it", {"--output": "run"}),
    Bad("pretrain", "no such configuration file", no_damage, "gone.yaml", "no such file", {"--config": "gone.yaml"}),
    Bad("pretrain", "a misspelt name in the configuration", lambda f: (f / "c.yaml").write_text("trian: {epochs: 3}"),
        "c.yaml: unknown option trian", "did you mean train?", {"--config": "c.yaml"}),
    Bad("pretrain", "a word where a number belongs, in the configuration",
        lambda f: (f / "c.yaml").write_text("train: {epochs: few}"), "c.yaml: train.epochs is few", "whole number",
        {"--config": "c.yaml"}),
    Bad("pretrain", "a configuration that is not YAML", lambda f: (f / "c.yaml").write_text("seed: 1\ntrain: {ep"),
        "c.yaml, line 2", "is not YAML", {"--config": "c.yaml"}),
    Bad("pretrain", "the checkpoint to resume from is cut off",
        reopen_epoch_and(lambda f: os.truncate(next(f.glob("run/*/*/*.distcp")), 500)), "run/checkpoints/step-",
        "remove this folder", {"--output": "run"}),
    Bad("pretrain", "the checkpoint to resume from does not say what is in it",
        reopen_epoch_and(lambda f: os.truncate(next(f.glob("run/*/*/.metadata")), 300)), "run/checkpoints/step-",
        "remove this folder", {"--output": "run"}),
    Bad("pretrain", "one bit of the checkpoint to resume from has changed", reopen_epoch_and(flip_bit_of_table),
        "run/checkpoints/step-", "remove this folder", {"--output": "run"}),
    Bad("pretrain", "the output is another run's", no_damage, "--model.dim: 8 there, 16 now", "choose another --output",
        {"--output": "run", "--model.dim": 16}),
    Bad("pretrain", "the output is a run on another dataset", other_dataset, "holds a run on another dataset",
        "choose another", {"--output": "run", "--data": "other"}),
    # ---------------------------------------------------------------------------------------- generate_prompts
    Bad("generate_prompts", "the dataset has prompts already", no_damage, "prompts has prompts", "as --data",
        {"--data": "prompts"}),
    Bad("generate_prompts", "an item id outside the vocabulary", row("item_ids", 77, 0), PLACE, PREPARE_AGAIN),
    Bad("generate_prompts", "fewer times than items", row("timestamps", [1]), PLACE, PREPARE_AGAIN),
    Bad("generate_prompts", "the checkpoint's ids mean other items", other_dataset, "other", "It was trained on",
        {"--data": "other"}),
    # --------------------------------------------------------------------------------------------- prompt_tune
    Bad("prompt_tune", "a dataset without prompts", no_damage, "data has no prompts", "generate_prompts",
        {"--data": "data"}),
    Bad("prompt_tune", "fewer segment ids than items", row("segment_ids", [0], of="prompts"), PROMPTED, SKIP,
        in_training=True),
    Bad("prompt_tune", "an unknown segment id", row("segment_ids", 7, 1, of="prompts"), PROMPTED, SKIP,
        in_training=True),
    Bad("prompt_tune", "no segment ids in one part", column("prompts", segment_ids=None), OF_PROMPTS, SKIP),
    Bad("prompt_tune", "fewer answers than items", row("answer_ids", [1], of="prompts"), PROMPTED, SKIP,
        {"--tuning.soft_targets": 0.5}, in_training=True),
    Bad("prompt_tune", "an answer outside the vocabulary", row("answer_ids", 77, 0, of="prompts"), PROMPTED, SKIP,
        {"--tuning.soft_targets": 0.5}, in_training=True),
    Bad("prompt_tune", "a score that is not a number", row("answer_scores", float("nan"), 0, of="prompts"), PROMPTED,
        SKIP, {"--tuning.soft_targets": 0.5}, in_training=True),
    Bad("prompt_tune", "no checkpoint", lambda f: shutil.rmtree(f / "run"), "run holds no finished checkpoint", "give"),
    # ------------------------------------------------------------------------------------------------ evaluate
    Bad("evaluate", "an item id outside the vocabulary", row("item_ids", 77, 0), PLACE, PREPARE_AGAIN),
    Bad("evaluate", "a part is cut off", part(lambda p: os.truncate(p, 900)), f"{PART} is damaged", PREPARE_AGAIN),
    Bad("evaluate", "a dataset that holds nothing out", manifest(lambda m: m.update(hold_out="none")),
        "prepared with --hold_out none", "--hold_out last, time or given"),
    Bad("evaluate", "no folder for the output", no_damage, "nowhere", "make it first", {"--output": "nowhere/x.json"}),
    Bad("evaluate", "the output holds something else", lambda f: (f / "new.json").write_text("[]"), "new.json",
        "choose another --output"),
    Bad("evaluate", "the output is of another split",
        lambda f: (f / "new.json").write_text('{"dataset": "data", "split": "validation"}'),
        "split: validation there, test now", "give --overwrite true", {"--split": "test"}),
    Bad("evaluate", "the checkpoint's ids mean other items", other_dataset, "other", "It was trained on",
        {"--data": "other"}),
    Bad("evaluate", "the checkpoint lacks a file", lambda f: next(f.glob("run/*/*/*.distcp")).unlink(),
        "run/checkpoints/step-", "give another checkpoint"),
    Bad("evaluate", "the checkpoint does not say what is in it", lambda f: next(f.glob("run/*/*/.metadata")).unlink(),
        "run/checkpoints/step-", "give another checkpoint"),
    Bad("evaluate", "one bit of the checkpoint has changed", flip_bit_of_table, "checksum", "give another checkpoint"),
    Bad("evaluate", "the checkpoint's metadata is a pickle that runs a command",
        lambda f: next(f.glob("run/*/*/.metadata")).write_bytes(hostile_pickles("canary")["reduce, protocol 4"]),
        "posix.system", "give another checkpoint"),
    Bad("evaluate", "a digit of the checkpoint's metadata has changed",
        lambda f: change_digit(str(metadata_of(f)), "read")(Path()), "its checksum is", "restore it"),
    Bad("evaluate", "the checkpoint's configuration is of another model",
        lambda f: change_json(metadata_of(f), lambda m: m["config"]["model"].update(dim=2**20)),
        "decoder.position.weight has size [8, 1048576], but its tensors have (8, 8)", "restore it"),
    Bad("evaluate", "the checkpoint's configuration has more layers",
        lambda f: change_json(metadata_of(f), lambda m: m["config"]["model"].update(layers=10**9)),
        "layers is 1000000000", "restore it"),
    Bad("evaluate", "best.json names a folder elsewhere",
        lambda f: change_json(f / "run/best.json", lambda m: m.update(checkpoint="../../data")), "'../../data' is not",
        "restore it"),
    Bad("evaluate", "best.json is cut off", lambda f: (f / "run/best.json").write_text('{"epoch": 1,'),
        "run/best.json is damaged", "restore it"),
    Bad("evaluate", "a checkpoint's metadata are cut off",
        lambda f: metadata_of(f).write_text("{"), "checkpoint.json is damaged",
        "restore it", {"--checkpoint": "run"}),
    # -------------------------------------------------------------------------------------------------- export
    Bad("export", "a file of the checkpoint is cut off", lambda f: os.truncate(next(f.glob("run/*/*/*.distcp")), 500),
        "run/checkpoints/step-", "give another checkpoint"),
    Bad("export", "an item id outside the vocabulary", row("item_ids", 77, 0), PLACE, PREPARE_AGAIN),
    Bad("export", "a user id that is null", row("user_id", None), PLACE, PREPARE_AGAIN),
    Bad("export", "a part is missing", part(Path.unlink), f"{PART} is missing", PREPARE_AGAIN),
    Bad("export", "histories before a part that is not there", manifest(lambda m: m.update(hold_out="none")),
        "no user has a test item", "--history all", {"--history": "test"}),
    Bad("export", "too many interests", no_damage, "--interests is 99", "1 to 32", {"--interests": 99}),
    Bad("export", "the output holds something else", write_foreign_file, "thesis.txt", "Name a folder"),
]  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Write a dataset, a run on it and a dataset with prompts and answers."""
    write_dataset(folder / "data", walks(USERS, ITEMS, shortest=4), items=ITEMS, rows_per_group=4)
    with contextlib.chdir(folder):
        assert stage("pretrain", OPTIONS["pretrain"] | {"--output": "run"}) == 0
        more = {"--output": "prompts", "--prompts.answers": ANSWERS}
        assert stage("generate_prompts", OPTIONS["generate_prompts"] | more) == 0


def run_case(bad: Bad, inputs: Path, folder: Path) -> tuple[str, int, str]:
    """Run one case in its own `folder`; returns the command, its exit status and its message.

    Raises:
        AssertionError: the case does not end as it should.
    """
    for name in ("data", "run", "prompts"):
        shutil.copytree(inputs / name, folder / name)
    bad.harm(folder)
    options = OPTIONS[bad.stage] | bad.options
    before = tree(folder)
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = stage(bad.stage, options)
    message = said.getvalue().strip().replace(f"{folder}/", "")
    assert status == 2, (status, message)
    assert "Traceback" not in message
    assert bad.names in message and bad.remedy in message, message
    after = tree(folder)
    left = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and all(
        name == "run/run.lock" or (bad.in_training and LEFT_BY_TRAINING.match(name)) for name in left
    ), left
    shown = {o: v for o, v in options.items() if o in (*SHOWN, *bad.options)}
    words = " ".join(f"{option} {value}" for option, value in shown.items())
    return f"{bad.stage} {words}", status, message


def tree(folder: Path) -> dict[str, bytes | None]:
    """Read every path of a folder, with the content of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def table(rows: list[tuple[str, str, int, str]]) -> str:
    """The rows as Markdown."""

    def cell(text: str) -> str:
        return " ".join(text.partition("error: ")[2].split()).replace("|", "\\|")

    lines = ["| kind | command | exit status | message |", "|---|---|---|---|"]
    lines += [f"| {kind} | `{command}` | {status} | {cell(said)} |" for kind, command, status, said in rows]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("bad", CASES, ids=str)
def test_bad_input_ends_with_a_message_that_names_the_place_and_the_remedy(bad, inputs, tmp_path):
    run_case(bad, inputs, tmp_path)


def test_the_table_has_every_kind_once():
    kinds = [str(bad) for bad in CASES]
    assert len(set(kinds)) == len(kinds) >= 30
    assert {bad.stage for bad in CASES} == set(OPTIONS)
    row = ("a | b", "pretrain --data x", 2, "pretrain: error: Bad\n  thing")
    assert table([row]).splitlines()[-1] == "| a | b | `pretrain --data x` | 2 | Bad thing |"


def test_a_run_continues_without_damaged_rows_if_allowed_and_reports_their_number(inputs, tmp_path, capfd):
    shutil.copytree(inputs / "data", tmp_path / "data")
    row("item_ids", 77, 0)(tmp_path)
    (tmp_path / "data" / PART.replace("1.parquet", "2.parquet")).unlink()
    options = OPTIONS["pretrain"] | {"--train.epochs": 2, "--stream.damaged": "skip", "--stream.damaged_limit": 9}
    with contextlib.chdir(tmp_path):
        assert stage("pretrain", options) == 0
    assert "Damaged: 9 rows were left out, listed in new/damaged.jsonl" in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "new/damaged.jsonl").read_text().splitlines()]
    found = sorted((line["part"], line["row_group"], line["row"], line["rows"]) for line in lines)
    assert found == [(PART, 1, 1, 1), (PART.replace("1.parquet", "2.parquet"), None, None, 8)]
    assert len((tmp_path / "new/history.jsonl").read_text().splitlines()) == 2


def on_rank(rank: int, world_size: int, ports: tuple[int, ...], folder: str) -> list[tuple[int, str]]:
    """Run pretrain and generate_prompts on one of several ranks; returns the status and message of each."""
    dist.destroy_process_group()  # the stages join their own
    ends = []
    for port, name in zip(ports, ("pretrain", "generate_prompts"), strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        said = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = stage(name, OPTIONS[name] | {"--output": f"new-{name}"})
        ends.append((status, said.getvalue()))
    return ends


def test_damage_found_by_one_rank_ends_every_rank_with_its_place(inputs, tmp_path):
    for name in ("data", "run"):
        shutil.copytree(inputs / name, tmp_path / name)
    row("item_ids", 77, 0)(tmp_path)
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    ends = run_ranks(on_rank, 2, ports, str(tmp_path), timeout=120)
    for of_stage in zip(*ends, strict=True):
        assert [status for status, _ in of_stage] == [2, 2]
        told = [said for _, said in of_stage if said]  # what all ranks refuse may be said by one of them
        assert told and all(f": data: {PLACE}: item id 77 is outside" in said for said in told)
        assert not any("Traceback" in said for said in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "new-pretrain", "run"]


def main(output: str) -> None:
    """Try every case and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            write_inputs(Path(folder))
        rows = []
        for number, bad in enumerate(CASES):
            own = Path(folder, str(number))
            own.mkdir()
            rows.append((str(bad), *run_case(bad, Path(folder), own)))
    Path(output).write_text(table(rows))
    print(f"Written: {output}: {len(rows)} kinds of bad input")


if __name__ == "__main__":
    main(sys.argv[1])
