"""Options of the stage find_neighbours, and of training with the neighbours that it finds."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.fields import changeable


@dataclass(kw_only=True)
class FindNeighbours:
    """Find the items that most often follow each item in the histories of the training part: its neighbours, which
    pretrain and prompt_tune take as soft targets (--neighbours.path).

    Example: recgpt find_neighbours --data data/mine --output data/neighbours
    """

    data: str = changeable()
    """Folder of the dataset, as written by prepare."""
    output: str = changeable()
    """Folder of the neighbours. It must be new or empty, unless it already holds this result; then nothing is done."""
    count: int = 20
    """Maximum number of neighbours per item, 1 to 100; in training, each takes 8 bytes of memory on every node."""
    window: int = 20
    """Maximum distance of two items in a history that count as a pair, in positions, 1 to 100."""
    engine: Literal["duckdb", "pyspark"] = changeable("duckdb")
    """Engine that counts the pairs; the neighbours are the same. See prepare --engine."""
    scratch: str | None = changeable(None)
    """Folder for temporary tables, about 24 bytes per pair (an interaction has up to --window); null: next to the
    output. See prepare --scratch."""
    memory_limit: str | None = changeable(None)
    """Maximum memory of DuckDB before it spills to disk, such as 4GB; null: 80% of the machine's memory."""

    def __post_init__(self) -> None:
        within("--count", self.count, 1, 100)
        within("--window", self.window, 1, 100)


@dataclass(kw_only=True)
class Neighbours:
    """Soft targets from the neighbours of a history's items, which find_neighbours found."""

    path: str | None = None
    """Folder of the neighbours, as written by find_neighbours; null: there are no such soft targets."""
    share: float = 0.3
    """Share of each target's weight that is spread over the neighbours, 0 to 1."""
    memory: int = 5
    """Number of items of a history, from the newest, whose neighbours count, 1 to 20."""
    recency: float = 0.7
    """Weight of an item's neighbours, as a share of those of the item after it, more than 0 to 1."""
    answers: int = 5
    """Number of neighbours that share a target's weight, the best of those that the user's history lacks, 1 to 20."""

    def __post_init__(self) -> None:
        within("--neighbours.share", self.share, 0, 1)
        within("--neighbours.answers", self.answers, 1, 20)
        check_memory(self.memory, self.recency)

    def check(self, candidates: str, other: tuple[str, float]) -> None:
        """Check that the loss can share a target's weight.

        Args:
            candidates: of the loss.
            other: option whose share goes to a model's answers, and its value.

        Raises:
            ValueError: it has no softmax, or the shares are more than the weight.
        """
        if self.path is None:
            return
        if candidates == "bce":
            raise ValueError(
                f"--neighbours.path is {self.path}, but --loss.candidates bce has no softmax; give --loss.candidates "
                "all, sampled or in_batch, or leave the neighbours out"
            )
        name, share = other
        if self.share + share > 1:
            raise ValueError(f"--neighbours.share is {self.share} and {name} {share}; together they must be at most 1")


@dataclass(kw_only=True)
class AnswerNeighbours:
    """Answers from the model and from the neighbours of a history's items, which find_neighbours found, together.

    No item of the user's training part, or of the history so far, is such an answer, whatever --prompts.exclude_seen
    says.
    """

    path: str | None = None
    """Folder of the neighbours, as written by find_neighbours; null: answers are the model's alone."""
    weight: float = 2.0
    """What the best neighbour's score (a logit) is raised by, more than 0 to 100; those of others in proportion to
    their co-occurrence."""
    memory: int = 10
    """Number of items of a history, from the newest, whose neighbours count, 1 to 20."""
    recency: float = 0.7
    """Weight of an item's neighbours, as a share of those of the item after it, more than 0 to 1."""

    def __post_init__(self) -> None:
        check_raising(self.weight, self.memory, self.recency)


@dataclass(kw_only=True)
class RecallNeighbours:
    """Lists from the model and from the neighbours of a history's items, which find_neighbours found, together.

    The defaults are chosen on validation items of Beauty and Toys, one seed each: NDCG@10 .0789 and .0870, without
    neighbours .0766 and .0828; with memory 10 and recency .7 .0787 and .0867, with weight 4 .0781 and .0879.
    """

    path: str | None = changeable(None)
    """Folder of the neighbours, as written by find_neighbours. evaluate measures lists with them as a path of its own;
    retrieve needs --data for the histories, and scores every item. null: lists are the model's alone."""
    weight: float = 2.0
    """What the best neighbour's score (a logit) is raised by, more than 0 to 100; those of others in proportion to
    their co-occurrence."""
    memory: int = 20
    """Number of items of a history, from the newest, whose neighbours count, 1 to 20."""
    recency: float = 0.9
    """Weight of an item's neighbours, as a share of those of the item after it, more than 0 to 1."""

    def __post_init__(self) -> None:
        check_raising(self.weight, self.memory, self.recency)
        for name in ("weight", "memory", "recency"):
            if self.path is None and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"--neighbours.{name} is {getattr(self, name)}, but there are no neighbours; give --neighbours.path"
                )


def check_raising(weight: float, memory: int, recency: float) -> None:
    """Check how neighbours raise scores.

    Raises:
        ValueError: a value is out of its range.
    """
    check_memory(memory, recency)
    at_least("--neighbours.weight", weight, 1e-6)
    within("--neighbours.weight", weight, 0, 100)


def check_memory(memory: int, recency: float) -> None:
    """Check how items of a history count.

    Raises:
        ValueError: a value is out of its range.
    """
    within("--neighbours.memory", memory, 1, 20)
    at_least("--neighbours.recency", recency, 1e-6)
    within("--neighbours.recency", recency, 0, 1)
