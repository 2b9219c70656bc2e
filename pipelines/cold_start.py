"""Do attributes carry items that were never trained? Items of a log are held out as cold, drawn anew with each seed.

    python pipelines/cold_start.py --input ../shared/data/ml-100k.inter --name ml100k \\
        --items ../shared/data/ml-100k.item --item_attributes class release_year:number --output runs/cold_start

Per seed, a share of the items is cold: no row of theirs is trained on, or in a history. The test item of a user is the
newest interaction with a cold item; the warm items before it are the history, and the newest of those is the validation
item, by which the epoch is chosen. Later rows, and other rows of cold items, are left out; other users are trained
whole. Three models are trained on the same rows:

    ids                   ids alone
    attributes            also the attributes of the tables
    without_id_dropout    the same, with --attributes.id_dropout 0

Each is measured in two rankings, masked: among all items (`evaluate`), and among the cold ones alone, by `export` and
`retrieve --allow`: vectors of cold items come out of the same lookup as others. Beside them: popularity in training, 0
for every cold item; chance among the cold items; and the popularity that these had in the rows that were left out,
which no model has seen. Writes OUTPUT/report.md and report.json, updated after each seed.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment, paper_report, seed_tables  # noqa: E402
from pipelines.experiment import from_root  # noqa: E402
from pipelines.feedback import keys_of  # noqa: E402
from pipelines.input_tables import Tables, add_table_options, read_tables  # noqa: E402
from pipelines.inputs import METRICS, difference_lines, differences  # noqa: E402
from pipelines.seed_tables import Row  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset  # noqa: E402

CONTROL = "ids"
ARMS = {
    CONTROL: ["--attributes.use", "[]"],
    "attributes": [],
    "without_id_dropout": ["--attributes.id_dropout", "0"],
}
"""Options of pretrain of each arm."""
ALL, COLD = "all items", "cold items"
"""What the test items are ranked among."""
SHORTEST = 3
"""Smallest number of warm items before a test item: one is validated on, one is a target, one is its history."""


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    input: str
    """The log."""
    name: str
    """configs/NAME.yaml is the configuration."""
    tables: Tables
    share: float
    """Share of the items that is cold."""
    min_count: int
    first_seed: int

    @property
    def drawn(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        a_seed = ["prepare", *len(ARMS) * ["train", "test", "export", "retrieve"]]
        return [f"{self.name} {kind}" for kind in ["prepare", *self.seeds * a_seed]]


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("cold_start", options.output, options.planned()) as steps:
        ColdStart(options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="the log, in any format of prepare")
    parser.add_argument("--output", default="runs/cold_start", help="output folder (default: runs/cold_start)")
    parser.add_argument("--name", default="inputs", help="name of the configuration NAME.yaml (default: inputs)")
    add_table_options(parser)
    parser.add_argument("--share", type=float, default=0.1, help="share of the items that is cold (default: 0.1)")
    parser.add_argument("--min_count", type=int, default=1, help="of the whole log, as in prepare (default: 1)")
    parser.add_argument("--seeds", type=int, default=5, help="number of draws and trainings (default: 5)")
    parser.add_argument(
        "--first_seed", type=int, default=0, help="first seed; choose options with other seeds (default: 0)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of each stage (default: 1)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    given = parser.parse_args(arguments)
    tables = read_tables(parser, given)
    if not tables.items:
        parser.error("cold items are told by their attributes: give --items and --item_attributes")
    if min(given.seeds, given.ranks, given.min_count) < 1 or given.first_seed < 0:
        parser.error("--seeds, --ranks and --min_count must be at least 1, --first_seed at least 0")
    if not 0 < given.share < 1:
        parser.error(f"--share is {given.share}; it is a share, between 0 and 1")
    return Options(
        input=from_root(given.input),
        output=from_root(given.output),
        seeds=given.seeds,
        first_seed=given.first_seed,
        ranks=given.ranks,
        configs=from_root(given.configs),
        name=given.name,
        tables=tables,
        share=given.share,
        min_count=given.min_count,
    )


class ColdStart(experiment.Experiment):
    """All arms and seeds on one log. Example: `ColdStart(options, steps).run()`."""

    options: Options

    def __init__(self, options: Options, steps: RecordedSteps) -> None:
        super().__init__(options.name, options, steps)

    def run(self) -> None:
        """Prepare the whole log, then draw, train and measure seed by seed; updates the report after each seed."""
        options = self.options
        self._prepare("prepare", [options.input, "--min_count", str(options.min_count)], self.data)
        for seed in options.drawn:
            rows = f"{self.folder}/seed{seed}/rows"
            split_rows(Dataset.open(str(ROOT / self.data)), ROOT / rows, options.share, seed)
            data, prepared = f"{self.folder}/seed{seed}/data", f"seed{seed}/prepare"
            files = [f"{rows}/train.parquet", "--validation_input", f"{rows}/validation.parquet"]
            files += ["--test_input", f"{rows}/test.parquet", "--hold_out", "given", "--min_count", "1"]
            tables = [*options.tables.arguments(), "--catalogue", "items"]
            self._prepare(prepared, [*files, *tables], data, ("prepare",))
            for arm, reads in ARMS.items():
                title = f"seed{seed}/{arm}"
                self._train(title, "train", "pretrain", self.config, data, (prepared,), seed, reads)
                self._test(seed, arm, data, baselines=arm == CONTROL)
                self._list_cold(title, data, f"{rows}/cold.csv")
            write_report(options, self.steps)

    def _list_cold(self, run: str, data: str, cold: str) -> None:
        """Export a run, and retrieve lists of cold items alone."""
        vectors, lists = f"{self.folder}/{run}_export", f"{self.folder}/{run}_lists"
        arguments = ["--data", data, "--checkpoint", f"{self.folder}/{run}", "--output", vectors, "--history", "test"]
        self._make("export", f"{run}_export", arguments, vectors, run)
        arguments = ["--export", vectors, "--data", data, "--allow", cold, "--k", "10", "--index", "exact"]
        self._make("retrieve", f"{run}_lists", [*arguments, "--output", lists], lists, f"{run}_export")

    def _make(self, stage: str, title: str, arguments: list[str], folder: str, needs: str) -> None:
        self.steps.run(
            f"{self.name}/{title}",
            self._command(stage, arguments),
            kind=f"{self.name} {stage}",
            proof=f"{folder}/manifest.json",
            needs=(f"{self.name}/{needs}",),
        )


def split_rows(dataset: Dataset, folder: Path, share: float, seed: int) -> None:
    """Draw the cold items, and write `folder`/train.parquet, validation.parquet, test.parquet and cold.csv, unless they
    exist.

    Args:
        dataset: the whole log.
        folder: of the files.
        share: of the items that is cold.
        seed: of the draw.
    """
    record = folder / "rows.json"
    if record.exists():
        return
    items = dataset.manifest.items
    drawn = np.random.default_rng([seed, 1]).permutation(items)[: max(1, round(share * items))]
    is_cold = np.zeros(items, dtype=bool)
    is_cold[drawn] = True
    parts: dict[str, list[tuple[int, int, int]]] = {"train": [], "validation": [], "test": []}
    removed = np.zeros(items, np.int64)
    for part in dataset.manifest.sequences:
        with dataset.open_part(part) as parquet:
            table = parquet.read(columns=["user_id", "item_ids", "timestamps"]).to_pydict()
        for user, entries, times in zip(*table.values(), strict=True):
            of_user = np.array(entries, dtype=np.int64)
            cold = np.flatnonzero(is_cold[of_user])
            warm = np.flatnonzero(~is_cold[of_user])
            np.add.at(removed, of_user[cold], 1)
            rows = [(user, entries[place], times[place]) for place in warm]
            before = int((warm < cold[-1]).sum()) if cold.size else 0
            if before < SHORTEST:
                parts["train"] += rows
                continue
            place = int(cold[-1])
            parts["train"] += rows[: before - 1]
            parts["validation"].append(rows[before - 1])
            parts["test"].append((user, entries[place], times[place]))
            removed[of_user[place]] -= 1
    user_keys, item_keys = (
        keys_of(dataset, of_entity) for of_entity in (dataset.manifest.user_parts, dataset.manifest.item_parts)
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        columns = {
            "user_id": [user_keys[user] for user, _, _ in rows],
            "item_id": [item_keys[item] for _, item, _ in rows],
            "timestamp": [moment for _, _, moment in rows],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    (folder / "cold.csv").write_text("\n".join(["item_id", *(item_keys[item] for item in np.sort(drawn))]) + "\n")
    targets = np.array([item for _, item, _ in parts["test"]], dtype=np.int64)
    facts = {
        "cold": int(drawn.size),
        "rows": {name: len(rows) for name, rows in parts.items()},
        "chance": chance(drawn.size),
        "popularity_of_removed_rows": popularity_among(removed, drawn, targets),
    }
    record.write_text(json.dumps(facts))


def chance(items: int) -> dict[str, float]:
    """HR@10 and NDCG@10 of a random order of some items."""
    gains = 1 / np.log2(np.arange(min(items, 10)) + 2)
    return {"HR@10": min(10, items) / items, "NDCG@10": float(gains.sum()) / items}


def popularity_among(counts: Any, items: Any, targets: Any) -> dict[str, float]:
    """HR@10 and NDCG@10 of `targets` [users] among `items` [n] in the order of `counts` [all items]; the items of equal
    counts share their ranks."""
    own = counts[items]
    hits, gains = [], []
    reach = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(10) + 2))])
    for target in targets:
        better, equal = int((own > counts[target]).sum()), int((own == counts[target]).sum())
        first, stop = min(better, 10), min(better + equal, 10)
        hits.append((stop - first) / equal)
        gains.append((reach[stop] - reach[first]) / equal)
    return {"HR@10": float(np.mean(hits)), "NDCG@10": float(np.mean(gains))}


# --------------------------------------------------------------------------------------------------------- report


def write_report(options: Options, steps: RecordedSteps) -> None:
    """Write report.json and report.md of the seeds that are finished."""
    report = collect_report(options, steps)
    output = ROOT / options.output
    (output / "report.json").write_text(json.dumps(report, indent=1))
    (output / "report.md").write_text(markdown(report))


def collect_report(options: Options, steps: RecordedSteps) -> dict[str, Any]:
    """The contents of the report, as JSON values."""
    folder = ROOT / options.output / options.name
    figures: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    baselines: list[dict[str, Any]] = []
    seeds, facts = [], []
    for seed in options.drawn:
        place = folder / f"seed{seed}"
        tests = {arm: seed_tables.read_json(place / f"{arm}_test.json") for arm in ARMS}
        lists = {arm: seed_tables.read_json(place / f"{arm}_lists/manifest.json") for arm in ARMS}
        if not all([*tests.values(), *lists.values()]):
            continue
        seeds.append(seed)
        facts.append(json.loads((place / "rows/rows.json").read_text()))
        for arm in ARMS:
            among_all = tests[arm]["results"]["pretrain"]["masked"]
            figures[arm].append({ALL: {"masked": among_all}, COLD: {"masked": lists[arm]["measured"]["hits"]}})
        popularity = tests[CONTROL]["results"]["popularity"]["masked"]
        baselines.append({"popularity": popularity, **{name: facts[-1][name] for name in BASELINES[COLD]}})
    results = {arm: seed_tables.over_seeds(runs) for arm, runs in figures.items()}
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "name": options.name,
        "input": options.input,
        "seeds": seeds,
        "share": options.share,
        "versions": paper_report.versions(),
        "draws": facts,
        "results": results,
        "baselines": {
            name: {
                metric: seed_tables.mean_and_deviation([each[name][metric] for each in baselines]) for metric in METRICS
            }
            for among in BASELINES.values()
            for name in among
        },
        "differences": {
            among: {arm: differences(results, arm, among) for arm in ARMS if arm != CONTROL} for among in (ALL, COLD)
        },
        "steps": steps.records(),
    }


BASELINES = {
    ALL: {"popularity": "popularity in training (0 for every cold item)"},
    COLD: {
        "chance": "chance",
        "popularity_of_removed_rows": "popularity in the rows that were left out, unknown to the models",
    },
}
"""What the arms are compared with, by what is ranked among."""


def markdown(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    draws = report["draws"]
    lines = [
        f"# {report['input']}: items that were never trained",
        "",
        f"{report['share']:.0%} of the items are cold, drawn anew with each of {len(report['seeds'])} seeds: "
        + ", ".join(f"{draw['cold']:,} items and {draw['rows']['test']:,} users with a test item" for draw in draws[:1])
        + " with the first. ± is the sample standard deviation over seeds. Masked. Bold: best of its column.",
        "",
    ]
    for among in (ALL, COLD):
        rows: list[Row] = [
            (arm, [results[among]["masked"][metric] for metric in METRICS])
            for arm, results in report["results"].items()
        ]
        rows += [
            (title, [report["baselines"][name][metric] for metric in METRICS])
            for name, title in BASELINES[among].items()
        ]
        lines += [f"## Cold test items among {among}", "", *seed_tables.table("", METRICS, rows), ""]
        lines += [*difference_lines(report["differences"][among], CONTROL), ""]
    return "\n".join([*lines, *paper_report.origin(report)]) + "\n"


if __name__ == "__main__":
    main()
