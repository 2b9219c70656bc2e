"""Moments that divide a log by time, as users write them: a number, a date or a share of the interactions."""

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation

MOMENTS = (
    "a number in the log's unit of time, or an ISO date or date-time such as 2024-05-01 (UTC unless it has an offset)"
)
FORMS = (
    "a number in the log's unit of time, an ISO date or date-time such as 2024-05-01 (seconds since 1970, UTC unless "
    "it has an offset), or a share of the interactions such as 90%"
)


def parse_moment(option: str, text: str, forms: str = MOMENTS) -> tuple[Decimal, bool]:
    """Parse a number, or an ISO date or date-time, which means seconds since 1970 and UTC unless it has an offset.

    `forms` says in messages what it may be.

    Returns:
        The number, and whether it was a date.

    Raises:
        ValueError: it is neither, or beyond 64 bits.
    """
    stripped, is_date = text.strip(), False
    try:
        number = Decimal(stripped)
    except InvalidOperation:
        is_date = True
        try:
            moment = datetime.fromisoformat(stripped)
        except ValueError:
            raise ValueError(f"{option} is {text}; it must be {forms}") from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
        number = Decimal(since.days * 86_400 + since.seconds) + Decimal(since.microseconds) / 1_000_000
    if not number.is_finite() or abs(number) >= 2**63:
        raise ValueError(f"{option} is {text}; it must be {forms}")
    return number, is_date


@dataclass(frozen=True, order=True)
class Boundary:
    """A moment: interactions before it are in the earlier part, those at it and after it in the later one."""

    whole: int = 0
    """Time in the log's unit, rounded down; not used with a share."""
    fraction: float = 0.0
    """The rest of the time, at least 0 and less than 1."""
    share: Decimal | None = field(default=None, compare=False)
    """Share of the interactions that lie before the moment, between 0 and 1; None: the time is given."""

    @classmethod
    def parse(cls, option: str, text: str) -> "Boundary":
        """Parse the value of an option.

        Raises:
            ValueError: it is of none of the `FORMS`.
        """
        stripped = text.strip()
        try:
            if stripped.endswith("%"):
                share = Decimal(stripped[:-1]) / 100
                if not 0 < share < 1:
                    raise ValueError(f"{option} is {text}; a share must be more than 0% and less than 100%")
                return cls(share=share)
            number, is_date = parse_moment(option, text, FORMS)
        except InvalidOperation:
            raise ValueError(f"{option} is {text}; it must be {FORMS}") from None
        whole = math.floor(number)
        # The fraction rounds as that of the log's times does, so that a boundary equals the time it is taken from.
        fraction = float(number) - math.floor(float(number)) if not is_date else float(number - whole)
        return cls(whole=whole, fraction=fraction if number != whole else 0.0)

    @property
    def value(self) -> int | float:
        """The time as one number, for messages and records."""
        return self.whole + self.fraction if self.fraction else self.whole
