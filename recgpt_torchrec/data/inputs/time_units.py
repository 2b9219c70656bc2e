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

LONGEST_WAIT = Decimal(100 * 365 * 86_400)
"""Seconds from the newest interaction to the latest request that is taken for meant."""


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


def other_times(inputs: Inputs, choice: TimeChoice, dataset: Dataset) -> list[str]:
    """The options by which times would mean something else to a run than to the model that it starts from."""
    shared = {*choice.use} & {each.name for each in inputs.features}
    differ = []
    if shared and choose_unit(choice, dataset) != inputs.time_unit:
        differ.append(f"times in {unit_name(inputs.time_unit)}")
    if {"hour", "weekday"} & shared and inputs.utc_offset_hours != choice.utc_offset_hours:
        differ.append(f"--time.utc_offset_hours {inputs.utc_offset_hours:g}")
    return differ


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
            newest time is not known; or the time is before all interactions or a hundred years after them, as one in
            another unit is.
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
    is_unit_known = dataset.manifest.time_unit is not None or (bounds is not None and guess_unit(*bounds) is not None)
    if is_date and not is_unit_known:
        raise InputError(
            f"--time {given}: the unit of the times of {dataset.path} is not known; give a number in that unit"
        )
    time = to_units(moment, inputs.time_unit) if is_date else int(moment)
    if bounds is not None:
        latest = bounds[1] + to_units(LONGEST_WAIT, inputs.time_unit)
        if time < bounds[0] or (is_unit_known and time > latest):
            oldest, newest = (describe_time(each, inputs.time_unit) for each in bounds)
            unit = f"{unit_name(inputs.time_unit)} since 1970" if is_unit_known else "its unit"
            raise InputError(
                f"--time {given}: the interactions of {dataset.path} are from {oldest} to {newest}, and a request "
                f"comes after them, within a hundred years; give an ISO date-time, or a number of {unit}"
            )
    return time


def to_units(seconds: Decimal, unit: float) -> int:
    """Seconds in whole units, rounded down."""
    return math.floor(seconds * round(1 / unit) if unit < 1 else seconds / round(unit))


def describe_time(time: int, unit: float) -> str:
    """A time since 1970 in words, and as a number where no date can be told."""
    try:
        return datetime.fromtimestamp(time * unit, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return str(time)
