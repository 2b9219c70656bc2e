"""What attributes cost: the step, and the loader apart, with 0, 3 and 8 of them."""

from collections.abc import Callable

import numpy as np

from recgpt_torchrec.data.inputs.spec import Entity
from tools.benchmarks.measuring import Figures, Kind, Ratio, stopwatch
from tools.benchmarks.settings import Settings
from tools.benchmarks.training import Training
from tools.small_run import SmallAttribute, write_dataset

NUMBERS = (0, 3, 8)
GOALS = {3: 0.77, 8: 0.5}
"""Targets per second over those without attributes: a step takes at most 1.3 and 2 times as long."""
USERS, ITEMS, LENGTH = 4_000, 20_000, 15
TOKENS, CANDIDATES = 2048, 4096
STEPS = 20
"""Steps of a turn."""
KINDS: tuple[tuple[Entity, int, bool], ...] = (
    ("item", 20, False),
    ("item", 1000, True),
    ("user", 10, False),
    ("item", 1000, False),
)
"""Entity, number of values, and whether there are up to three per item, in turn."""


def attributes(settings: Settings) -> Kind:
    """A step's and the loader's time with 0, 3 and 8 attributes of users and items, on a synthetic dataset."""
    data, names = write(settings)
    ways: dict[str, Callable[[], Figures]] = {}
    ratios = {}
    for number in NUMBERS:
        options = {
            "batch.tokens": settings.pick(TOKENS, 60),
            "loss.candidates": "sampled",
            "loss.negatives": settings.pick(CANDIDATES, 20),
            "attributes.use": f"[{', '.join(names[:number])}]",
        }
        training = settings.training(options, steps=settings.pick(STEPS, 2), data=data)
        step, loader = f"{number} attributes", f"loader, {number} attributes"
        ways[step], ways[loader] = training.turn, lambda training=training: _load(training)  # type: ignore[misc]
        if number:
            for figure, goal in (("targets_s", GOALS[number]), ("step_ms", None)):
                ratios[f"{figure} with {number} over none"] = Ratio((step, figure), ("0 attributes", figure), goal)
            over = Ratio((loader, "batch_ms"), ("loader, 0 attributes", "batch_ms"))
            ratios[f"batch_ms with {number} over none"] = over
    return Kind(ways, ratios, shown=("step_ms", "batch_ms"))


def _load(training: Training) -> Figures:
    """Make the batches of a turn without training on them."""
    with stopwatch() as figures:
        batches = sum(1 for _ in training.stream.batches(training.epoch))
    return {"batch_ms": 1e3 * figures["seconds"] / batches, **figures}


def write(settings: Settings) -> tuple[str, list[str]]:
    """Write the dataset; returns its folder and the attributes' names."""
    users, items = settings.pick(USERS, 40), settings.pick(ITEMS, 60)
    drawn = []
    for number in range(max(NUMBERS)):
        entity, values, multiple = KINDS[number % len(KINDS)]
        rows = users if entity == "user" else items
        drawn.append(SmallAttribute.draw(entity, f"a{number}", rows, values, multiple=multiple))
    folder = settings.folder / "attributes"
    if not folder.exists():
        histories = np.random.default_rng(0).integers(0, items, (users, LENGTH)).tolist()
        write_dataset(folder, histories, items=items, attributes=drawn, rows_per_group=256, groups_per_part=8)
    return str(folder), [each.described.full_name for each in drawn]
