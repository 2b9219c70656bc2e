"""What a run on a folder of days has trained: written after each day.

OUTPUT/trained_days.json   the days that are trained
OUTPUT/days/0003/          the run of a day; checkpoints are kept of the newest trained day
"""

import os
from dataclasses import asdict, dataclass, field

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import TRAINED_DAYS
from recgpt_torchrec.storage.typed import make_typed

VERSION = 1


@dataclass(kw_only=True)
class TrainedDay:
    """A day that is trained."""

    histories: str
    """Fingerprint of the day's histories."""
    targets: int
    """Number of its new targets."""
    steps: int
    """Optimizer steps of its run."""


@dataclass(kw_only=True)
class TrainedDays:
    """The contents of trained_days.json."""

    version: int = VERSION
    days: list[TrainedDay] = field(default_factory=list)
    """In order; the first is day 1."""

    @classmethod
    def read(cls, output: str) -> "TrainedDays | None":
        """Those of the run in `output`; None: it has not trained a day.

        Raises:
            InputError: the file is damaged.
        """
        path = os.path.join(output, TRAINED_DAYS)
        values = storage.read_json(path)
        try:
            if values is not None and values.get("version") != VERSION:
                raise ValueError(f"its version is {str(values.get('version'))[:20]}, not {VERSION}")
            return None if values is None else make_typed(cls, values, others=True)
        except ValueError as error:
            raise storage.damaged(path, error) from None

    def write(self, output: str) -> None:
        """Write trained_days.json in the folder `output`, in one step."""
        storage.write_json(os.path.join(output, TRAINED_DAYS), asdict(self))
