"""An evaluation as the stage gives it: where it may be written, what it is compared with, and its text."""

import os
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.repeat_bias import NAME, describe_bias
from recgpt_torchrec.config import Evaluate
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.reading.targets import describe_untargeted
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.comparing.comparison import (
    Difference,
    Evaluation,
    against_baselines,
    check_comparable,
    compare,
    comparison_text,
    differing_neighbours,
)
from recgpt_torchrec.evaluation.comparing.finding import find_evaluation
from recgpt_torchrec.evaluation.groups import group_table
from recgpt_torchrec.evaluation.per_user.files import UserResults
from recgpt_torchrec.storage.finished import check_same, differences
from recgpt_torchrec.texts.commands import next_line
from recgpt_torchrec.texts.tables import figures_table
from recgpt_torchrec.texts.words import count


def check_output(config: Evaluate) -> None:
    """Check that the output file can be written, and that an existing one may be replaced.

    Raises:
        InputError: its folder does not exist or is not writable; or the file holds something else than an evaluation of
            this dataset and split, and `--overwrite` is not given.
    """
    if not storage.remote(config.output):  # an object store has no folders
        folder = os.path.dirname(os.path.abspath(config.output))
        if not os.path.isdir(folder):
            raise InputError(f"--output {config.output}: the folder {folder} does not exist; make it first")
        if not os.access(folder, os.W_OK):
            raise InputError(f"--output {config.output}: the folder {folder} is not writable; choose another one")
    if storage.is_folder(config.output):
        raise InputError(f"--output {config.output} is a folder; name a file, such as {config.output}/test.json")
    if config.overwrite or not storage.exists(config.output):
        return
    remedy = "choose another --output, or give --overwrite true"
    wanted = {"dataset": config.data, "split": config.split}
    try:
        earlier = storage.read_json(config.output) or {}
    except InputError:
        earlier = {}
    if not wanted.keys() <= earlier.keys():
        raise InputError(f"--output {config.output} holds something else; {remedy}")
    found = {name: earlier.get(name) for name in (*wanted, "event")}
    differing = differences(found, {**wanted, "event": config.event})
    check_same(f"--output {config.output}", "evaluation", differing, remedy)


def open_other(config: Evaluate, identity: dict[str, Any]) -> Evaluation | None:
    """The evaluation to compare with; None: none is asked for.

    Raises:
        InputError: there is none, or it has other users or held-out items.
    """
    if config.compare is None:
        return None
    path = find_evaluation(config.compare, config.split)
    if os.path.realpath(path) == os.path.realpath(config.output):
        raise InputError(f"--compare {config.compare} is the evaluation that --output replaces; name another one")
    other = Evaluation.open(path)
    check_comparable(identity, other.values, (config.data, path))
    return other


def find_ahead(config: Evaluate, evaluation: dict[str, Any], path: str) -> list[Difference]:
    """By how much a path is ahead of each baseline; empty without results by user."""
    results = UserResults.of(config.output, evaluation)
    return [] if results is None else against_baselines(results, path, evaluation)


def compare_text(config: Evaluate, evaluation: dict[str, Any], other: Evaluation) -> str:
    """The differences between this evaluation and another one, as text.

    Raises:
        InputError: shared users have other held-out items or histories.
    """
    results = UserResults.of(config.output, evaluation)
    assert results is not None
    text = comparison_text(compare(Evaluation(config.output, evaluation, results), other), other.path)
    note = differing_neighbours(evaluation, other.values)
    return text if note is None else f"{text}{note}\n"


def describe(
    config: Evaluate, evaluation: dict[str, Any], path: str, dataset: Dataset, inputs: Inputs, ahead: list[Difference]
) -> list[str]:
    """The summary of an evaluation: figures, whom they are of, and how the model compares with the baselines.

    Args:
        config: options of the stage.
        evaluation: as it is written.
        path: name of the recall path that users are shown by group.
        dataset: that was measured.
        inputs: what the model reads.
        ahead: by how much it is ahead of each baseline.
    """
    users, whole = evaluation["users"], dataset.manifest.users
    lines = [table(evaluation["results"], evaluation[NAME]), group_table(path, evaluation["groups"][path]["masked"])]
    if "sample" in evaluation:
        of = "" if evaluation["of_users"] is None else f" of {evaluation['of_users']:,}"
        lines.append(f"evaluation on {users:,}{of} users with a {config.split} item (sample)")
    else:
        of_type = "" if config.event is None else f" of the event type {config.event}"
        have = "has" if whole == 1 else "have"
        lines.append(f"{users:,} of {count(whole, 'user')} {have} a {config.split} item{of_type}")
    if told := evaluation.get("request_time"):
        lines.append(
            f"The model is told the time of each request ({', '.join(told)}), that of the held-out item: as at "
            "serving, but unlike results published for models without times."
        )
    if "m" in (chosen := evaluation["recall"]):
        lines.append(
            f"Two steps take m = {chosen['m']} items from the first interest and n = {chosen['n']} from the second "
            f"({chosen['because']})."
        )
    return [
        *lines,
        *(each.sentence() for each in ahead),
        *describe_untargeted(dataset.manifest, bool(inputs.of_entity("item"))),
    ]


def table(results: dict[str, Any], repeat_bias: float) -> str:
    """The results as text: one line per recall path, masked and unmasked."""
    lines = []
    every = "every item is ranked" + (f"; repeat {describe_bias(repeat_bias)}" if repeat_bias else "")
    for protocol, meaning in (("masked", "items of the history are left out"), ("unmasked", every)):
        names = list(next(iter(results.values()))[protocol])
        rows = [[path, *(f"{figures[protocol][name]:.4f}" for name in names)] for path, figures in results.items()]
        lines += [f"\n{protocol} ({meaning})", figures_table([["", *names], *rows])]
    return "\n".join(lines) + "\n"


def describe_end(config: Evaluate, evaluation: dict[str, Any]) -> list[str]:
    """What was written, and the next command."""
    beside, per_user = os.path.dirname(config.output), ""
    if "per_user" in evaluation:
        per_user = f" and {os.path.join(beside, evaluation['per_user']['file'])}"
    following = {"data": config.data, "checkpoint": config.checkpoint, "output": "EXPORT_FOLDER"}
    return [f"Written: {config.output}{per_user}", next_line("export", following)]
