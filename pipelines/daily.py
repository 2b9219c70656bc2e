"""Daily training: is a run that continues from the day before as good as one from scratch, and how much cheaper?

    python tools/synthetic_log.py --output runs/daily.csv --users 5000 --items 1000
    python pipelines/daily.py --input runs/daily.csv --output runs/daily --day 604800 --days 4

Cuts a log by time: the share --first of its rows is day 0, then follow --days days of --day units of time each; later
rows are left out. Each day the log so far is prepared with `--vocabulary` of the day before, and trained in several
ways:

    scratch     the control, on everything so far, with configs/NAME.yaml
    warm_new    continues from its run of the day before (`--initial`; on day 1 from scratch of day 0), on the new
                targets (`--targets new`), with configs/NAME_warm.yaml
    warm_all    the same, on all targets so far (`--targets all`)

All are measured on test: the newest interaction of every user so far, which no run was trained on. Writes
OUTPUT/report.md and report.json, updated after each day; the same command resumes an interrupted pipeline.

With `--deltas` each day also ends in vectors for a store: those of the first warm run, as a delta to the days before
(`export --since`), once per tolerance. The report says how much of them each delta sends, and whether the export of day
0 with all deltas applied is the export of the day.
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
from pipelines.daily_deltas import delta_lines, delta_of, read_delta  # noqa: E402
from pipelines.experiment import config_file, from_root  # noqa: E402
from pipelines.paper_report import METRICS  # noqa: E402
from pipelines.seed_tables import Row  # noqa: E402
from pipelines.steps import ROOT, RecordedSteps, pipeline  # noqa: E402
from recgpt_torchrec.config import Prepare  # noqa: E402
from recgpt_torchrec.errors import InputError  # noqa: E402
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine  # noqa: E402
from recgpt_torchrec.preparation.engines.engine import quote_sql  # noqa: E402
from recgpt_torchrec.preparation.reading.files import list_files  # noqa: E402
from recgpt_torchrec.preparation.reading.log import read_log  # noqa: E402

WARM, SCRATCH = "warm", "scratch"
TARGETS = ["new", "all"]


@dataclass(kw_only=True)
class Options(experiment.Options):
    """Options of this pipeline."""

    input: str
    """The log."""
    name: str
    """configs/NAME.yaml and configs/NAME_warm.yaml are the configurations."""
    days: int
    """Days after day 0."""
    day: float
    """Length of a day, in units of the log's times."""
    first: float
    """Share of the log's rows that is day 0."""
    time_column: str
    min_count: int
    targets: list[str]
    """`--targets` of the stage pretrain, of each warm run."""
    deltas: list[float]
    """Tolerances of the deltas; empty: nothing is exported."""

    def runs(self, day: int) -> list[str]:
        """Names of the runs of a day, the control first."""
        return [SCRATCH, *(f"{WARM}_{targets}" for targets in self.targets if day)]

    def planned(self) -> list[str]:
        """The kind of every step, see `RecordedSteps`."""
        a_day = [SCRATCH, "test", *len(self.targets) * [WARM, "test"]]
        first = ["export"] if self.deltas else []
        exports = [*first, *len(self.deltas) * ["export", "apply"]]
        return [f"{self.name} {kind}" for kind in (self.days + 1) * ["prepare"]] + [
            f"{self.name} {kind}"
            for kind in [*self.seeds * ([SCRATCH, "test"] + self.days * a_day), *first, *self.days * exports]
        ]


def main(arguments: list[str] | None = None) -> None:
    """Run every unfinished step, and write the report."""
    options = parse(arguments)
    with pipeline("daily", options.output, options.planned()) as steps:
        Daily(options, steps).run()


