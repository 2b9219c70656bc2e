"""What more layers, wider vectors and more data bring: the pre-trained model on one log, one of them changed at a time.

    python pipelines/scaling.py --dataset video=../shared/data/Video_Games.txt --output runs/scaling \\
        --layers 2 4 --dims 32 128 --shares 0.25 0.5

The base is a run of pretrain with configs/NAME.yaml, or that of `paper`, whose options follow the data; each other
point changes one thing. A share of the data is that share of the users, those of a smaller share among those of a
larger one; all other users are new to the model, which then has no vector of their own. Options that follow the data
follow the share: it takes more epochs, of fewer tokens a step. Every point is measured on the same test items of all
users, among the whole catalogue. Writes OUTPUT/report.md, report.json and figures/NAME.png, updated after each seed;
the same command resumes an interrupted pipeline.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment  # noqa: E402
from pipelines.experiment import from_root, read_datasets, uses_neighbours  # noqa: E402
from pipelines.feedback import keys_of  # noqa: E402
from pipelines.paper_report import read_training  # noqa: E402
from pipelines.seed_tables import Row, mean_and_deviation, read_json, table  # noqa: E402
from pipelines.steps import ROOT, pipeline  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint  # noqa: E402
from recgpt_torchrec.data.ragged import Ragged  # noqa: E402
from recgpt_torchrec.data.reading.reader import Reader  # noqa: E402
from recgpt_torchrec.data.segments import INTERACTED  # noqa: E402
from recgpt_torchrec.data.windows import row_groups  # noqa: E402

METRICS = ("HR@10", "NDCG@10")
BASE = "base"
"""The point that changes nothing; it is on every axis."""


@dataclass(frozen=True)
class Point:
    """A run: one change of the base."""

    axis: str
    """`layers`, `dim` or `share`; `base`."""
    value: float

    @property
    def name(self) -> str:
        """Name in paths: `layers_2`."""
        return BASE if self.axis == BASE else f"{self.axis}_{self.value:g}"

    @property
    def options(self) -> list[str]:
        """Options of pretrain."""
        return [f"--model.{self.axis}", f"{self.value:g}"] if self.axis in ("layers", "dim") else []


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    datasets: dict[str, str]
    """Raw file by name."""
    prepare: list[str]
    """Options of the stage prepare."""
    points: list[Point]

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        shares = sum(point.axis == "share" for point in self.points)
        of_seed = len(self.points) * ["pretrain", "test"]
        kinds = (1 + shares) * ["prepare"] + self.seeds * of_seed
        return [f"{name} {kind}" for name in self.datasets for kind in kinds]


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("scaling", options.output, options.planned()) as steps:
        for name in options.datasets:
            Scaling(name, options, steps).run()
    print(f"figures       {options.output}/figures/*.png")


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", required=True, metavar="NAME=FILE", help="raw files and their names")
    parser.add_argument("--output", default="runs/scaling", help="output folder (default: runs/scaling)")
    parser.add_argument(
        "--layers", type=int, nargs="*", default=[2, 4], help="decoder blocks, beside the base's (default: 2 4)"
    )
    parser.add_argument(
        "--dims", type=int, nargs="*", default=[32, 128], help="widths, beside the base's (default: 32 128)"
    )
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.25, 0.5], help="of the users to train on (default: 0.25 0.5)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to SEEDS - 1 (default: 1)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of each stage (default: 2)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    parser.add_argument("--input_format", default="auto", help="as in the stage prepare (default: auto)")
    parser.add_argument("--hold_out", choices=["last", "time"], default="last", help="as in prepare (default: last)")
    parser.add_argument("--test_from", help="as in the stage prepare, with --hold_out time")
    given = parser.parse_args(arguments)
    if min(given.seeds, given.ranks, *given.layers, *given.dims) < 1:
        parser.error("--seeds, --ranks, --layers and --dims must be at least 1")
    if not all(0 < share <= 1 for share in given.shares):
        parser.error(f"--shares {' '.join(map(str, given.shares))}: a share is more than 0 and at most 1")
    if (given.hold_out == "time") != (given.test_from is not None):
        parser.error("--hold_out time takes --test_from, which belongs to it")
    split = ["--hold_out", "time", "--test_from", given.test_from] if given.test_from else []
    points = [Point("layers", value) for value in sorted(set(given.layers))]
    points += [Point("dim", value) for value in sorted(set(given.dims))]
    points += [Point("share", value) for value in sorted(set(given.shares) - {1.0})]
    return Options(
        datasets=read_datasets(parser, given.dataset, ("steps", "figures")),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        prepare=["--input_format", given.input_format, *split],
        points=[Point(BASE, 1), *points],
    )


class Scaling(experiment.Experiment):
    """All points on one data set. Example: `Scaling("video", options, steps).run()`."""

    options: Options

    def run(self) -> None:
        """Prepare the whole log and its shares, then train and measure seed by seed."""
        if uses_neighbours(self.config):
            raise SystemExit(f"scaling: {self.config} trains with neighbours, which shares of the users have not")
        self._prepare("prepare", [self.options.datasets[self.name], *self.options.prepare], self.data)
        for point in self.options.points:
            if point.axis == "share":
                self._prepare_share(point)
        for seed in range(self.options.seeds):
            for point in self.options.points:
                shared = point.axis == "share"
                data, needs = (f"{self.folder}/{point.name}", point.name) if shared else (self.data, "prepare")
                run = f"seed{seed}/{point.name}"
                self._train(run, "pretrain", "pretrain", self.config, data, (needs,), seed, point.options)
                self._test(seed, point.name, self.data)
            write_report(self.options)

    def _prepare_share(self, point: Point) -> None:
        """Prepare the log of a share of the users, with the ids and the split of the whole."""
        whole, log = Dataset.open(str(ROOT / self.data)), f"{self.folder}/{point.name}.parquet"
        write_share(whole, ROOT / log, point.value)
        words = [log, "--vocabulary", self.data, "--min_count", "1", "--hold_out", whole.manifest.hold_out]
        if whole.manifest.hold_out == "time":
            split = whole.manifest.preparation["split"]
            words += [word for name in ("test_from", "validation_from") for word in (f"--{name}", str(split[name]))]
        self._prepare(point.name, words, f"{self.folder}/{point.name}", ("prepare",))


def write_share(dataset: Dataset, file: Path, share: float) -> None:
    """Write the interactions of a share of the users of a dataset, by their raw keys, as a log, unless it is there.

    Args:
        dataset: the whole one.
        file: Parquet, with user_id, item_id and timestamp; the latter is the place in the history where the dataset
            has no times.
        share: of the users; those of a smaller share are among those of a larger one.
    """
    manifest = dataset.manifest
    made_of = {b"histories": histories_fingerprint(dataset).encode()}
    if file.exists() and (pq.read_schema(file).metadata or {}).items() >= made_of.items():
        return
    drawn = np.zeros(manifest.users, dtype=bool)
    drawn[np.random.default_rng(0).permutation(manifest.users)[: max(1, round(share * manifest.users))]] = True
    users, items = (pa.array(keys_of(dataset, parts)) for parts in (manifest.user_parts, manifest.item_parts))
    temporary, writer = file.with_suffix(".tmp"), None
    for group in row_groups(dataset):
        rows = Reader(dataset, times=True).read(group).table
        rows = rows.filter(pa.array(drawn[rows["user_id"].to_numpy()]))
        entries = Ragged.from_arrow(rows["item_ids"])
        owners = rows["user_id"].to_numpy()[entries.owners]
        times = np.arange(entries.values.size) - entries.offsets[entries.owners]
        if "timestamps" in rows.schema.names:
            times = Ragged.from_arrow(rows["timestamps"]).values
        is_interaction = np.ones(entries.values.size, dtype=bool)
        if "segment_ids" in rows.schema.names:  # what was shown is none
            is_interaction = Ragged.from_arrow(rows["segment_ids"]).values == INTERACTED
        ids = {"user_id": (users, owners), "item_id": (items, entries.values)}
        columns = {name: keys.take(pa.array(of[is_interaction])) for name, (keys, of) in ids.items()}
        log = pa.table({**columns, "timestamp": times[is_interaction]}).replace_schema_metadata(made_of)
        writer = writer or pq.ParquetWriter(temporary, log.schema)
        writer.write_table(log)
    assert writer is not None
    writer.close()
    temporary.replace(file)


# --------------------------------------------------------------------------------------------------------- report


def write_report(options: Options) -> None:
    """Write report.json, report.md and the figures of the seeds that are finished."""
    output = ROOT / options.output
    report = {name: collect(options, name) for name in options.datasets}
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))
    (output / "figures").mkdir(exist_ok=True)
    for name, points in report.items():
        if points:
            draw(name, points, output / f"figures/{name}.png")


def collect(options: Options, name: str) -> list[dict[str, Any]]:
    """The points of a data set in order, with their figures over the seeds that are finished."""
    found = []
    for point in options.points:
        runs = [ROOT / options.output / name / f"seed{seed}/{point.name}" for seed in range(options.seeds)]
        runs = [run for run in runs if run.with_name(f"{run.name}_test.json").exists()]
        if not runs:
            continue
        tests = [read_json(run.with_name(f"{run.name}_test.json"))["results"]["pretrain"]["masked"] for run in runs]
        model, training = read_json(runs[0] / "run.json")["config"]["model"], [read_training(run) for run in runs]
        found.append(
            {
                "axis": point.axis,
                "value": point.value,
                "layers": model["layers"],
                "dim": model["dim"],
                "results": {metric: mean_and_deviation([test[metric] for test in tests]) for metric in METRICS},
                "train_s": mean_and_deviation([each["train_s"] for each in training]),
            }
        )
    return found


def markdown(report: dict[str, list[dict[str, Any]]]) -> str:
    """The report in Markdown."""
    lines = ["# Layers, width and data", ""]
    lines += ["Test, masked, the whole catalogue is ranked, on the same users and items at every point. Bold: best of"]
    lines += ["its column. A share is of the users; the others are new to the model. Options that follow the data"]
    lines += ["follow the share.", ""]
    for name, points in report.items():
        rows: list[Row] = [(title_of(point), list(point["results"].values())) for point in points]
        made = table(name, METRICS, rows)
        ends = ["minutes |", "---|", *(f"{point['train_s']['mean'] / 60:.1f} |" for point in points)]
        lines += [*(f"{line} {end}" for line, end in zip(made, ends, strict=True)), ""]
    return "\n".join(lines)


def title_of(point: dict[str, Any]) -> str:
    """A point in words."""
    users = f"{point['value']:.4g} of the users" if point["axis"] == "share" else "all users"
    blocks = f"{point['layers']} layer{'s' * (point['layers'] != 1)}"
    return f"{point['axis']}: {blocks}, dim {point['dim']}, {users}"


def draw(name: str, points: list[dict[str, Any]], file: Path) -> None:
    """Plot NDCG@10 along each axis; the base is on all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = points[0]
    axes = {"layers": base["layers"], "dim": base["dim"], "share": 1.0}
    figure, plots = pyplot.subplots(1, len(axes), figsize=(12, 4), sharey=True)
    for plot, (axis, of_base) in zip(plots, axes.items(), strict=True):
        known = {of_base: base} | {each["value"]: each for each in points if each["axis"] == axis}
        values = sorted(known)
        figures = [known[value]["results"]["NDCG@10"] for value in values]
        errors = [each["sd"] or 0 for each in figures]
        plot.errorbar(values, [each["mean"] for each in figures], yerr=errors, marker="o", capsize=3)
        plot.set_xscale("log", base=2)
        plot.set(xlabel={"layers": "layers", "dim": "width", "share": "share of the users"}[axis])
        plot.grid(alpha=0.3)
    plots[0].set(ylabel="NDCG@10 (test, masked)")
    figure.suptitle(f"{name}: pre-trained model")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
