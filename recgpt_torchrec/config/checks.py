"""Range checks of options: the message names the option, what it is, and what it may be."""


def at_least(option: str, value: float, least: float) -> None:
    """Raise a `ValueError` that names the option, unless `value` is a finite number not below `least`."""
    if not least <= value < float("inf"):
        raise ValueError(f"{option} is {value}; it must be at least {least}")


def within(option: str, value: float, least: float, most: float, meaning: str) -> None:
    """Raise a `ValueError` that names the option and says its `meaning`, unless `value` is `least` to `most`."""
    if not least <= value <= most:
        raise ValueError(f"{option} is {value}; {meaning}")
