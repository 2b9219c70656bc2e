"""Do attributes, time and events help? One log, with and without each of them, over seeds.

    python tools/structured_log.py --structure attributes --output runs/attributes
    python pipelines/inputs.py --input runs/attributes/log.parquet --items runs/attributes/items.parquet \\
        --item_attributes category brand tags --users runs/attributes/users.parquet --user_attributes country age \\
        --event_column event --asked view buy --truth runs/attributes/truth.json --output runs/inputs/attributes

Writes OUTPUT/report.md and report.json, updated after each seed; the same command resumes an interrupted pipeline. The
log is prepared once, with everything. Per seed, each arm is pre-trained on it with the same configuration, and reads:

    ids           ids alone, the control
    attributes    also the attributes of items and users; item_attributes, user_attributes: those of one of them
    time          also the time since the interaction before, and time, hour and weekday of the request
    events        also the type of each event, and the type that is asked for
    all           everything

The best epoch is chosen on validation. An arm's difference to the control is that of runs with the same seed. With
--asked every arm is measured once more on the users whose held-out item is of each of these event types, and arms that
read events are asked for it.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines import experiment, paper_report, seed_tables  # noqa: E402
from pipelines.experiment import from_root  # noqa: E402
from pipelines.input_tables import Tables, add_table_options, read_tables  # noqa: E402
from pipelines.seed_tables import Row  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.evaluation.groups import BY_LENGTH, BY_POPULARITY  # noqa: E402

CONTROL = "ids"
METRICS = ("HR@10", "NDCG@10")
NO_ATTRIBUTES, NO_EVENTS = ["--attributes.use", "[]"], ["--events.input", "false", "--events.ask", "false"]
TIME = ["--time.use", "past_gap", "next_gap", "hour", "weekday"]
ASKING = ("events", "all")
"""Arms that can be asked for an event type."""
GROUPS = {BY_POPULARITY: "training interactions of the held-out item", BY_LENGTH: "items in the history"}


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    input: str
    """The log."""
    name: str
    """configs/NAME.yaml is the configuration."""
    tables: Tables
    time: bool
    """Whether there is an arm that reads times."""
    asked: list[str]
    """Event types to ask for."""
    chosen: list[str]
    """Arms beside the control; empty: all."""
    min_count: int
    truth: str | None
    """truth.json of `tools/structured_log.py`."""

    @property
    def arms(self) -> dict[str, list[str]]:
        """The chosen arms, the control first, and their options of pretrain."""
        tables = self.tables
        both = tables.attributes_of()
        without_attributes = NO_ATTRIBUTES if both else []
        without_events = NO_EVENTS if tables.event_column else []
        arms = {CONTROL: [*without_attributes, *without_events]}
        if both:
            arms["attributes"] = without_events
        if tables.items and tables.users:
            for name in ("item", "user"):
                one = tables.attributes_of(items=name == "item", users=name == "user")
                arms[f"{name}_attributes"] = ["--attributes.use", *one, *without_events]
        if self.time:
            arms["time"] = [*without_attributes, *TIME, *without_events]
        if tables.event_column:
            arms["events"] = without_attributes
        if bool(both) + self.time + bool(tables.event_column) > 1:
            arms["all"] = TIME if self.time else []
        return {arm: reads for arm, reads in arms.items() if not self.chosen or arm in (CONTROL, *self.chosen)}

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        of_arm = ["train", *(1 + len(self.asked)) * ["test"]]
        return [f"{self.name} {kind}" for kind in ["prepare", *self.seeds * len(self.arms) * of_arm]]


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("inputs", options.output, options.planned()) as steps:
        Comparison(options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="the log, in any format of prepare")
    parser.add_argument("--output", default="runs/inputs", help="output folder (default: runs/inputs)")
    parser.add_argument("--name", default="inputs", help="name of the configuration NAME.yaml (default: inputs)")
    add_table_options(parser)
    parser.add_argument("--event_column", help="as in the stage prepare")
    parser.add_argument("--asked", nargs="+", default=[], metavar="TYPE", help="event types to ask for, such as buy")
    parser.add_argument("--no_time", action="store_true", help="no arm that reads times")
    parser.add_argument("--arms", nargs="+", default=[], help=f"arms beside {CONTROL} (default: all that there are)")
    parser.add_argument("--min_count", type=int, default=1, help="as in the stage prepare (default: 1)")
    parser.add_argument("--truth", help="truth.json of tools/structured_log.py, for the report")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1 (default: 5)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each stage (default: 1)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    given = parser.parse_args(arguments)
    tables = read_tables(parser, given, given.event_column)
    if given.truth and not os.path.exists(given.truth):
        parser.error(f"there is no {given.truth}")
    if given.asked and not given.event_column:
        parser.error("--asked needs the --event_column")
    if min(given.seeds, given.ranks, given.min_count) < 1:
        parser.error("--seeds, --ranks and --min_count must be at least 1")
    options = Options(
        input=from_root(given.input),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        name=given.name,
        tables=tables,
        time=not given.no_time,
        asked=sorted(set(given.asked)),
        chosen=[],
        min_count=given.min_count,
        truth=given.truth and from_root(given.truth),
    )
    if unknown := [arm for arm in given.arms if arm not in options.arms]:
        parser.error(
            f"--arms {unknown[0]} is none of {', '.join(options.arms)}, for which there are tables and columns"
        )
    options.chosen = given.arms
    if len(options.arms) < 2:
        parser.error("there is nothing to compare: give tables, an event column, or leave --no_time out")
    return options


class Comparison(experiment.Experiment):
    """All arms on one log. Example: `Comparison(options, steps).run()`."""

    options: Options

    def __init__(self, options: Options, steps: RecordedSteps) -> None:
        super().__init__(options.name, options, steps)

    def run(self) -> None:
        """Prepare the log, then run seed by seed; updates the report after each seed."""
        options = self.options
        arguments = [options.input, "--min_count", str(options.min_count), *options.tables.arguments()]
        self._prepare("prepare", arguments, self.data)
        for seed in range(options.seeds):
            for arm, reads in options.arms.items():
                self._train(f"seed{seed}/{arm}", "train", "pretrain", self.config, self.data, ("prepare",), seed, reads)
                self._test(seed, arm, self.data, baselines=seed == 0 and arm == CONTROL)  # baselines have no seed
                for event in options.asked:
                    self._test_event(seed, arm, event)
            write_report(options, self.steps)

    def _test_event(self, seed: int, arm: str, event: str) -> None:
        """Measure a run on the users whose test item is of an event type."""
        run = f"seed{seed}/{arm}"
        title = f"{run}_test_{event}"
        arguments = ["--data", self.data, "--checkpoint", f"{self.folder}/{run}", "--event", event]
        arguments += ["--ask", str(arm in ASKING).lower(), "--baselines", "false"]
        self.steps.run(
            f"{self.name}/{title}",
            self._command("evaluate", [*arguments, "--output", f"{self.folder}/{title}.json"]),
            kind=f"{self.name} test",
            proof=f"{self.folder}/{title}.json",
            needs=(f"{self.name}/{run}",),
            repeatable=True,
        )


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
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    seeds = []
    for seed in range(options.seeds):
        evaluations = {arm: seed_tables.read_json(folder / f"seed{seed}/{arm}_test.json") for arm in options.arms}
        if all(evaluations.values()):
            seeds.append(seed)
            for arm, evaluation in evaluations.items():
                by_event = [
                    seed_tables.read_json(folder / f"seed{seed}/{arm}_test_{event}.json") for event in options.asked
                ]
                measured[arm].append(read_arm(evaluation, folder / f"seed{seed}/{arm}", by_event))
    results = {arm: seed_tables.over_seeds([each["results"] for each in runs]) for arm, runs in measured.items()}
    manifest = json.loads((folder / "data/manifest.json").read_text())
    baselines = json.loads((folder / f"seed0/{CONTROL}_test.json").read_text())["results"]
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "name": options.name,
        "input": options.input,
        "seeds": seeds,
        "versions": paper_report.versions(),
        **{what: manifest[what] for what in ("users", "items", "interactions")},
        "attributes": manifest.get("attributes", []),
        "truth": seed_tables.read_json(ROOT / options.truth) if options.truth else None,
        "results": results,
        "asked": options.asked,
        "baselines": {path: baselines[path] for path in paper_report.BASELINES if path in baselines},
        "differences": {
            split: {arm: differences(results, arm, split) for arm in results if arm != CONTROL}
            for split in next(iter(results.values()))
        },
        "groups": {name: groups_over_seeds(measured, name) for name in GROUPS},
        "training": {arm: [each["training"] for each in runs] for arm, runs in measured.items()},
        "steps": steps.records(),
    }


ASKED = "test, asked for the event type"


def read_arm(evaluation: dict[str, Any], run: Path, by_event: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of one run: on test, and on validation in its best epoch (masked); by groups; and its training.

    Args:
        evaluation: on all users.
        run: folder of the run.
        by_event: evaluations on the users of each event type that is asked for.
    """
    training = paper_report.read_training(run)
    lines = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    of_epoch = [line for line in lines if line["epoch"] == training["best_epoch"] and "NDCG@10" in line]
    best = max(of_epoch, key=lambda line: line["NDCG@10"])  # an epoch may have validations within it
    return {
        "results": {
            "validation": {"masked": {metric: best[metric] for metric in METRICS}},
            "test": evaluation["results"]["pretrain"],
            **({ASKED: {"masked": mean_over_users(by_event)}} if by_event else {}),
        },
        "groups": evaluation["groups"]["pretrain"]["masked"],
        "training": training,
    }


