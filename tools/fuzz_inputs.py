"""The inputs of `tools.fuzz`: one of every kind of file, and the options of the stages that make and read them."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from tools.stage_process import run_in_process, run_stage

USERS, ITEMS, ANSWERS = 40, 20, 2
TRAINING: dict[str, Any] = {
    "--model.dim": 8,
    "--model.max_len": 8,
    "--model.layers": 1,
    "--batch.tokens": 60,
    "--loss.candidates": "all",
    "--optimizer.warmup_steps": 2,
    "--train.epochs": 2,
    "--saving.every_steps": 2,
    "--saving.keep": 20,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "prepare": {"--min_count": 1, "--output": "new"},
    "find_neighbours": {"--data": "data", "--output": "neighbours", "--count": 4},
    "pretrain": {"--data": "data", **TRAINING},
    "prompt_tune": {"--data": "prompts", "--checkpoint": "run", "--output": "new", "--batch.tokens": 60}
    | {"--train.epochs": 1, "--tuning.soft_targets": 0.3, "--loss.candidates": "all"},
    "evaluate": {"--data": "data", "--checkpoint": "run", "--output": "new.json"},
    "export": {"--data": "data", "--checkpoint": "run", "--output": "new", "--interests": 2},
    "apply": {"--export": "vectors", "--deltas": "delta", "--output": "new"},
    "retrieve": {"--export": "vectors", "--data": "data", "--output": "new", "--k": 5},
    "report": {"--runs": "run", "--evaluations": "test.json", "--output": "report.html"},
    "parse": {"--data": "data", "--output": "new", "--config": "config.yaml"},
}
DESCRIBED = {"--input": "log.csv", "--item_attributes": "brand,tags:list,price:number,title:text"}


def make_inputs(folder: Path) -> None:
    """Make every kind of file, in a process of its own."""

    def make() -> int:
        write_inputs(folder)
        return 0

    folder.mkdir()
    end = run_in_process(folder, make, "none", seconds=600)
    if end.status != 0:
        raise SystemExit(f"the inputs cannot be made:\n{end.text}")


def write_inputs(folder: Path) -> None:
    """Write logs, a dataset, runs, prompts, an export, a delta, lists, an evaluation and a configuration."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tools.small_run import walks, write_dataset

    histories = walks(USERS, ITEMS, shortest=4)
    rows = [
        (f"u{user}", f"i{item}", 10**9 + time) for user, each in enumerate(histories) for time, item in enumerate(each)
    ]
    names = ("user_id", "item_id", "timestamp")
    for ending, separator in {"csv": ",", "tsv": "\t"}.items():
        lines = [separator.join(map(str, row)) for row in (names, *rows)]
        (folder / f"log.{ending}").write_text("\n".join([*lines, ""]))
    (folder / "log.csv.gz").write_bytes(gzip.compress((folder / "log.csv").read_bytes()))
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (folder / "log.jsonl").write_text("\n".join([*lines, ""]))
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), folder / "log.parquet")
    header = "user_id:token\titem_id:token\ttimestamp:float"
    (folder / "log.inter").write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows), ""]))
    (folder / "log.txt").write_text("".join(f"{u} {' '.join(map(str, each))}\n" for u, each in enumerate(histories, 1)))
    write_dataset(folder / "data", histories, items=ITEMS, rows_per_group=4)
    shutil.copytree(folder / "data", folder / "damaged")
    (folder / "damaged/sequences/part-00002.parquet").unlink()

    def run(stage: str, **more: Any) -> None:
        options = OPTIONS[stage] | {f"--{name.replace('__', '.')}": value for name, value in more.items()}
        if status := run_stage(stage, options):
            raise SystemExit(f"{stage} ended with status {status}")

    run("prepare", input="log.csv", output="prepared")
    write_tables(folder)
    if status := run_stage(
        "prepare", OPTIONS["prepare"] | DESCRIBED | {"--items": "items.csv", "--output": "described"}
    ):
        raise SystemExit(f"prepare with a table ended with status {status}")
    run("find_neighbours")
    run("pretrain", output="run", train__epochs=1)
    run("pretrain", output="half")
    run("pretrain", output="skipped", data="damaged", stream__damaged="skip", stream__damaged_limit=9)
    for name in ("half", "skipped"):  # as if it had been stopped within its second epoch
        checkpoints = sorted((folder / name / "checkpoints").iterdir())
        keep = next(
            path
            for path in reversed(checkpoints)
            if json.loads((path / "checkpoint.json").read_text())["progress"]["position"]["queues"]
        )
        for path in checkpoints:
            if path != keep:
                shutil.rmtree(path)
        (folder / name / "best.json").unlink()
    best = [path for path in sorted((folder / "run/checkpoints").iterdir())]
    for path in best[:-1]:
        shutil.rmtree(path)
    run_stage("generate_prompts", {"--data": "data", "--checkpoint": "run", "--output": "prompts", "--prompts.k": 1}
              | {"--prompts.answers": ANSWERS})  # fmt: skip
    run("export", output="vectors")
    run("export", output="indexed", index__kind="hnsw", index__shards=2)
    run("export", output="delta", checkpoint="half", since="vectors")
    run("retrieve", output="lists")
    write_keys(folder)
    run("evaluate", output="test.json")
    groups: dict[str, dict[str, Any]] = {}
    for option, value in TRAINING.items():
        group, _, name = option.removeprefix("--").partition(".")
        groups.setdefault(group, {})[name] = value
    lines = [f"{g}:\n" + "".join(f"  {name}: {value}\n" for name, value in of.items()) for g, of in groups.items()]
    (folder / "config.yaml").write_text("seed: 3\n" + "".join(lines))


def write_tables(folder: Path) -> None:
    """Write tables of attributes of the log's items."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = [f"i{item}" for item in range(ITEMS)]
    rows = [
        {"item_id": item, "brand": f"b{n % 5}", "tags": f"t{n % 3}|t{n % 4}", "price": n / 4, "title": f"The {item}"}
        for n, item in enumerate(items)
    ]
    lines = [",".join(map(str, row.values())) for row in rows]
    (folder / "items.csv").write_text("\n".join([",".join(rows[0]), *lines, ""]))
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")


def write_keys(folder: Path) -> None:
    """Write lists and tables of the keys of the dataset's items and users."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    items, users = (pq.read_table(folder / "data" / name)["key"].to_pylist() for name in ("items", "users"))
    (folder / "keys.txt").write_text("".join(f"{key}\n" for key in items[::2]))
    (folder / "keys.jsonl").write_text("".join(json.dumps({"user_id": key}) + "\n" for key in users[::3]))
    pq.write_table(pa.table({"item_id": items, "price": list(range(len(items)))}), folder / "keys.parquet")
