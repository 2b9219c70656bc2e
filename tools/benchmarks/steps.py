"""The training step on one process: against plain loops in PyTorch, against its floor, and a whole epoch."""

from collections.abc import Callable
from typing import Any

import torch

from recgpt_torchrec.model.peaks import Precision, measured_peak
from recgpt_torchrec.training import meter
from tools.benchmarks.measuring import Figures, Kind, Ratio, stopwatch
from tools.benchmarks.settings import Settings
from tools.plain_packed import PackedLoop
from tools.plain_padded import PaddedLoop, TrainingData

STEPS = 40
"""Steps of a turn."""


def against_padded(settings: Settings) -> Kind:
    """The project's trainer over a loop on padded batches in plain PyTorch, in targets per second."""
    return _against(settings, "plain padded loop", PaddedLoop, goal=6)


def against_packed(settings: Settings) -> Kind:
    """The project's trainer over a loop on packed batches in plain PyTorch, in targets per second."""
    return _against(settings, "plain packed loop", PackedLoop, goal=2)


def _against(settings: Settings, name: str, make_loop: Callable[[TrainingData], Any], goal: float) -> Kind:
    steps = settings.pick(STEPS, 2)
    training = settings.training(steps=steps)
    loop = make_loop(TrainingData(settings.data))
    loop.run(settings.pick(5, 1))

    def plain() -> Figures:
        with stopwatch() as figures:
            targets = loop.run(steps)
        return {"targets_s": targets / figures["seconds"], **figures}

    ratio = Ratio(("trainer", "targets_s"), (name, "targets_s"), goal)
    return Kind(
        {"trainer": training.turn, name: plain}, {f"trainer over {name}": ratio}, shown=("targets_s", "step_ms")
    )


def floor(settings: Settings) -> Kind:
    """The share of the step's floor, and what the rest of the time goes to.

    The floor is the time of the step's matrix products at the rate that large products reach here, measured in the same
    rounds: the share is operations per second of the step over those of a large product.
    """
    kinds: dict[str, dict[str, Any]] = {"sampled": {}, "all": {"loss.candidates": "all"}}
    ways: dict[str, Callable[[], Figures]] = {}
    ratios = {}
    for name, options in kinds.items():
        training = settings.training(options, steps=settings.pick(STEPS if name == "sampled" else 15, 2))
        precision = training.trainer.execution.precision
        peak = f"peak in {precision}"
        ways[peak] = lambda precision=precision: _peak(settings, precision)  # type: ignore[misc]
        ways[name] = training.turn
        ways[f"{name}, split"] = training.split
        ratios[f"{name}: share of the floor"] = Ratio((name, "flops_s"), (peak, "flops_s"), 0.6)
    return Kind(ways, ratios, shown=("flops_s", *meter.PARTS))


def _peak(settings: Settings, precision: Precision) -> Figures:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 128 if settings.quick else None
    return {"flops_s": measured_peak(device, precision, size=size, seconds=0.01 if settings.quick else 1.0)}


def epoch(settings: Settings) -> Kind:
    """Seconds of an epoch of the dataset, training only, with all items and with sampled ones as candidates."""
    # A toy epoch ends after some steps.
    steps = 2 if settings.quick else None
    ways = {name: settings.training({"loss.candidates": name}, steps=steps).turn for name in ("all", "sampled")}
    return Kind(dict(ways), shown=("seconds", "targets_s", "step_ms", "data_wait"))
