"""Reads what a report shows of a run: its options, its progress, its curves, and where its tables are."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import TRAINED_DAYS, Checkpoints, read_metadata
from recgpt_torchrec.config import Pretrain, PromptTune
from recgpt_torchrec.config.fields import options
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.days.records import path_of
from recgpt_torchrec.data.split import MEANINGS
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.reports.curves import read_curves
from recgpt_torchrec.reports.values import EvaluationValues, RunValues, TableValues
from recgpt_torchrec.storage.finished import flatten
from recgpt_torchrec.storage.manifests import suggest_below
from recgpt_torchrec.storage.typed import is_count_or_negative, make_typed
from recgpt_torchrec.training.progress import Progress
from recgpt_torchrec.training.run import Record, read_record

HISTORY_BYTES = 2**26
"""Maximum size of a history.jsonl that is read."""
KINDS = {None: "pre-training", True: "prompt-tuning", False: "fine-tuning without prompts"}
"""By whether a run tunes on prompts; None: it does not tune."""


def names_of(runs: list[str]) -> list[str]:
    """Short names of runs: the shortest ends of their paths by which all differ; of a single one its last two steps.

    Example: `names_of(["a/seed0/run", "a/seed1/run"])` is `["seed0/run", "seed1/run"]`
    """
    steps = [[step for step in run.rstrip("/").split("/") if step not in ("", ".")] or [run] for run in runs]
    for count in range(2 if len(runs) == 1 else 1, max(map(len, steps)) + 1):
        names = ["/".join(each[-count:]) for each in steps]
        if len(set(names)) == len(names):
            return names
    return list(runs)


def run_folder(path: str) -> str:
    """The folder of the run at `path`: of a run on a folder of days that of its newest day.

    Raises:
        InputError: it is no run.
    """
    try:
        days = storage.read_json(os.path.join(path, TRAINED_DAYS))
    except InputError:
        days = None
    folder = path if days is None else path_of(path, len(days.get("days", [])))
    if read_record(folder) is None:
        what = "is not a run" if storage.exists(path) else "does not exist"
        meant = suggest_below(path, lambda below: read_record(below) is not None)
        raise InputError(
            f"{path} {what}"
            + (": it has no run.json. " if storage.exists(path) else ". ")
            + (meant or "Give the --output of pretrain or prompt_tune; evaluations are given with --evaluations")
        )
    return folder


def read_run(path: str, name: str, evaluations: list[EvaluationValues]) -> RunValues:
    """Read a run.

    Args:
        path: its folder.
        name: what the report calls it.
        evaluations: of it.

    Raises:
        InputError: it is no run, or damaged.
    """
    folder = run_folder(path)
    record = read_record(folder)
    assert record is not None, folder
    checkpoint = Checkpoints(folder, keep=0).latest()
    metadata = {} if checkpoint is None else read_metadata(checkpoint)
    progress = None if checkpoint is None else Progress.of_checkpoint(checkpoint)
    tuning = record.config.get("tuning")
    epochs, lost = read_epochs(folder)
    curves, notes = read_curves(folder), []
    if lost:
        notes.append(f"{lost:,} lines of history.jsonl are damaged or incomplete, and left out.")
    if curves is None:
        notes.append("Its TensorBoard events cannot be read; curves are by epoch.")
    return RunValues(
        name=name,
        folder=path,
        kind=KINDS[bool(tuning.get("prompts", True)) if isinstance(tuning, dict) else None],
        state=describe_progress(progress),
        finished=progress is not None and progress.finished,
        facts=[
            *describe_data(record, [each.dataset for each in evaluations]),
            *describe_training(record, metadata, epochs),
        ],
        options=described_options(record.config),
        epochs=epochs,
        steps=curves or {},
        tables=read_tables(metadata),
        evaluations=evaluations,
        notes=notes,
    )


def describe_progress(progress: Progress | None) -> str:
    """How far a run is, in words."""
    if progress is None:
        return "unfinished: it has no checkpoint yet"
    if progress.finished:
        return f"finished after {progress.step:,} steps"
    return (
        f"unfinished: its newest checkpoint is that of step {progress.step:,}, in epoch {progress.position.epoch + 1}"
    )


def describe_data(record: Record, datasets: Sequence[str]) -> list[tuple[str, str]]:
    """What a run was trained on: label and value; sizes are of the first of the folders with its users and items."""
    data = str(record.config.get("data"))
    facts = [("Dataset", data)]
    for path in dict.fromkeys([data, *datasets]):
        try:
            manifest = Manifest.read(path)
        except InputError:
            continue
        if manifest.vocabulary == record.vocabulary:
            size = f"{manifest.users:,} users, {manifest.items:,} items, {manifest.interactions:,} interactions"
            if (others := manifest.entries - manifest.interactions) > 0:
                size += f", {others:,} prompts or shown items"
            return [*facts, ("Size of the dataset", size), ("Held out", MEANINGS[manifest.hold_out])]
    return [*facts, ("Size of the dataset", "not known: it is not there, holds other users or items, or has days")]


def describe_training(
    record: Record, metadata: Mapping[str, Any], epochs: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """How a run was trained: label and value."""
    flat = flatten(record.config)
    facts = []
    if start := record.config.get("checkpoint") or record.initial:
        facts.append(("Started from", str(start)))
    facts.append(("Decoder", ", ".join(f"{name} {flat.get(f'model.{name}')}" for name in ("dim", "layers", "heads"))))
    facts.append(("Longest history", f"{flat.get('model.max_len')} entries"))
    facts.append(("Loss", f"candidates {flat.get('loss.candidates')}"))
    facts.append(("Tokens per batch", str(flat.get("batch.tokens"))))
    environment = metadata.get("environment")
    if isinstance(environment, dict):
        facts.append(("Ranks", str(environment.get("ranks"))))
        facts.append(("Device", str(environment.get("device"))))
        facts.append(("Computed", str(environment.get("compute"))))
        versions = environment.get("versions")
        if isinstance(versions, dict):
            facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    else:
        facts.append(("Ranks, device, versions", "not recorded by the version that trained it"))
    seconds = sum(_number(line.get("train_s")) for line in epochs)
    if seconds:
        validating = sum(_number(line.get("validate_s")) for line in epochs)
        facts.append(("Time", f"{_duration(seconds)} of training and {_duration(validating)} of validation"))
    if isinstance(best := metadata.get("best"), dict) and best.get("checkpoint"):
        when = f"after epoch {best.get('epoch')}" if best.get("epoch") != 0 else "before the first step"
        metric = flat.get("train.metric", "NDCG@10")  # earlier versions had no other
        facts.append(("Best on validation", f"{metric} {_number(best.get('value')):.4f} {when}"))
    return facts


def described_options(config: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """All options of a run: dotted name, value, and whether it is not the default."""
    config_class = PromptTune if "tuning" in config else Pretrain
    defaults = {}
    for option in options(config_class):
        each = option.field
        if each.default is not MISSING:
            defaults[option.name] = each.default
        elif each.default_factory is not MISSING:
            defaults[option.name] = each.default_factory()
    rows = []
    for name, value in flatten(config).items():
        shown = "null" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append((name, shown, name not in defaults or defaults[name] != value))
    return rows


def read_epochs(folder: str) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a run's history.jsonl, and the number of others, which are left out."""
    path = os.path.join(folder, "history.jsonl")
    try:
        lines = storage.read(path, HISTORY_BYTES).splitlines() if storage.exists(path) else []
    except (OSError, ValueError):
        return [], 1
    epochs = []
    for line in lines:
        try:
            values = json.loads(line, parse_constant=lambda _: None)  # a loss may be NaN
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and all(_is_count(values.get(name)) for name in ("epoch", "step")):
            epochs.append(values)
    return epochs, len(lines) - len(epochs)


def read_tables(metadata: Mapping[str, Any]) -> list[TableValues]:
    """Where the tables of a checkpoint are; those that it does not describe are left out."""
    placed, tables = metadata.get("placements"), []
    for each in placed if isinstance(placed, list) else []:
        with suppress(ValueError):
            tables.append(make_typed(TableValues, each, others=True))
    return tables


def _is_count(value: Any) -> bool:
    return is_count_or_negative(value) and value >= 0


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else 0.0
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
