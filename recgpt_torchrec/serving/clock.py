"""Times of a request in the unit of a dataset's timestamps."""

from datetime import UTC, datetime

from recgpt_torchrec.config.boundaries import parse_moment
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import TIMES, Inputs
from recgpt_torchrec.data.inputs.time_units import choose_request_time, to_units
from recgpt_torchrec.data.inputs.times import guess_unit
from recgpt_torchrec.data.reading.footers import time_range
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.serving.requests import Time


class Clock:
    """Tells times of requests in the dataset's unit.

    Args:
        dataset: whose unit it is.
        inputs: of the model.
        checkpoint: its folder, for messages.
    """

    def __init__(self, dataset: Dataset, inputs: Inputs, checkpoint: str) -> None:
        self.dataset, self.inputs, self.checkpoint = dataset, inputs, checkpoint
        self.is_read = inputs.reads(*TIMES)
        """Whether the model reads times."""
        self.newest = choose_request_time(None, inputs, checkpoint, dataset) if self.is_read else None
        """The newest time of the dataset, that of a request that names none; None: the model reads no times."""
        bounds = None if self.is_read else time_range(dataset)
        guessed = None if bounds is None else guess_unit(*bounds)
        self._unit = inputs.time_unit if self.is_read else dataset.manifest.time_unit or guessed

    def time_of_request(self, time: Time | None) -> int | None:
        """The time of a request; None: the model reads none.

        Raises:
            InputError: a time is given to a model that reads none, or cannot be told.
        """
        if time is None:
            return self.newest
        if not self.is_read:
            raise InputError(f"time {time}: the model of {self.checkpoint} reads no times; leave it out")
        return self.in_units(time)

    def in_units(self, time: Time) -> int:
        """A time in the dataset's unit.

        Raises:
            InputError: it is no time, or its unit is not known.
        """
        if isinstance(time, int) and not isinstance(time, bool) and abs(time) < 2**63:
            return time
        if isinstance(time, datetime):
            time = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).isoformat()
        try:
            moment, is_date = parse_moment("time", str(time))
        except ValueError as error:
            raise InputError(str(error)) from None
        if not is_date:
            return int(moment)
        if self._unit is None:
            raise InputError(
                f"time {time}: the unit of the times of {self.dataset.path} is not known; give numbers in that unit"
            )
        return to_units(moment, self._unit)
