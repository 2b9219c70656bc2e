"""The device that a rank computes on, from `--device` and what torch sees; knows nothing of process groups."""

import os

import torch

from recgpt_torchrec.config.device import Device
from recgpt_torchrec.errors import InputError


def choose_device(option: Device) -> torch.device:
    """Choose this rank's device. `auto` is a GPU where torch sees one, else the CPU.

    Each process of a node takes the GPU of its number on the node (LOCAL_RANK).

    Raises:
        InputError: torch sees no GPU, or fewer than the node has processes.
    """
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"--device cuda: torch sees no GPU ({_describe_torch()}); make sure that nvidia-smi lists one and that "
            "torch is a CUDA build, or give --device cpu"
        )
    gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if processes > gpus:
        raise InputError(
            f"{processes} processes on this node, but torch sees {gpus} GPU{'s' * (gpus > 1)} and each process needs "
            f"its own; start {gpus} per node (-j 1x{gpus} on one node), or give --device cpu"
        )
    return torch.device("cuda", local_rank)


def _describe_torch() -> str:
    """What decides whether torch sees a GPU: its build, and the environment."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = "" if hidden is None else f", CUDA_VISIBLE_DEVICES is {hidden!r}"
    return f"torch {torch.__version__} is built for {build}{visible}"
