"""The option `--preset`, which both training stages have."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.fields import changeable


@dataclass(kw_only=True)
class Preset:
    """Where the options come from that are not given."""

    preset: Literal["none", "auto"] = changeable("none")
    """Where options come from that are neither in a file of --config nor on the command line. none: from their
    defaults. auto: some of them from the dataset's statistics, as its manifest records them; the stage begins with a
    line for each, which says why. A run records the values, and by these it is resumed."""
