"""Makes the values of a report from its options: runs, their evaluations, comparisons, examples."""

from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.config.reports.report import Report
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.comparing.finding import find_evaluations, is_of_run, read_evaluation_json
from recgpt_torchrec.reports.comparing import Evaluations, compare_runs
from recgpt_torchrec.reports.evaluations import read_evaluation
from recgpt_torchrec.reports.examples import Labels, ids_of, make_examples, open_for_labels, read_names
from recgpt_torchrec.reports.runs import names_of, read_run, run_folder
from recgpt_torchrec.reports.values import EvaluationValues, ReportValues


def make_values(config: Report) -> ReportValues:
    """Read everything that a report shows.

    Raises:
        InputError: a folder is no run, or a file is damaged.
    """
    for run in config.runs:
        run_folder(run)
    names = names_of(config.runs)
    found = evaluations_by_run(config)
    labels = read_labels(config, [values for each in found for values in each.values()])
    runs = [
        read_run(run, name, [_values_of(file, values, labels) for file, values in each.items()])
        for run, name, each in zip(config.runs, names, found, strict=True)
    ]
    notes = [
        f"{run.name} is {run.state}. What is shown of it is what there is so far." for run in runs if not run.finished
    ]
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    if len({values["vocabulary"] for each in found for values in each.values() if "vocabulary" in values}) > 1:
        notes.append("These runs are on different datasets: their figures are of other users and items.")
    return ReportValues(runs=runs, comparisons=compare_runs(names, found), notes=notes)


def evaluations_by_run(config: Report) -> list[Evaluations]:
    """The evaluations of each run, by file: those given, or those in its folder and beside it.

    Raises:
        InputError: one that is given is none, or is of no run of the report.
    """
    if not config.evaluations:
        return [find_evaluations(run) for run in config.runs]
    found: list[Evaluations] = [{} for _ in config.runs]
    for file in config.evaluations:
        values = read_evaluation_json(file)
        if values is None:
            what = "is not an evaluation" if storage.exists(file) else "does not exist"
            raise InputError(f"--evaluations {file} {what}; give JSON files that evaluate wrote")
        owners = [place for place, run in enumerate(config.runs) if is_of_run(values["checkpoint"], run)]
        if not owners:
            raise InputError(
                f"--evaluations {file} is of {values['checkpoint']}, which is in none of the runs; name its run as well"
            )
        found[owners[0]][file] = values
    return found


def read_labels(config: Report, evaluations: list[dict[str, Any]]) -> dict[str, Labels]:
    """Keys and names for the examples of evaluations, by the vocabulary of each.

    Raises:
        InputError: the table of names cannot be read.
    """
    labels: dict[str, Labels] = {}
    for values in evaluations:
        vocabulary = str(values.get("vocabulary"))
        if vocabulary in labels:
            continue
        items, users = ids_of(each for each in evaluations if str(each.get("vocabulary")) == vocabulary)
        of = next(
            (
                dataset
                for path in ([config.data] if config.data else [str(each["dataset"]) for each in evaluations])
                if (dataset := open_for_labels(path, values.get("vocabulary"))) is not None
            ),
            None,
        )
        labels[vocabulary] = Labels.read(of, items, users)
    if config.names is not None:
        keys = {key for each in labels.values() for key in each.items.values()}
        by_key = read_names(config, config.names, keys)
        labels = {vocabulary: each.rename(by_key) for vocabulary, each in labels.items()}
    return labels


def _values_of(file: str, values: dict[str, Any], labels: dict[str, Labels]) -> EvaluationValues:
    made = read_evaluation(file, values)
    made.examples = make_examples(values.get("examples", []), labels[str(values.get("vocabulary"))])
    return made
