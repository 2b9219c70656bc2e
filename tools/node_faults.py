"""Faults of two nodes in every stage: how long until the job has ended, whom it names, and what it does when resumed.

    OMP_NUM_THREADS=1 python -m tools.node_faults --folder runs/faults          (root; about a minute a cell)
    OMP_NUM_THREADS=1 python -m tools.node_faults --folder runs/faults --only training "node 1 killed"

The nodes are network namespaces with host names of their own, joined by a switch; each has its own launcher, and both
share a disk. When the victim's rank reaches a moment, the fault happens. Then the fault is mended, and the same command
is given again: its result must be the undisturbed one, tensor by tensor. Each cell of the table is kept in the folder
as JSON, and what is there is not run again.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.faults import storage_errors
from tools.faults.injecting import FAULTS, Fault, Place, place_of_faults
from tools.faults.jobs import MOMENTS, TRACEBACK, Moment, run_job
from tools.faults.nodes import explain_missing
from tools.faults.table import find_faulty, show_cells, show_matrix
from tools.small_run import SMALL
from tools.stage_process import preload

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the launcher does, before torch is imported
NEEDS = {
    "pretrain": (),
    "generate_prompts": ("pretrain",),
    "prompt_tune": ("pretrain", "generate_prompts"),
    "evaluate": ("pretrain",),
    "export": ("pretrain",),
    "index": ("pretrain", "export"),
    "retrieve": ("pretrain", "export"),
}
"""The stages whose results each stage reads, in the order in which they can be run."""


def options_of(stage: str, folder: Path, output: Path, stall_seconds: float) -> dict[str, Any]:
    """The command line of a stage, which reads what the stages before it have written to `folder`."""
    data, run, prompts = folder / "data", folder / "pretrain", folder / "generate_prompts"
    training = {
        "--train.stall_seconds": stall_seconds,
        "--train.timeout_seconds": 30,
        "--saving.every_steps": 4,
        "--train.epochs": 3,
        "--train.precision": "fp32",
    }
    small = {name: value for name, value in SMALL.items() if name != "--train.epochs"}
    tuning = {name: value for name, value in small.items() if not name.startswith("--model")}
    reads: dict[str, dict[str, Any]] = {
        "pretrain": {"--data": data, **small, **training},
        "generate_prompts": {"--data": data, "--checkpoint": run, "--batch_users": 8},
        "prompt_tune": {"--data": prompts, "--checkpoint": run, **tuning, **training},
        "evaluate": {"--data": data, "--checkpoint": run, "--batch.tokens": 60},
        "export": {"--data": data, "--checkpoint": run, "--batch.tokens": 60},
        "index": {"--export": output, "--index.kind": "hnsw"},
        "retrieve": {"--export": folder / "export", "--data": data, "--k": 5, "--index": "exact"},
    }
    limits = {} if "--train.stall_seconds" in reads[stage] else {"--stall_seconds": stall_seconds}
    written = {} if stage == "index" else {"--output": result_of(stage, output)}
    return {**reads[stage], **limits, **written}


def result_of(stage: str, output: Path) -> Path:
    """The file or folder that a stage writes."""
    return output.with_suffix(".json") if stage == "evaluate" else output


def differ(stage: str, output: Path, undisturbed: Path) -> list[str]:
    """What differs between two results, one line each."""
    from tools.kill_test import find_differences

    def compare() -> list[str]:
        if stage in ("pretrain", "prompt_tune"):
            return find_differences(output, undisturbed)
        if stage == "evaluate":
            results = [json.loads(result_of(stage, each).read_text())["results"] for each in (output, undisturbed)]
            return [] if results[0] == results[1] else [f"{output.name} has other results"]
        tables = [read_tables(each) for each in (output, undisturbed)]
        if tables[0].keys() != tables[1].keys():
            return [f"{output.name} holds {[*tables[0]]}, undisturbed {[*tables[1]]}"]
        return [f"{name} of {output.name} differs" for name, rows in tables[0].items() if rows != tables[1][name]]

    return in_fork(compare)


def read_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table of a result, by id: which rank wrote which is left to chance."""
    import pyarrow.parquet as pq

    tables: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.parquet")):
        tables.setdefault(path.parent.name, []).extend(pq.read_table(path, use_threads=False).to_pylist())
    return {name: sorted(rows, key=lambda row: next(iter(row.values()))) for name, rows in tables.items()}


def in_fork(function: Callable[[], list[str]]) -> list[str]:
    """Call a function in a fork of this process: it may start threads, and launchers are forked from this one."""
    with tempfile.NamedTemporaryFile("r") as file:
        pid = os.fork()
        if not pid:
            try:
                Path(file.name).write_text(json.dumps(function()))
            except BaseException as error:
                Path(file.name).write_text(json.dumps([repr(error)]))
            os._exit(0)
        os.waitpid(pid, 0)
        lines: list[str] = json.loads(file.read())
        return lines


def is_complete(stage: str, output: Path) -> bool:
    """Whether a reader would take a result for a complete one."""
    result = result_of(stage, output)
    return result.exists() if stage == "evaluate" else (result / "manifest.json").exists()


