"""The paper's baselines, each trained for some minutes, beside ours: same split, our metrics, with their time.

    make recbole
    python tools/compare_recbole.py --data DATASET --output runs/recbole --models BPR SASRec --minutes 30 \\
        --ours runs/paper/beauty/seed0/pretrain_test.json

BPR, GRU4Rec, NARM, STAMP, BERT4Rec, SASRec and S3-Rec are RecBole's, in an environment of its own; ComiRec is
`tools/comirec.py`. DATASET is one of prepare, with any --hold_out that holds items out. Each model is trained on its
training part, chosen by its validation items, and scores all items for the histories before its test items, by the same
ranks and metrics as ours, masked and unmasked. S3-Rec also needs an attribute of the items (prepare --items).

Each model's result is kept as OUTPUT/MODEL.json, so that a stopped comparison resumes; OUTPUT/report.md and report.json
have all of them, and the evaluations of --ours.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint  # noqa: E402
from recgpt_torchrec.data.inputs.attributes import Attributes  # noqa: E402
from recgpt_torchrec.data.inputs.records import DatasetAttribute  # noqa: E402
from recgpt_torchrec.data.inputs.spec import Attribute, Inputs  # noqa: E402
from recgpt_torchrec.data.ragged import Ragged  # noqa: E402
from recgpt_torchrec.data.reading.histories import HistoryReader  # noqa: E402
from recgpt_torchrec.data.split import SplitName  # noqa: E402
from recgpt_torchrec.data.windows import row_groups  # noqa: E402
from tools import comirec, recbole_model  # noqa: E402
from tools.budgeted import HELD_OUT, KS, Job, Part  # noqa: E402

ENVIRONMENT = ".venv-recbole/bin/python"
MODELS = (*recbole_model.MODELS, *comirec.MODELS)
NEEDS_ATTRIBUTE = recbole_model.PRETRAINED


def main(arguments: list[str] | None = None) -> None:
    """Train every model that has no result yet, and write the report."""
    options = parse(arguments)
    run(options)
    print(f"report        {options.output}/report.md, report.json")


def run(options: argparse.Namespace) -> None:
    """Train and report as the options of `parse` say."""
    dataset = Dataset.open(options.data)
    if dataset.manifest.hold_out == "none":
        refuse(f"--data {options.data} holds nothing out; prepare it with --hold_out last or time")
    attribute = choose_attribute(dataset, options.attribute)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    common = {"minutes": options.minutes, "seed": options.seed, "threads": options.threads}
    common |= {"histories": histories_fingerprint(dataset)}
    settings = {name: common | options_of(name, options) for name in MODELS}
    names = [name for name in options.models or MODELS if name != NEEDS_ATTRIBUTE or attribute or options.models]
    missing = []
    for name in names:
        if name == NEEDS_ATTRIBUTE and attribute is None:
            refuse(f"{name} needs an attribute of items, which --data has not; name one in prepare --items")
        path = output / f"{name}.json"
        earlier = json.loads(path.read_text()) if path.exists() else None
        if earlier is not None and earlier["settings"] != settings[name]:
            refuse(f"{path} has other minutes, seed, threads, batches or data; give another --output, or remove it")
        missing += [name] * (earlier is None)
    if any(name in recbole_model.MODELS for name in missing) and not Path(options.python).exists():
        refuse(f"there is no {options.python}; run make recbole, or name an interpreter with --python")
    for number, name in enumerate(missing):
        left = (len(missing) - number) * options.minutes
        said = f"up to {options.minutes:g} minutes, at most {left:g} left in all"
        print(f"{name} ({number + 1} of {len(missing)}): {said}", flush=True)
        result = train(name, dataset, attribute, output, options)
        temporary = output / f"{name}.tmp"
        temporary.write_text(json.dumps({**result, "settings": settings[name]}, indent=1))
        temporary.replace(output / f"{name}.json")
    if NEEDS_ATTRIBUTE not in names and not options.models:
        print(f"{NEEDS_ATTRIBUTE} is left out: the items have no attribute to pre-train on (prepare --items)")
    write_report(options, output)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset that holds items out")
    parser.add_argument("--output", default="runs/recbole", help="output folder (default: runs/recbole)")
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"default: all, {NEEDS_ATTRIBUTE} with attributes")
    parser.add_argument("--minutes", type=float, default=30, help="of training per model (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=256,
        help="targets per step of RecBole's models (default: 256; its own 2048 learns far less in minutes on a CPU)",
    )
    parser.add_argument("--attribute", help=f"of items, for {NEEDS_ATTRIBUTE} (default: the first of the dataset)")
    parser.add_argument("--ours", nargs="*", default=[], metavar="FILE", help="evaluations of this project to show too")
    parser.add_argument("--python", default=str(ROOT / ENVIRONMENT), help=f"RecBole's (default: {ENVIRONMENT})")
    parser.set_defaults(model_options={})
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.threads < 1 or options.batch_size < 1:
        parser.error("--minutes must be more than 0, and --threads and --batch_size at least 1")
    options.model_options["train_batch_size"] = options.batch_size
    return options


def options_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Options of a model beside its own: RecBole's models have some."""
    return dict(options.model_options) if name in recbole_model.MODELS else {}


