"""Options of the times that a model reads beside the ids of items."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import within

TimeUnit = Literal["auto", "s", "ms", "us", "ns", "min", "day"]
"""Units of timestamps that options name; auto: by their magnitude."""
MAX_OFFSET = 14
"""Hours that a place's time may be from UTC."""


@dataclass(kw_only=True)
class TimeChoice:
    """What of the times of interactions and requests the decoder's input holds."""

    use: list[Literal["past_gap", "next_gap", "hour", "weekday"]] = field(default_factory=list)
    """past_gap: the time since the interaction before, in buckets of two per octave. next_gap: the time from the entry
    to its request, which is the next interaction in training. hour, weekday: those of the request. With the last three
    the model is told when it is asked, so give evaluations of models without times beside. []: no times are read."""
    utc_offset_hours: float = 0.0
    """Hours from UTC to the local time that hour and weekday are of, -14 to 14."""
    unit: TimeUnit = "auto"
    """Unit of the timestamps of a dataset that does not record it, see prepare --time_unit. auto: by the magnitude of
    the times, where they lie in the years 1990 to 2099."""

    def __post_init__(self) -> None:
        within("--time.utc_offset_hours", self.utc_offset_hours, -MAX_OFFSET, MAX_OFFSET)
        if twice := next((name for name in self.use if self.use.count(name) > 1), None):
            raise ValueError(f"--time.use names {twice} twice; name it once")
        if self.utc_offset_hours and not {"hour", "weekday"} & {*self.use}:
            raise ValueError(
                f"--time.utc_offset_hours is {self.utc_offset_hours}, but --time.use reads neither hour nor weekday; "
                "leave it out"
            )
        if self.unit != "auto" and not self.use:
            raise ValueError(f"--time.unit is {self.unit}, but no times are read; name some with --time.use")
