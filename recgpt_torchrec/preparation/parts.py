"""What `prepare --hold_out` holds out: the part of each event, training, validation or test, by time, file or type.

What becomes of the parts, and `last` and `none`, which need nothing of the log, is in `data.split`.
"""

import os
from collections.abc import Callable
from typing import Any

import ibis
import ibis.expr.types as ir

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.data.split import EVALUATION
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.engines.engine import Engine
from recgpt_torchrec.preparation.moments import find_ends, find_moment
from recgpt_torchrec.preparation.reading.files import InputFiles, list_files

INPUTS = ("input", "validation_input", "test_input")
"""Options that name the files of the training, the validation and the test part."""
NAMES = ("training", "validation", "test")


def list_input_files(config: Prepare) -> tuple[InputFiles, list[int]]:
    """The files of all parts, in the order of parts, and the number of the part of each.

    Raises:
        InputError: a file is missing or not known (see `list_files`), or is in two parts.
    """
    inputs = InputFiles()
    parts: list[int] = []
    part_of: dict[str, int] = {}
    for part, name in enumerate(INPUTS):
        if not (patterns := getattr(config, name)):
            continue
        listed = list_files(patterns, config, f"--{name}")
        for file in listed.files:
            place = file.path if "://" in file.path else os.path.realpath(file.path)
            if part_of.setdefault(place, part) != part:
                raise InputError(
                    f"{file.path} is named by --{INPUTS[part_of[place]]} and by --{name}; each file is in one part: "
                    "leave it out of the other, or divide a single log with --hold_out time"
                )
        inputs.files += listed.files
        inputs.left_out += listed.left_out
        inputs.repeated += listed.repeated
        parts += [part] * len(listed.files)
    return inputs, parts


def mark_parts(
    engine: Engine,
    config: Prepare,
    events: ir.Table,
    first_rows: list[int],
    file_parts: list[int],
    target_events: list[int],
) -> tuple[ir.Table, dict[str, Any]]:
    """Add the column `part` to the kept events, where `hold_out` is `time`, `given` or `targets`.

    Args:
        engine: that holds the events.
        config: of the stage.
        events: with `time`, `fraction`, `order` and `segment`; interactions decide where the parts begin.
        first_rows: [files] value of `order` of each file's first row.
        file_parts: [files] number of the part of each file.
        target_events: ids of the event types that are held out.

    Returns:
        The events, and the boundaries for the manifest, by the name of their option.

    Raises:
        InputError: a part or a target event type has no interaction, or a boundary is outside the log's times.
    """
    if config.hold_out == "given":
        starts = [next(row for row, of in zip(first_rows, file_parts, strict=True) if of >= part) for part in (1, 2)]
        marked = _number_parts(events, lambda part: events.order >= starts[part - 1])
        _check_parts_are_there(engine, config, marked, file_parts)
        return marked, {}
    if config.hold_out == "time":
        return _divide_by_time(engine, config, events)
    if config.hold_out == "targets":
        clicks = queries.select_interacted(events)
        if not engine.count(clicks.filter(clicks.event.isin(target_events))):
            raise InputError(
                f"--target_events {','.join(config.target_events)}: none of the {engine.count(clicks):,} interactions "
                "that are kept is of these event types (rows that were only shown are none); give types of interactions"
            )
        return engine.save("parted_events", _divide_at_targets(events, target_events)), {}
    return events, {}


def _number_parts(events: ir.Table, is_at_least: Callable[[int], Any]) -> ir.Table:
    """Add the column `part`: the number of the last part that an event is at the beginning of or after."""
    return events.mutate(part=is_at_least(1).cast("int8") + is_at_least(2).cast("int8"))


def _divide_at_targets(events: ir.Table, target_events: list[int]) -> ir.Table:
    """Begin each user's validation and test part at the last but one and at the last interaction of a target type.

    A user without two of them, or with nothing before the first of the two, has a training part alone.
    """
    clicked = events.segment == INTERACTED
    targets = (clicked & events.event.isin(target_events)).cast("int64")
    user = ibis.window(group_by="user_id")
    counted = events.mutate(
        targets=targets.sum().over(ibis.cumulative_window(group_by="user_id", order_by=queries.order_of(events))),
        all_targets=targets.sum().over(user),
    )
    begins = counted.mutate(is_before=(counted.targets < counted.all_targets - 1) & (counted.segment == INTERACTED))
    joined = begins.mutate(
        divided=(begins.all_targets >= len(EVALUATION)) & (begins.is_before.cast("int64").sum().over(user) > 0)
    )
    marked = _number_parts(joined, lambda part: joined.divided & (joined.targets >= joined.all_targets - 2 + part))
    return marked.drop("targets", "all_targets", "is_before", "divided")