def refuse(message: str) -> NoReturn:
    """End with status 2 and a message."""
    print(f"compare_recbole: {message}", file=sys.stderr)
    raise SystemExit(2)


def choose_attribute(dataset: Dataset, name: str | None) -> DatasetAttribute | None:
    """The items' attribute of a name, or their first one; None: they have none.

    Raises:
        SystemExit: there is none of that name; with status 2.
    """
    attributes = {each.name: each for each in dataset.manifest.attributes if each.entity == "item"}
    if name is not None and name not in attributes:
        refuse(f"--attribute {name}: items have {', '.join(attributes) or 'no attributes'}")
    return attributes[name] if name is not None else next(iter(attributes.values()), None)


def read(dataset: Dataset, split: SplitName) -> Part:
    """The whole histories of a split, with what it holds out."""
    histories = HistoryReader(dataset=dataset, split=split, max_len=2**31).read(row_groups(dataset))
    held_out = np.empty(0, np.int64) if histories.held_out is None else histories.held_out
    order = np.argsort(histories.users, kind="stable")
    rows = Ragged(histories.items, histories.offsets).take(order)
    return Part(histories.users[order], rows, held_out[order] if held_out.size else held_out)


def write_log(dataset: Dataset, attribute: DatasetAttribute | None, folder: Path) -> None:
    """Write all interactions as `tools/budgeted.py` and RecBole read them, and the items' attribute.

    log.inter has a row per interaction, with its place in the history as its time and the part that it is a target of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {split: read(dataset, split) for split in get_args(SplitName)}
    arrays: dict[str, Any] = {}
    for split in ("training", *HELD_OUT):
        users, history, targets = parts[split]
        values = {"users": users, "values": history.values, "offsets": history.offsets, "targets": targets}
        arrays |= {f"{split}_{name}": array.astype(np.int64) for name, array in values.items()}
    np.savez(folder / "parts.npz", **arrays)
    # A held-out item is at the place after the history that it is ranked for.
    ends = {
        split: dict(zip(parts[split].users.tolist(), np.diff(parts[split].history.offsets).tolist(), strict=True))
        for split in ("training", *HELD_OUT)
    }
    with open(folder / f"{folder.name}.inter", "w") as out:
        out.write("user_id:token\titem_id:token\ttimestamp:float\tpart:float\n")
        for user, items in zip(parts["all"].users.tolist(), parts["all"].history.to_lists(), strict=True):
            trained, *held_out = (ends[split].get(user) for split in ("training", *HELD_OUT))
            for place, item in enumerate(items):
                kind = 0 if place < (trained or 0) else held_out.index(place) + 1 if place in held_out else 3
                out.write(f"{user}\t{item}\t{place}\t{kind}\n")
    if attribute is not None:
        write_items(dataset, attribute, folder / f"{folder.name}.item")


def write_items(dataset: Dataset, attribute: DatasetAttribute, file: Path) -> None:
    """Write the values of an attribute of the items, as numbers, as RecBole reads them."""
    chosen = Attribute(entity="item", name=attribute.name, values=attribute.values, fingerprint=attribute.fingerprint)
    opened = Attributes.open(dataset, Inputs(attributes=[chosen]))
    assert opened is not None
    lengths, ids = opened.items.columns[0].of(np.arange(dataset.manifest.items))
    with open(file, "w") as out:
        out.write(f"item_id:token\t{attribute.name}:token_seq\n")
        for item, values in enumerate(Ragged.from_lengths(ids, lengths.astype(np.int64)).to_lists()):
            out.write(f"{item}\t{' '.join(map(str, values))}\n")


def train(
    name: str, dataset: Dataset, attribute: DatasetAttribute | None, output: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train and measure a model in its environment; returns its result."""
    log = output / "log"
    source = f"{histories_fingerprint(dataset)} {attribute.name if attribute else ''}"
    if not (log / "source").exists() or (log / "source").read_text() != source:
        write_log(dataset, attribute, log)
        (log / "source").write_text(source)
    of_recbole = name in recbole_model.MODELS
    python, program = (options.python, recbole_model) if of_recbole else (sys.executable, comirec)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        job = Job(
            model=name,
            log=str(log.resolve()),
            items=dataset.manifest.items,
            minutes=options.minutes,
            seed=options.seed,
            threads=options.threads,
            scratch=str(Path(scratch).resolve()),
            result=str((Path(scratch) / "result.json").resolve()),
            started=time.time(),
            options=options_of(name, options),
        )
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": ""}
        command = [python, "-W", "ignore", str(program.__file__), str(file.resolve())]
        done = subprocess.run(command, env=environment, cwd=scratch)
        if done.returncode:
            raise SystemExit(f"{name} ended with status {done.returncode}")
        return json.loads(Path(job.result).read_text())


