"""Finds the evaluations of a run: JSON files in its folder, and beside it those of its checkpoints."""

import os
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.comparing.records import check_evaluation
from recgpt_torchrec.storage.typed import parse_object

LARGEST = 2**24
"""Maximum size of an evaluation, in bytes; larger JSON files are something else."""
FIELDS = {"checkpoint", "dataset", "split", "results"}
"""What every evaluation has."""


def find_evaluations(run: str) -> dict[str, dict[str, Any]]:
    """The evaluations of a run by path, in order of their names: those in its folder, and those beside it.

    Args:
        run: a run's output folder.
    """
    run = run.rstrip("/")
    beside = os.path.dirname(run) if storage.remote(run) else os.path.dirname(os.path.abspath(run))
    shown = os.path.dirname(run)
    found = {}
    for folder, path in ((run, run), (beside, shown)):
        for name in storage.names(folder):
            if name.endswith(".json") and (values := read_evaluation_json(f"{folder}/{name}")) is not None:
                if folder == run or is_of_run(values["checkpoint"], run):
                    found[os.path.join(path, name)] = values
    return found


def find_evaluation(path: str, split: str) -> str:
    """The evaluation that `path` names: itself, or that of a run's folder on a split.

    Raises:
        InputError: there is none, or the run has several.
    """
    if not storage.is_folder(path):
        if not storage.exists(path):
            raise InputError(f"--compare {path} does not exist; give the JSON file of an evaluation, or a run's folder")
        return path
    found = [name for name, values in find_evaluations(path).items() if values["split"] == split]
    if not found:
        raise InputError(
            f"--compare {path}: the run has no evaluation on {split} in its folder or beside it; evaluate it with "
            f"--checkpoint {path} --output {path.rstrip('/')}/{split}.json"
        )
    if len(found) > 1:
        raise InputError(f"--compare {path}: the run has several evaluations on {split}, name one: {', '.join(found)}")
    return found[0]


def read_evaluation_json(path: str) -> dict[str, Any] | None:
    """The values of an evaluation; None: the file is missing or something else.

    Raises:
        InputError: it is an evaluation that is damaged.
    """
    try:
        values = parse_object(storage.read(path, LARGEST))
    except (OSError, ValueError):
        return None
    if not FIELDS <= values.keys():
        return None
    try:
        check_evaluation(values)
    except ValueError as error:
        raise storage.damaged(path, error) from None
    return values


def is_of_run(checkpoint: str, run: str) -> bool:
    """Whether a checkpoint, as an evaluation names it, lies in a run's folder."""
    if storage.remote(run) or storage.remote(checkpoint):
        return f"{checkpoint}/".startswith(f"{run}/")
    return f"{os.path.realpath(checkpoint)}/".startswith(f"{os.path.realpath(run)}/")
