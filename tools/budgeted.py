"""Trains a baseline within its minutes and measures it by this project's ranks and metrics.

For `tools/recbole_model.py` and `tools/comirec.py`, which run in different environments: this file needs torch and
numpy alone, and knows nothing of models. `tools/compare_recbole.py` writes the log and the job, and reads the result.

A model is validated after each epoch, and where its time is over. The best one by validation NDCG@10 (masked) is
measured on test; training stops early after `PATIENCE` validations without a better one.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.evaluation.metrics import RankingMetrics

KS = (5, 10, 20, 50, 100)
PATIENCE = 10
"""Validations without a better one that end the training; RecBole's default."""
EVERY = 15.0
"""Seconds between lines of progress."""
HELD_OUT = ("validation", "test")
Scored = Iterable[tuple[np.ndarray, torch.Tensor]]
"""Batches of users, [n] int64, with their scores of all items, [n, items] float32, by this project's numbers."""


@dataclass(kw_only=True)
class Job:
    """What a program has to train."""

    model: str
    log: str
    """Folder of the log: log.inter, log.item where items have an attribute, and parts.npz."""
    items: int
    minutes: float
    """Of training, its validations among it."""
    seed: int
    threads: int
    scratch: str
    """Folder for files that are needed for the run alone."""
    result: str
    """File to write the result to."""
    started: float
    """When the process was started, as `time.time()` tells it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the model to change."""

    @classmethod
    def read(cls, path: str) -> "Job":
        """Read a job, and set what holds for the whole process."""
        job = cls(**json.loads(Path(path).read_text()))
        torch.set_num_threads(job.threads)
        return job


class Part(NamedTuple):
    """Histories of a split, and what it holds out."""

    users: np.ndarray
    """[users] int64."""
    history: Ragged
    """[users] rows, oldest item first."""
    targets: np.ndarray
    """[users] int64; empty for training."""


def read_part(log: str | Path, split: str) -> Part:
    """Read `training`, `validation` or `test` of the log in a folder."""
    with np.load(Path(log) / "parts.npz") as arrays:
        users, values, offsets, targets = (
            arrays[f"{split}_{name}"] for name in ("users", "values", "offsets", "targets")
        )
    return Part(users, Ragged(values, offsets), targets)


class TimeUp(Exception):
    """The minutes are over."""


class Budget:
    """The minutes of one model: counts its batches, shows progress, and ends the training."""

    def __init__(self, job: Job, batches: int) -> None:
        """`batches`: of an epoch."""
        self.job, self.epoch_batches = job, batches
        self.began = self.shown = time.perf_counter()
        self.deadline = self.end = self.began + 60 * job.minutes
        """When `TimeUp` is raised, and when the minutes are over; earlier for a first phase that gets a share."""
        self.phase = ""
        """In words, where it is not the training itself."""
        self.validating = 0.0
        """Seconds of validations so far."""
        self.batches = self.targets = 0
        self._shown = (0, 0.0)
        """Targets and seconds without validations at the newest line of progress."""
        self.best = ""

    @property
    def seconds(self) -> float:
        """Since the training began, with validations."""
        return time.perf_counter() - self.began

    @property
    def epochs(self) -> float:
        """Epochs so far."""
        return self.batches / self.epoch_batches

    def start(self, phase: str, share: float) -> None:
        """Begin a phase that gets a share of the minutes, counted from the start; its epochs begin at 0."""
        self.phase, self.batches = phase, 0
        self.shown, self._shown = time.perf_counter(), (self.targets, self.seconds - self.validating)
        self.deadline = self.began + share * (self.end - self.began)

    def tick(self, targets: int) -> None:
        """Before a batch of so many targets: raise `TimeUp` if time is over, and say now and then where it is."""
        now = time.perf_counter()
        if now >= self.deadline:
            raise TimeUp
        if now - self.shown >= EVERY:
            trained = now - self.began - self.validating
            rate = (self.targets - self._shown[0]) / max(trained - self._shown[1], 1e-9)
            epoch, batch = divmod(self.batches, self.epoch_batches)
            left = (self.end - now) / 60
            print(
                f"{self.job.model}: {self.phase}epoch {epoch + 1}, batch {batch} of {self.epoch_batches}, "
                f"{rate:,.0f} targets/s, {self.seconds / 60:.1f} minutes, at most {left:.1f} left{self.best}",
                flush=True,
            )
            self.shown, self._shown = now, (self.targets, trained)
        self.batches, self.targets = self.batches + 1, self.targets + targets


