"""The unit of the timestamps of a dataset whose times are read: recorded by prepare, given, or guessed."""

import math
from datetime import UTC, datetime
from decimal import Decimal

from recgpt_torchrec.config import TimeChoice
from recgpt_torchrec.config.boundaries import parse_moment
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import TIMES, UNITS, Inputs
from recgpt_torchrec.data.inputs.times import DAY, guess_unit, unit_name
from recgpt_torchrec.data.reading.footers import time_range
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError


def choose_unit(choice: TimeChoice, dataset: Dataset) -> float:
    """Seconds of a unit of a dataset's times, which a run is to read; 1 where it is unknown and gaps alone are read.

    Raises:
        InputError: it has no times; its unit is not known, or another one than the options say; or it has no hours.
    """
    names = ", ".join(choice.use)
    if not has_times(dataset):
        raise InputError(
            f"--time.use {names}: {dataset.path} has no timestamps; prepare a log with --time_column, or leave the "
            "option out"
        )
    recorded = dataset.manifest.time_unit
    given = None if choice.unit == "auto" else UNITS[choice.unit]
    if recorded is not None and given not in (None, recorded):
        raise InputError(
            f"--time.unit {choice.unit}: {dataset.path} was prepared with times in {unit_name(recorded)}; leave the "
            "option out, or prepare the log with --time_unit"
        )
    unit = recorded or given
    if unit is None and (bounds := time_range(dataset)) is not None:
        unit = guess_unit(*bounds)
    if unit is None and {"hour", "weekday"} & {*choice.use}:
        raise InputError(
            f"--time.use {names}: the unit of the times of {dataset.path} is not known; give it with --time.unit, for "
            "example s for seconds since 1970"
        )
    if unit is not None and unit >= DAY and "hour" in choice.use:
        raise InputError(f"--time.use hour: the times of {dataset.path} are days, which have no hour; leave hour out")
    return unit or 1.0


def check_times(inputs: Inputs, checkpoint: str, dataset: Dataset) -> None:
    """Check that a dataset has the times that the model of a checkpoint reads, in the same unit.

    Raises:
        InputError: it has not.
    """
    if not has_times(dataset):
        raise InputError(
            f"the checkpoint {checkpoint} reads times, and {dataset.path} has no timestamps; give the dataset that it "
            "was trained on, or one prepared with --time_column"
        )
    unit = dataset.manifest.time_unit
    if unit is not None and unit != inputs.time_unit:
        raise InputError(
            f"the checkpoint {checkpoint} was trained on times in {unit_name(inputs.time_unit)}, and those of "
            f"{dataset.path} are {unit_name(unit)}; prepare the log in the same unit"
        )


def has_times(dataset: Dataset) -> bool:
    """Whether a dataset's sequences have timestamps."""
    if not dataset.columns:
        row_groups(dataset)  # reads the footers
    return "timestamps" in dataset.columns


def choose_request_time(given: str | None, inputs: Inputs, checkpoint: str, dataset: Dataset) -> int | None:
    """The time of the request after whole histories, in the dataset's unit; None: the model reads no times.

    Args:
        given: the value of `--time`; None: the newest time of the dataset.
        inputs: of the model.
        checkpoint: its folder.
        dataset: whose histories are encoded.

    Raises:
        InputError: a time is given for a model that reads none; or it cannot be told in the dataset's unit; or the
            newest time is not known.
    """
    if not inputs.reads(*TIMES):
        if given is not None:
            raise InputError(f"--time {given}: the model of {checkpoint} reads no times; leave the option out")
        return None
    bounds = time_range(dataset)
    if given is None:
        if bounds is None:
            raise InputError(f"{dataset.path} does not say its newest time; give the time of the request with --time")
        return bounds[1]
    moment, is_date = parse_moment("--time", given)
    if not is_date:
        return int(moment)
    if dataset.manifest.time_unit is None and (bounds is None or guess_unit(*bounds) is None):
        raise InputError(
            f"--time {given}: the unit of the times of {dataset.path} is not known; give a number in that unit"
        )
    return to_units(moment, inputs.time_unit)


def to_units(seconds: Decimal, unit: float) -> int:
    """Seconds in whole units, rounded down."""
    return math.floor(seconds * round(1 / unit) if unit < 1 else seconds / round(unit))


def describe_time(time: int, unit: float) -> str:
    """A time since 1970 in words, and as a number where no date can be told."""
    try:
        return datetime.fromtimestamp(time * unit, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return str(time)