def parse(arguments: list[str] | None = None) -> Options:
    """Parse the command line; paths become relative to the project, where commands run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="the log: csv, tsv or parquet; dates become seconds")
    parser.add_argument("--output", default="runs/daily", help="output folder (default: runs/daily)")
    parser.add_argument(
        "--name", default="daily", help="name of the configurations NAME.yaml, NAME_warm.yaml (default: daily)"
    )
    parser.add_argument("--days", type=int, default=3, help="days after day 0 (default: 3)")
    parser.add_argument("--day", type=float, default=86400, help="length of a day in the log's times (default: 86400)")
    parser.add_argument("--first", type=float, default=0.5, help="share of the rows that is day 0 (default: 0.5)")
    parser.add_argument("--time_column", default="timestamp", help="as in the stage prepare (default: timestamp)")
    parser.add_argument("--min_count", type=int, default=5, help="as in the stage prepare (default: 5)")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=TARGETS, help="targets of warm runs (default: both)"
    )
    parser.add_argument(
        "--deltas",
        nargs="*",
        type=float,
        metavar="TOLERANCE",
        help="also export each day as a delta, once per tolerance (--deltas alone: 0)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to SEEDS - 1 (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each stage (default: 1)")
    parser.add_argument("--configs", default="configs", help="folder of the configurations (default: configs)")
    parser.add_argument("--hold_out", default="last", help="as in the stage prepare; only last fits (default: last)")
    given = parser.parse_args(arguments)
    if given.hold_out != "last":
        parser.error(
            f"--hold_out is {given.hold_out}, but every day is measured on the newest interaction of each user so far: "
            "leave it out, or run the stages by hand"
        )
    if min(given.seeds, given.ranks, given.days, given.min_count) < 1 or given.day <= 0:
        parser.error("--seeds, --ranks, --days and --min_count must be at least 1, --day more than 0")
    if not 0 < given.first < 1:
        parser.error(f"--first is {given.first}; it is a share, between 0 and 1")
    if given.deltas == []:
        given.deltas = [0.0]
    if given.deltas and min(given.deltas) < 0:
        parser.error(f"--deltas is {min(given.deltas)}; a tolerance is at least 0")
    if not given.input.endswith((".csv", ".tsv", ".parquet")) or not os.path.exists(given.input):
        parser.error(f"--input {given.input} must be a file that ends in .csv, .tsv or .parquet")
    return Options(
        input=from_root(given.input),
        output=from_root(given.output),
        seeds=given.seeds,
        ranks=given.ranks,
        configs=from_root(given.configs),
        name=given.name,
        days=given.days,
        day=given.day,
        first=given.first,
        time_column=given.time_column,
        min_count=given.min_count,
        targets=sorted(set(given.targets), key=TARGETS.index),
        deltas=sorted(set(given.deltas or [])),
    )


class Daily(experiment.Experiment):
    """Every day of one log. Example: `Daily(options, steps).run()`."""

    options: Options

    def __init__(self, options: Options, steps: RecordedSteps) -> None:
        super().__init__(options.name, options, steps)
        self.warm_config = config_file(options.configs, self.name, "_warm")

    def run(self) -> None:
        """Run day by day, each with every seed; updates the report after each day."""
        log = f"{self.folder}/log"
        cut_log(ROOT / self.options.input, ROOT / log, self.options)
        for day in range(self.options.days + 1):
            files = [f"{log}/day{number}.parquet" for number in range(day + 1)]
            arguments = [*files, "--time_column", self.options.time_column, "--min_count", str(self.options.min_count)]
            extended = ["--vocabulary", self.data_of(day - 1)] if day else []
            needs = (f"day{day - 1}/prepare",) if day else ()
            self._prepare(f"day{day}/prepare", [*arguments, *extended], self.data_of(day), needs)
            for seed in range(self.options.seeds):
                self._run_day(seed, day)
            if self.options.deltas:
                self._export_day(day)
            write_report(self.options, self.steps)

    def _run_day(self, seed: int, day: int) -> None:
        data, prepared = self.data_of(day), f"day{day}/prepare"
        folder = f"seed{seed}/day{day}"
        self._train(f"{folder}/{SCRATCH}", SCRATCH, "pretrain", self.config, data, (prepared,), seed)
        self._test(seed, f"day{day}/{SCRATCH}", data, baselines=seed == 0)  # baselines have no seed
        for run in self.options.runs(day)[1:]:
            before = f"seed{seed}/day{day - 1}/{run if day > 1 else SCRATCH}"
            more = ["--initial", f"{self.folder}/{before}", "--targets", run.removeprefix(f"{WARM}_")]
            needs = (prepared, before)
            self._train(f"{folder}/{run}", WARM, "pretrain", self.warm_config, data, needs, seed, more)
            self._test(seed, f"day{day}/{run}", data)

    def _export_day(self, day: int) -> None:
        """Export the first warm run of seed 0: whole, and from day 1 on as deltas, which are applied again."""
        run = f"seed0/day{day}/{self.options.runs(day)[-1 if not day else 1]}"
        source = ["--data", self.data_of(day), "--checkpoint", f"{self.folder}/{run}"]
        self._export(f"exports/day{day}", source, (run,))
        for tolerance in self.options.deltas if day else []:
            before = ["exports/day0", *(delta_of(tolerance, earlier) for earlier in range(1, day))]
            since = [f"{self.folder}/{each}" for each in before]
            title = delta_of(tolerance, day)
            more = ["--since", *since, *(["--tolerance", f"{tolerance:g}"] if tolerance else [])]
            self._export(title, [*source, *more], (run, *before))
            applied = f"{self.folder}/{title}_applied"
            deltas = [*since[1:], f"{self.folder}/{title}"]
            self.steps.run(
                f"{self.name}/{title}_applied",
                [
                    "python",
                    "-m",
                    "recgpt_torchrec.apply",
                    "--export",
                    since[0],
                    "--deltas",
                    *deltas,
                    "--output",
                    applied,
                ],
                kind=f"{self.name} apply",
                proof=f"{applied}/manifest.json",
                needs=tuple(f"{self.name}/{each}" for each in (*before, title)),
            )

    def _export(self, title: str, arguments: list[str], needs: tuple[str, ...]) -> None:
        output = f"{self.folder}/{title}"
        self.steps.run(
            f"{self.name}/{title}",
            self._command("export", [*arguments, "--output", output]),
            kind=f"{self.name} export",
            proof=f"{output}/manifest.json",
            needs=tuple(f"{self.name}/{need}" for need in needs),
        )

    def data_of(self, day: int) -> str:
        """Dataset folder of a day: the log up to the end of the day."""
        return f"{self.folder}/day{day}/data"


def cut_log(log: Path, folder: Path, options: Options) -> None:
    """Write `folder`/day0.parquet, day1.parquet, ...: the rows of each day, in their order, unless they exist.

    The log is read as the stage `prepare` reads it.

    Ends the pipeline with status 2 where they were cut from another log or with other options.
    """
    settings = {name: getattr(options, name) for name in ("days", "day", "first", "time_column")}
    sources = {"log": str(log), "bytes": log.stat().st_size, **settings}
    record = folder / "log.json"
    if record.exists():
        if json.loads(record.read_text()) != sources:
            print(
                f"daily: {folder} was cut from another log or with other options; choose another --output",
                file=sys.stderr,
            )
            raise SystemExit(2)
        return
    folder.mkdir(parents=True, exist_ok=True)
    time_column = '"' + options.time_column.replace('"', '""') + '"'
    try:
        config = Prepare(input=[str(log)], output=str(folder), time_column=options.time_column)
        with DuckDBEngine(str(folder)) as engine:
            events = read_log(engine, config, list_files(config.input, config)).events
            time = f"time + {'fraction' if engine.row(events.agg(any=(events.fraction > 0).any()))['any'] else 0}"
            rows = f'SELECT user, item, {time} AS time, "order" FROM ({engine.sql(events)})'
            run = engine.connection.execute
            ((begin,),) = run(f"SELECT quantile_disc(time, {options.first}) FROM ({rows})").fetchall()
            edges = [float("-inf"), *(float(begin) + day * options.day for day in range(options.days + 1))]
            for day in range(options.days + 1):
                low = f"time >= {edges[day]!r} AND " if day else ""
                of_day = f"FROM ({rows}) WHERE {low}time < {edges[day + 1]!r}"
                ((count,),) = run(f"SELECT count(*) {of_day}").fetchall()
                if not count:
                    raise InputError(f"day {day} has no rows; give a longer --day, or fewer --days")
                columns = f"SELECT user AS user_id, item AS item_id, time AS {time_column}"
                file = quote_sql(str(folder / f"day{day}.parquet"))
                run(f'COPY ({columns} {of_day} ORDER BY "order") TO {file} (FORMAT parquet)')
    except InputError as error:
        print(f"daily: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    record.write_text(json.dumps(sources))


# --------------------------------------------------------------------------------------------------------- report


def write_report(options: Options, steps: RecordedSteps) -> None:
    """Write report.json and report.md of the days that are finished."""
    report = collect_report(options, steps)
    (ROOT / options.output / "report.json").write_text(json.dumps(report, indent=1))
    (ROOT / options.output / "report.md").write_text(markdown(report))


def collect_report(options: Options, steps: RecordedSteps) -> dict[str, Any]:
    """The contents of the report, as JSON values."""
    folder, records = ROOT / options.output / options.name, steps.records()
    days = []
    for day in range(options.days + 1):
        manifest = seed_tables.read_json(folder / f"day{day}/data/manifest.json")
        runs: dict[str, Any] = {}
        for run in options.runs(day):
            places = [f"seed{seed}/day{day}/{run}" for seed in range(options.seeds)]
            tests = [seed_tables.read_json(folder / f"{place}_test.json") for place in places]
            if not all(tests):
                continue
            training = [paper_report.read_training(folder / place) for place in places]
            for place, each in zip(places, training, strict=True):
                each["seconds"] = records[f"{options.name}/{place}"]["seconds"]
            runs[run] = {
                "users": tests[0]["users"],
                "test": seed_tables.over_seeds([test["results"] for test in tests])["pretrain"],
                "baselines": {path: tests[0]["results"].get(path) for path in paper_report.BASELINES},
                "training": training,
            }
        if len(runs) == len(options.runs(day)):
            counts = {name: manifest[name] for name in ("users", "items", "interactions")}
            deltas = [read_delta(folder, tolerance, day) for tolerance in options.deltas if day]
            days.append(
                {
                    "day": day,
                    **counts,
                    "extends": manifest["preparation"].get("extends"),
                    "runs": runs,
                    "deltas": [delta for delta in deltas if delta],
                }
            )
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "name": options.name,
        "seeds": options.seeds,
        "ranks": options.ranks,
        "day": options.day,
        "versions": paper_report.versions(),
        "days": days,
        "steps": records,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"# {report['name']}: continuing from the day before, and training from scratch",
        "",
        f"A day is {report['day']:,g} units of the log's time. Seeds: {report['seeds']}; ± is the sample standard "
        f"deviation over them. Ranks of each run: {report['ranks']}. Leave-one-out over all users so far, ranked "
        "over the whole catalogue, masked. Bold: best of its column.",
        "",
        "| day | users (new) | items (new) | interactions | new targets |",
        "|---|---|---|---|---|",
    ]
    for day in report["days"]:
        extends = day["extends"] or {"users": 0, "items": 0, "new_targets": None}
        new = [f"{day[name]:,} ({day[name] - extends[name]:,})" for name in ("users", "items")]
        targets = "all" if extends["new_targets"] is None else f"{extends['new_targets']:,}"
        lines.append(f"| {day['day']} | {' | '.join(new)} | {day['interactions']:,} | {targets} |")
    for day in report["days"]:
        rows: list[Row] = []
        for run, results in day["runs"].items():
            rows.append((run, [results["test"]["masked"][metric] for metric in METRICS]))
        for path, title in paper_report.BASELINES.items():
            if figures := day["runs"][SCRATCH]["baselines"][path]:
                rows.append((title, [{"mean": figures["masked"][metric], "sd": None} for metric in METRICS]))
        lines += ["", f"## Day {day['day']}, test", "", *seed_tables.table("", METRICS, rows)]
    if any(day["deltas"] for day in report["days"]):
        lines += delta_lines(report["days"])
    lines += [
        "",
        "## Training",
        "",
        "Means over seeds. Seconds are those of the whole command, and of training alone.",
        "",
    ]
    lines += ["| day | run | optimizer steps | best epoch | seconds | training alone |", "|---|---|---|---|---|---|"]
    total: dict[str, float] = {}
    for day in report["days"]:
        for run, results in day["runs"].items():
            names = ("steps", "best_epoch", "seconds", "train_s")
            means = [seed_tables.mean_and_deviation([t[name] for t in results["training"]])["mean"] for name in names]
            lines.append(f"| {day['day']} | {run} | " + " | ".join(f"{mean:,.0f}" for mean in means) + " |")
            if day["day"]:
                total[run] = total.get(run, 0.0) + means[2]
    if total:
        sums = ", ".join(f"{run} {seconds:,.0f} s" for run, seconds in total.items())
        lines += ["", f"After day 0, all days together: {sums}."]
    return "\n".join([*lines, "", *paper_report.origin(report)]) + "\n"


if __name__ == "__main__":
    main()
