"""Options of the attributes that a model reads beside the ids of users and items."""

import math
from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import within

ALL = "all"
"""Stands for every attribute that the dataset has."""


@dataclass(kw_only=True)
class AttributeChoice:
    """Which attributes of users and items the model reads, and how their vectors are added to those of the ids."""

    use: list[str] = field(default_factory=lambda: [ALL])
    """Names of the attributes to read: `category`, or `item.category` where users have one of that name too. all: every
    attribute of the dataset; []: none."""
    weights: list[str] = field(default_factory=list)
    """Factors of attributes' vectors in the sum with the id's, as NAME=WEIGHT; 1 for those that are not named."""
    pooling: Literal["mean", "sum"] = "mean"
    """How the vectors of several values of an attribute become one."""
    id_dropout: float = 0.1
    """Probability, 0 to 1, that an item's own vector is left out in a training step, so that its attributes learn to
    stand alone. Of no effect where items have no attributes."""

    def __post_init__(self) -> None:
        within("--attributes.id_dropout", self.id_dropout, 0, 1)
        names = [name for name, _ in self._pairs()]
        for option, given in (("use", self.use), ("weights", names)):
            if twice := next((name for name in given if given.count(name) > 1), None):
                raise ValueError(f"--attributes.{option} names {twice} twice; name it once")
        if ALL in self.use and len(self.use) > 1:
            raise ValueError(f"--attributes.use has {ALL} beside other names; give one or the other")

    def weight_of(self) -> dict[str, float]:
        """The factors that are given, by name."""
        return dict(self._pairs())

    def _pairs(self) -> list[tuple[str, float]]:
        pairs = []
        for text in self.weights:
            name, equals, number = text.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                equals, weight = "", 0.0
            if not name or not equals:
                raise ValueError(f"--attributes.weights has {text!r}; write NAME=WEIGHT, like category=2")
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"--attributes.weights has {text}; a weight must be more than 0. To leave an attribute out, name "
                    "the others in --attributes.use"
                )
            pairs.append((name, weight))
        return pairs
