"""Trains the days of a folder one after the other, each from the state after the day before, each once.

A day is a run of its own, below the output folder: its steps, checkpoints and learning-rate schedule are those of any
run that continues another on new targets. So whatever stops the job, the same command goes on where it was.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import BEST, TRAINED_DAYS, Checkpoints
from recgpt_torchrec.checkpoints.folder import FOLDER as CHECKPOINTS
from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.data.dataset import Dataset, Manifest, histories_fingerprint
from recgpt_torchrec.data.days.opening import read_days
from recgpt_torchrec.data.days.records import FOLDER, Days, path_of
from recgpt_torchrec.distributed.processes import log_message, print_result, run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.texts.commands import next_line
from recgpt_torchrec.training.days.record import TrainedDay, TrainedDays
from recgpt_torchrec.training.progress import Progress
from recgpt_torchrec.training.run import RUN

DAY_BEFORE = "the day before"
"""Value of `--initial` that the run of a day records, wherever the folders are."""
TrainRun = Callable[[Pretrain, str | None], None]
"""Trains the run of a configuration to the end, from a checkpoint (None: as the configuration says)."""


@dataclass(frozen=True)
class Day:
    """A day to train."""

    number: int
    targets: int
    """Number of its new targets."""
    histories: str
    """Fingerprint of its histories."""


def is_folder_of_days(path: str) -> bool:
    """Whether days are appended to this folder (collective)."""
    return run_on_first_rank(lambda: Days.read(path) is not None)


def train_days(config: Pretrain, train_run: TrainRun) -> None:
    """Train the days that are not trained yet (collective).

    Args:
        config: of the stage; `data` is a folder of days.
        train_run: trains one run.

    Raises:
        InputError: the days or the output folder do not fit the options or each other.
    """
    days: list[Day] = run_on_first_rank(lambda: _check_days(config))
    trained: int = run_on_first_rank(lambda: len(_check_output(config, days).days))
    if trained == len(days):
        print_result(f"{config.output} is already trained on all {trained} days of {config.data}.")
        return print_result(_next_step(config))
    for day in days[trained:]:
        log_message(
            f"Day {day.number} of {len(days)}: {day.targets:,} new targets, in {path_of(config.output, day.number)}"
        )
        initial = None if day.number == 1 else run_on_first_rank(partial(_find_state, config, day.number - 1))
        train_run(_options_of(config, day), initial)
        run_on_first_rank(partial(_record, config, day))
    names = f"day {days[-1].number}" if len(days) == trained + 1 else f"days {trained + 1} to {len(days)}"
    print_result(f"Trained: {names} of {config.data}, {sum(day.targets for day in days[trained:]):,} new targets")
    print_result(_next_step(config))


def _options_of(config: Pretrain, day: Day) -> Pretrain:
    """The options of a day's run. Histories are read in windows: else new targets of long days would be left out."""
    first = day.number == 1
    return replace(
        config,
        data=path_of(config.data, day.number),
        output=path_of(config.output, day.number),
        initial=config.initial if first else DAY_BEFORE,
        targets="all" if first else "new",
        batch=replace(config.batch, long_histories="windows"),
    )


def _check_days(config: Pretrain) -> list[Day]:
    """The days of the folder, which fit the options."""
    days = Days.read(config.data)
    assert days is not None
    manifests = read_days(config.data, days)
    if config.targets == "new":
        raise InputError(
            f"--targets new: {config.data} is a folder of days, of which each new target is trained once; leave the "
            "option out"
        )
    for number, manifest in enumerate(manifests, 1):
        assert manifest.day is not None
        if manifest.day.history < config.model.max_len:
            raise InputError(
                f"--model.max_len is {config.model.max_len}, but day {number} of {config.data} keeps the newest "
                f"{manifest.day.history} interactions of earlier days; give --model.max_len {manifest.day.history}, or "
                "append the days to a new folder with --history"
            )
    return [Day(number, _count_new(each), _histories_of(config, each)) for number, each in enumerate(manifests, 1)]


def _count_new(manifest: Manifest) -> int:
    return int(manifest.preparation["split"]["training_targets"])


def _histories_of(config: Pretrain, manifest: Manifest) -> str:
    return histories_fingerprint(Dataset(path=config.data, manifest=manifest))


def _check_output(config: Pretrain, days: list[Day]) -> TrainedDays:
    """What the output folder has trained of these days."""
    output = config.output
    trained = TrainedDays.read(output)
    if trained is None:
        leftovers = {*storage.names(output)} - {FOLDER, f"{TRAINED_DAYS}.tmp"}
        if leftovers:
            what = "a run on a dataset" if RUN in leftovers else "something that is not a run of this program"
            raise InputError(f"{output} holds {what}, and {config.data} is a folder of days; choose another --output")
        return TrainedDays()
    if len(trained.days) > len(days):
        raise InputError(
            f"{output} was trained on {len(trained.days)} days, {config.data} has {len(days)}; give the folder of days "
            "that it was trained on, or choose another --output"
        )
    for day, record in zip(days, trained.days, strict=False):
        if day.histories != record.histories:
            raise InputError(
                f"{output} was trained on another day {day.number} than that of {config.data}; give the folder of days "
                "that it was trained on, or choose another --output"
            )
    return trained


def _find_state(config: Pretrain, day: int) -> str:
    """The newest checkpoint of a trained day: not the best one, which was trained on the targets less often."""
    path = path_of(config.output, day)
    if (checkpoint := Checkpoints(path, keep=0).latest()) is None:
        raise InputError(f"{path} holds no checkpoint, and the next day starts from it; restore it")
    return checkpoint


def _record(config: Pretrain, day: Day) -> None:
    """Record that a day is trained, then remove the checkpoints of the days before."""
    steps = Progress.of_checkpoint(_find_state(config, day.number)).step
    trained = TrainedDays.read(config.output) or TrainedDays()
    trained.days.append(TrainedDay(histories=day.histories, targets=day.targets, steps=steps))
    try:
        trained.write(config.output)
        for earlier in range(1, day.number):
            _remove_checkpoints(path_of(config.output, earlier))
    except OSError as error:
        storage.raise_storage_failure(error, config.output, "write to")
        raise InputError(f"cannot write to --output {config.output}: {error}") from None


def _remove_checkpoints(run: str) -> None:
    """Remove the checkpoints of a day's run; its record, curves and history stay."""
    if storage.exists(os.path.join(run, BEST)):
        fs, path = storage.filesystem(os.path.join(run, BEST))
        fs.delete_file(path)
    storage.remove(os.path.join(run, CHECKPOINTS))


def _next_step(config: Pretrain) -> str:
    line = next_line("export", {"data": config.data, "checkpoint": config.output, "output": "EXPORT_FOLDER"})
    return f"{line}\n         after the next prepare --append, give the command of this training again"
