"""Options of the program doctor: those of pretrain, and the number of ranks."""

from dataclasses import dataclass

from recgpt_torchrec.config.checks import within
from recgpt_torchrec.config.training import Pretrain


@dataclass(kw_only=True)
class Doctor(Pretrain):
    """Look for what would make a run fail, or disappoint: versions, this machine, a dataset, a configuration.

    Nothing is written. Exit status 0 unless a finding is an error.

    Example: recgpt doctor --data data/mine --config configs/beauty.yaml
    """

    data: str | None = None  # type: ignore[assignment]
    """Folder of a dataset, as written by prepare, all of which is read; null: no dataset is looked at."""
    output: str = "."
    """Output folder of a run to come, whose disk is looked at."""
    ranks: int | None = None
    """Number of ranks that the run is going to have on this machine; null: one per GPU, or one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None:
            within("--ranks", self.ranks, 1, 1024)
