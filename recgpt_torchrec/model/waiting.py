"""Whether looking at a value of a tensor makes the host wait for its device."""

import torch

WITHOUT_WAITING = ("cpu",)
"""Types of devices on which it does not."""


def waits(device: torch.device) -> bool:
    """Whether the host would wait, so that what is on the device is better not looked at in every step."""
    return device.type not in WITHOUT_WAITING
