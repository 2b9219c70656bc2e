"""How the time of a step grows: with candidates, with the length of histories, with the catalogue."""

from collections.abc import Callable
from typing import Any

from tools.benchmarks.measuring import Figures, Kind, Ratio
from tools.benchmarks.settings import Settings

STEPS = 15
"""Steps of a turn."""


def candidates(settings: Settings) -> Kind:
    """512 to 16,384 sampled candidates, as far as the catalogue has them, and all items, on the dataset."""
    counts = (32, 128) if settings.quick else (512, 1024, 2048, 4096, 8192, 16384)
    choices: dict[str, dict[str, Any]] = {f"{count:,} candidates": {"loss.negatives": count} for count in counts}
    choices["all items"] = {"loss.candidates": "all"}
    items = settings.training(steps=1).dataset.manifest.items
    kept = {name: options for name, options in choices.items() if options.get("loss.negatives", 0) <= items} or choices
    return _grow({name: settings.training(options, _steps(settings)).turn for name, options in kept.items()})


def length(settings: Settings) -> Kind:
    """Histories of 50, 100 and 200 tokens, synthetic, with the same number of tokens in a step."""
    ways = {}
    for tokens in (50, 100, 200):
        data = settings.synthetic(items=settings.pick(12_000, 300), length=tokens, users=settings.pick(4000, 64))
        training = settings.training({"model.max_len": tokens}, _steps(settings), data)
        ways[f"{tokens} tokens"] = training.turn
    return _grow(ways)


def catalogue(settings: Settings) -> Kind:
    """10,000 to 1,000,000 items, synthetic, with the configuration's number of sampled candidates."""
    ways = {}
    for items in (10_000, 100_000, 1_000_000) if not settings.quick else (100, 1000):
        data = settings.synthetic(items=items, length=20, users=settings.pick(8000, 64))
        ways[f"{items:,} items"] = settings.training({}, _steps(settings), data).turn
    return _grow(ways)


def _steps(settings: Settings) -> int:
    return settings.pick(STEPS, 2)


def _grow(ways: dict[str, Callable[[], Figures]]) -> Kind:
    smallest, *larger = ways
    ratios = {f"step, {name} over {smallest}": Ratio((name, "step_ms"), (smallest, "step_ms")) for name in larger}
    return Kind(ways, ratios)