def _check_parts_are_there(engine: Engine, config: Prepare, marked: ir.Table, file_parts: list[int]) -> None:
    """Raise an `InputError` if no interaction of a part that has files is left."""
    clicks = queries.select_interacted(marked)
    counts = {row["part"]: row["n"] for row in engine.rows(clicks.group_by("part").agg(n=clicks.count()))}
    for part in sorted(set(file_parts)):
        if not counts.get(part):
            raise InputError(
                f"--{INPUTS[part]}: no interaction of its files is left in the {NAMES[part]} part after filtering with "
                f"--min_count {config.min_count}; give other files, or a smaller --min_count"
            )


def _divide_by_time(engine: Engine, config: Prepare, events: ir.Table) -> tuple[ir.Table, dict[str, Any]]:
    """Divide the events at the boundaries."""
    clicks = queries.select_interacted(events)
    count = engine.count(clicks)

    times = clicks.select(whole="time", fraction="fraction")

    def resolve(option: str, text: str) -> Boundary:
        boundary = Boundary.parse(f"--{option}", text)
        return boundary if boundary.share is None else find_moment(engine, times, int(boundary.share * count))

    oldest, newest = find_ends(engine, times)
    span = f"the interactions have times from {oldest.value} to {newest.value}"

    def check_within(option: str, text: str, boundary: Boundary) -> None:
        shown = text if text == str(boundary.value) else f"{text} (time {boundary.value})"
        if not oldest < boundary <= newest:
            beyond = "after all interactions" if newest < boundary else "before all interactions or at the first"
            raise InputError(
                f"--{option} {shown} is {beyond}: {span}. Give a time between them in the unit of the log, or a share "
                "such as 90%"
            )

    assert config.test_from is not None
    test = resolve("test_from", config.test_from)
    check_within("test_from", config.test_from, test)
    if config.validation_from is not None:
        validation = resolve("validation_from", config.validation_from)
        check_within("validation_from", config.validation_from, validation)
    else:
        in_test = engine.count(clicks.filter(_is_from(clicks, test)))
        validation = find_moment(engine, times, max(count - 2 * in_test, 0))
        if not oldest < validation:
            raise InputError(
                f"--test_from {config.test_from}: {in_test:,} of {count:,} interactions are in the test part, so "
                "nothing is left to train on before a validation part of that size; give a later --test_from, or "
                "--validation_from"
            )
    if not validation < test:
        raise InputError(
            f"--validation_from {config.validation_from} (time {validation.value}) is not before --test_from "
            f"{config.test_from} (time {test.value}); {span}"
        )
    moments = (validation, test)
    marked = _number_parts(events, lambda part: _is_from(events, moments[part - 1]))
    between = clicks.filter(_is_from(clicks, validation) & ~_is_from(clicks, test))
    if not engine.count(between):
        raise InputError(
            f"--validation_from {config.validation_from} (time {validation.value}): no interaction lies between it and "
            f"--test_from {config.test_from} (time {test.value}), so the validation part is empty; {span}"
        )
    return marked, {"validation_from": validation.value, "test_from": test.value}


def _is_from(events: ir.Table, moment: Boundary) -> Any:
    """Whether events are at the moment or after it."""
    return (events.time > moment.whole) | ((events.time == moment.whole) & (events.fraction >= moment.fraction))


def record_of(
    engine: Engine, placed: ir.Table, counts: ir.Table, all_items: int, boundaries: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest records of the split.

    Args:
        engine: that holds the tables.
        placed: from `queries.place_interactions`.
        counts: from `queries.count_items`.
        all_items: number of items of the dataset.
        boundaries: from `mark_parts`.
    """
    row = engine.row(queries.summarize_parts(queries.count_parts(placed)))
    items = engine.row(counts.agg(targets=counts.targets.sum(), trained=(counts.targets > 0).cast("int64").sum()))
    return {
        **boundaries,
        "interactions": {name: row.pop(name) for name in NAMES},
        **row,
        "training_targets": items["targets"],
        "items_without_target": all_items - items["trained"],
    }