def mean_over_users(evaluations: list[dict[str, Any]]) -> dict[str, float]:
    """The masked figures of several evaluations together, each user counted once."""
    users = [each["users"] for each in evaluations]
    figures = [each["results"]["pretrain"]["masked"] for each in evaluations]
    return {
        metric: sum(count * each[metric] for count, each in zip(users, figures, strict=True)) / max(sum(users), 1)
        for metric in METRICS
    }


def differences(results: dict[str, Any], arm: str, split: str, control: str = CONTROL) -> dict[str, Any]:
    """Masked figures of an arm minus those of the control, seed by seed."""
    figures = {}
    for metric in METRICS:
        values, others = (results[name][split]["masked"][metric]["values"] for name in (arm, control))
        figures[metric] = seed_tables.mean_and_deviation([a - b for a, b in zip(values, others, strict=True)])
    return figures


def groups_over_seeds(measured: dict[str, list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """Per group, its bounds and users, and the masked test figures of each arm over seeds."""
    lines = []
    runs = next(iter(measured.values()))
    for number, line in enumerate(runs[0]["groups"][name] if runs else []):
        if not line["users"]:
            continue
        arms = {}
        for arm, each in measured.items():
            own = [run["groups"][name][number] for run in each]
            arms[arm] = {metric: seed_tables.mean_and_deviation([one[metric] for one in own]) for metric in METRICS}
        lines.append({"from": line["from"], "to": line["to"], "users": line["users"], "arms": arms})
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"# {report['input']}: what attributes, time and events add to ids",
        "",
        f"{report['users']:,} users, {report['items']:,} items, {report['interactions']:,} interactions. "
        f"{len(report['seeds'])} seeds; ± is the sample standard deviation over them. Leave-one-out, ranked over the "
        "whole catalogue, masked. Bold: best of its column.",
        "",
    ]
    for split in next(iter(report["results"].values())):
        rows: list[Row] = [
            (arm, [figures[split]["masked"][metric] for metric in METRICS])
            for arm, figures in report["results"].items()
        ]
        lines += [f"## {split.capitalize()}", ""]
        if split == ASKED:
            lines += [f"The users of each event type: {', '.join(report['asked'])}; together.", ""]
        lines += [*seed_tables.table("", METRICS, rows)]
        if split != "validation":
            extra: dict[str, dict[str, float]] = {
                paper_report.BASELINES[path]: figures["masked"]
                for path, figures in report["baselines"].items()
                if split == "test"
            }
            truth = report["truth"] or {}
            names = {"best": "best possible", "best_without_request": "best possible, time and event not told"}
            extra |= {title: truth[name] for name, title in names.items() if name in truth}
            for title, figures in extra.items():
                lines.append(f"| {title} | " + " | ".join(f"{figures[metric]:.4f}" for metric in METRICS) + " |")
        lines += ["", *difference_lines(report["differences"][split], CONTROL), ""]
    for name, title in GROUPS.items():
        lines += [f"## Test, HR@10 by {title}", "", *group_lines(report["groups"][name], list(report["results"])), ""]
    lines += ["## Training", "", "One figure per seed.", ""]
    lines += ["| arm | optimizer steps | best epoch | minutes |", "|---|---|---|---|"]
    for arm, trainings in report["training"].items():
        columns = [", ".join(str(each[what]) for each in trainings) for what in ("steps", "best_epoch")]
        minutes = ", ".join(f"{each['train_s'] / 60:.1f}" for each in trainings)
        lines.append(f"| {arm} | " + " | ".join([*columns, minutes]) + " |")
    return "\n".join([*lines, "", *paper_report.origin(report)]) + "\n"


def difference_lines(of_arms: dict[str, dict[str, Any]], control: str) -> list[str]:
    """A table of each arm's differences to the control, seed by seed."""
    lines = [f"Minus `{control}`, seed by seed:", ""]
    lines += ["| | " + " | ".join(f"{metric} | seeds above 0" for metric in METRICS) + " |", "|---|---|---|---|---|"]
    for arm, figures in of_arms.items():
        cells = []
        for metric in METRICS:
            values = figures[metric]["values"]
            cells += [seed_tables.cell(figures[metric], sign="+"), f"{sum(v > 0 for v in values)} of {len(values)}"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def group_lines(groups: list[dict[str, Any]], arms: list[str]) -> list[str]:
    """A table of HR@10 by group and arm."""
    lines = ["| | users | " + " | ".join(arms) + " |", "|---|---|" + "---|" * len(arms)]
    for group in groups:
        low, high = group["from"], group["to"]
        bounds = "never trained" if high == 0 else f"{low:,} or more" if high is None else f"{low:,} to {high:,}"
        cells = (seed_tables.cell(group["arms"][arm]["HR@10"]) for arm in arms)
        lines.append(f"| {bounds} | {group['users']:,} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