def run_cell(place: Place, folder: Path, fault: Fault, moment: Moment, cell: str) -> dict[str, Any]:
    """Run a stage with a fault, then again without; returns the values of a cell of the table."""
    stage = moment.stage
    output, logs, alone = place.disk / cell, folder / "said" / cell, folder / _writer(stage)
    if stage == "index":
        first = run_job(place, Moment("export", ""), options_of("export", folder, output, place.stall_seconds), logs)
        assert first.statuses == [0, 0], first.said
    options = options_of(stage, folder, output, place.stall_seconds)
    end = run_job(place, moment, options, logs, fault)
    happened = bool(end.place) or bool(fault.hours)
    values: dict[str, Any] = {"commit": os.environ.get("COMMIT", ""), "happened": happened, **end.to_json()}
    if not end.statuses == [0, 0]:
        fault.mend(place)
    elif not fault.goes_on:
        fault.mend(place)
    if end.statuses != [0, 0] and stage not in ("pretrain", "prompt_tune", "index"):
        values["half"] = is_complete(stage, output) and bool(differ(stage, output, alone))
    if end.statuses != [0, 0]:
        again = run_job(place, moment, options, folder / "said" / f"{cell}-again")
        values |= {"again": again.statuses, "again_said": [] if again.statuses == [0, 0] else again.said}
    complete = values.get("again", end.statuses) == [0, 0]
    values["differences"] = differ(stage, output, alone) if complete else ["it did not resume"]
    values["tracebacks"] = sum(text.count(TRACEBACK) for text in end.said)
    return values


def _writer(stage: str) -> str:
    return "export" if stage == "index" else stage


def write_data(folder: Path) -> list[str]:
    """Write the dataset."""
    from tools.small_run import walks, write_dataset

    write_dataset(folder, walks(400, 60, shortest=3, longest=14), items=60, rows_per_group=8)
    return []


def prepare(place: Place, folder: Path, stages: set[str]) -> None:
    """Write the dataset, and run each stage that is needed once undisturbed, as far as that is not done yet."""
    (folder / "said").mkdir(parents=True, exist_ok=True)
    (folder / "cells").mkdir(exist_ok=True)
    if not (folder / "data" / "manifest.json").exists():
        in_fork(lambda: write_data(folder / "data"))
    needed = {*stages, *(each for stage in stages for each in NEEDS[stage])} - {"index"}
    for stage in [each for each in NEEDS if each in needed]:
        done = folder / f"{stage}.done"
        if not done.exists():
            options = options_of(stage, folder, folder / stage, place.stall_seconds)
            end = run_job(place, Moment(stage, ""), options, folder / "said" / stage)
            assert end.statuses == [0, 0], "\n".join(end.said)
            done.write_text(json.dumps(end.to_json()))


def make_ready(folder: Path, faults: dict[str, Fault]) -> None:
    """Import what stages import, in a process that can let calls to the system fail, where a fault needs it."""
    if any(fault.needs_library for fault in faults.values()):
        if (missing := storage_errors.explain_missing()) is not None:
            raise SystemExit(f"calls to the system cannot be let fail here: {missing}")
        storage_errors.preload(folder)
    preload()


def main() -> int:
    """Run the cells that are asked for and not there yet; print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder that keeps cells and what was said")
    parser.add_argument("--only", nargs="+", default=[], help="names of faults and moments; default: all")
    parser.add_argument("--show", action="store_true", help="run nothing: show the cells that are there")
    parser.add_argument("--stall_seconds", type=float, default=15.0, help="of the stages")
    options = parser.parse_args()
    if not options.show and (missing := explain_missing()) is not None:
        raise SystemExit(f"no nodes can be made here: {missing}")
    if unknown := set(options.only) - {*FAULTS, *MOMENTS}:
        raise SystemExit(f"no fault or moment is named {', '.join(sorted(unknown))}; there are {[*FAULTS, *MOMENTS]}")
    folder = options.folder.resolve()
    faults = {name: fault for name, fault in FAULTS.items() if name in options.only or not {*FAULTS} & {*options.only}}
    moments = {name: each for name, each in MOMENTS.items() if name in options.only or not {*MOMENTS} & {*options.only}}
    if not options.show:
        make_ready(folder, faults)
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for moment_name, moment in moments.items():
        for fault_name, fault in faults.items():
            cell = f"{fault_name}-{moment_name}".replace(" ", "_")
            path = folder / "cells" / f"{cell}.json"
            if options.show and not path.exists():
                continue
            if not path.exists():
                with place_of_faults(folder, options.stall_seconds) as place:
                    prepare(place, folder, {moment.stage})
                    values = run_cell(place, folder, fault, moment, cell)
                path.write_text(json.dumps(values, indent=1))
            cells[fault_name, moment_name] = json.loads(path.read_text())
            print(show_cells({(fault_name, moment_name): cells[fault_name, moment_name]}), flush=True)
    print(f"\n{show_matrix(cells)}")
    return bool(find_faulty(cells))


if __name__ == "__main__":
    sys.exit(main())