def write_report(options: argparse.Namespace, output: Path) -> None:
    """Write the table of every model that has a result, and of our evaluations."""
    found = {name: output / f"{name}.json" for name in MODELS}
    models = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    ours = {file: json.loads(Path(file).read_text())["results"] for file in options.ours}
    lines = ["# The paper's baselines beside ours", ""]
    lines += ["Test, the whole catalogue is ranked. Each model was chosen by NDCG@10 (masked) of its validation items,"]
    lines += ["and had a budget of minutes, its validations within; pre-training is part of it.", ""]
    lines += effort_table(models)
    columns = [f"{metric}@{k}" for k in KS for metric in ("HR", "NDCG")]
    for how in ("masked", "unmasked"):
        lines += [f"## {how}", "", "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        rows = {name: result[how] for name, result in models.items()}
        rows |= {f"{path} ({file})": each[how] for file, results in ours.items() for path, each in results.items()}
        for name, figures in rows.items():
            cells = (f"{figures[column]:.4f}" if column in figures else "–" for column in columns)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Settings", ""]
    for name, result in models.items():
        settings = ", ".join(f"{option} {value}" for option, value in result["options"].items())
        lines.append(f"- {name}: {settings}; {result['parameters']:,} parameters")
    (output / "report.md").write_text("\n".join([*lines, ""]))
    (output / "report.json").write_text(json.dumps({"models": models, "ours": ours}, indent=1))


def effort_table(models: dict[str, Any]) -> list[str]:
    """Rows of Markdown: what was spent on each model, and when it was best on validation."""
    lines = [
        "| | budget, minutes | minutes to best | without validations | epochs to best | validation NDCG@10 | ended |"
    ]
    lines.append("|---|" + "---|" * 6)
    for name, result in models.items():
        best, minutes = result["best"], result["settings"]["minutes"]
        cells = [f"{minutes:g}", f"{best['seconds'] / 60:.1f}", f"{best['train_s'] / 60:.1f}", f"{best['epochs']:.1f}"]
        ended = f"{ENDS[result['stopped']]}, {result['seconds'] / 60:.1f} minutes"
        lines.append(f"| {name} | " + " | ".join([*cells, f"{best['masked']:.4f}", ended]) + " |")
    return [*lines, ""]


ENDS = {"early": "no better for 10 validations", "minutes": "time over"}
"""Why a training ended, in words."""

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the model's process ends too
    main()
