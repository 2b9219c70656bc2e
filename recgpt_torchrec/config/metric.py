"""The validation figure that decides which checkpoint of a run is best."""

import re
from typing import NamedTuple

UNMASKED = "unmasked."
"""Before the name of a figure of lists that may have items of the history."""
FIGURE = re.compile(r"(?:HR|NDCG)@([1-9][0-9]{0,5})")


class Metric(NamedTuple):
    """HR or NDCG of lists of one length. Example: `Metric.parse("unmasked.NDCG@10").k`"""

    figure: str
    """HR@k or NDCG@k."""
    k: int
    """Length of the lists."""
    masked: bool
    """Whether items of the history do not compete."""

    @classmethod
    def parse(cls, name: str) -> "Metric":
        """The metric of this name.

        Raises:
            ValueError: "--train.metric is NDCG; ..."
        """
        figure = name.removeprefix(UNMASKED)
        match = FIGURE.fullmatch(figure)
        if match is None:
            raise ValueError(
                f"--train.metric is {name[:60]}; it must be HR@K or NDCG@K, or one of these with {UNMASKED} before it, "
                "for example NDCG@10 or unmasked.HR@50"
            )
        return cls(figure, int(match[1]), figure == name)
