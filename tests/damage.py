"""What makes an input bad: damage to a log, a dataset, a run or a dataset with prompts in a folder."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.support import change_json, overwrite, rewrite, walks, write_dataset

USERS, ITEMS = 40, 20
PART = "sequences/part-00001.parquet"
GOOD = "user_id,item_id,timestamp\nu,a,1\nu,b,2\n"


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