def train(
    budget: Budget,
    model: torch.nn.Module,
    train_epoch: Callable[[int], object],
    score: Callable[[str], Scored],
) -> dict[str, Any]:
    """Train until the time is over or validation gets no better, and measure the best on test.

    Args:
        budget: whose `tick` the epochs call before each batch.
        model: whose state is kept where it is best.
        train_epoch: trains an epoch, given its number from 0.
        score: scores all users of `validation` or `test`, in batches.

    Returns:
        stopped: "early" or "minutes".
        seconds, train_s: until the end, with and without validations; epochs.
        best: the point of the curve that was chosen.
        curve: of each validation: epochs, seconds and train_s until it began, `masked` and `unmasked` NDCG@10.
        users, masked, unmasked: HR and NDCG on test.
    """
    job = budget.job
    parts = {split: read_part(job.log, split) for split in HELD_OUT}
    curve: list[dict[str, Any]] = []
    best, state, stopped = -1, {}, ""
    while not stopped:
        try:
            train_epoch(len(curve))
        except TimeUp:
            stopped = "minutes"
            if curve and curve[-1]["epochs"] == budget.epochs:
                break  # nothing was trained since the newest validation
        seconds = budget.seconds
        point: dict[str, Any] = {"epochs": budget.epochs, "seconds": seconds, "train_s": seconds - budget.validating}
        figures = measure(score("validation"), parts["validation"], (10,))
        curve.append(point | {how: figures[how]["NDCG@10"] for how in ("masked", "unmasked")})
        budget.validating += budget.seconds - seconds
        if best < 0 or curve[-1]["masked"] > curve[best]["masked"]:
            best = len(curve) - 1
            state = {name: each.clone() for name, each in model.state_dict().items()}
            budget.best = f"; best validation NDCG@10 {curve[best]['masked']:.4f} at {seconds / 60:.1f} minutes"
        if not stopped and len(curve) - 1 - best >= PATIENCE:
            stopped = "early"
    model.load_state_dict(state)
    print(f"{job.model}: {budget.epochs:.2f} epochs, {budget.seconds / 60:.1f} minutes{budget.best}", flush=True)
    return {
        "stopped": stopped,
        **{name: curve[-1][name] for name in ("seconds", "train_s", "epochs")},
        "best": curve[best],
        "curve": curve,
        **measure(score("test"), parts["test"], KS),
    }


@torch.no_grad()
def measure(scored: Scored, part: Part, ks: tuple[int, ...]) -> dict[str, Any]:
    """HR and NDCG of scores for the held-out items, `masked` and `unmasked`, and the number of `users`.

    Raises:
        ValueError: not every user was scored once, or a score is NaN.
    """
    rows = np.full(int(part.users.max(initial=-1)) + 1, -1)
    rows[part.users] = np.arange(part.users.size)
    scored_once = np.zeros(part.users.size, np.int64)
    metrics = {how: RankingMetrics(ks) for how in ("masked", "unmasked")}
    for users, scores in scored:
        of_users = rows[users]
        np.add.at(scored_once, of_users[of_users >= 0], 1)
        if (of_users < 0).any():
            raise ValueError(f"{(of_users < 0).sum()} users were scored that have no item held out")
        targets = torch.from_numpy(part.targets[of_users])
        for each, ranks in zip(metrics.values(), both_ranks(scores, targets, part.history.take(of_users)), strict=True):
            each.update(ranks)
    if (scored_once != 1).any():
        raise ValueError(f"{(scored_once != 1).sum()} of {part.users.size} users were not scored once")
    return {"users": int(part.users.size), **{how: each.result() for how, each in metrics.items()}}


def write_result(job: Job, budget: Budget, model: torch.nn.Module, result: dict[str, Any]) -> None:
    """Write the result, with what holds for every model."""
    setup = time.time() - job.started - (time.perf_counter() - budget.began)
    values = {"model": job.model, "setup_s": setup, "parameters": sum(each.numel() for each in model.parameters())}
    Path(job.result).write_text(json.dumps(values | result, indent=1))
