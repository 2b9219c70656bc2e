"""What a launcher's environment says of this process: which rank it is, and of how many. Checked in one place."""

import os
from typing import NamedTuple

from recgpt_torchrec.errors import InputError

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets beside WORLD_SIZE. Without LOCAL_RANK and LOCAL_WORLD_SIZE they are found from host names."""
OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""In which variable launchers that do not set WORLD_SIZE tell the number of processes."""


class Launched(NamedTuple):
    """A rank of a job, and where the ranks meet."""

    rank: int
    world_size: int
    host: str
    port: int


def read_launcher() -> Launched | None:
    """This process as a launcher has started it; None: none has.

    Raises:
        InputError: a launcher has started several processes and does not tell them of each other, or not enough, or a
            number cannot be right.
    """
    if "WORLD_SIZE" in os.environ:
        if missing := [name for name in NEEDED if not os.environ.get(name)]:
            raise InputError(
                f"WORLD_SIZE is set, but not {' and '.join(missing)}; start the stage with torchrun, which sets all of "
                "them, or unset WORLD_SIZE to run one process"
            )
        size = _read_number("WORLD_SIZE", 1)
        if "LOCAL_WORLD_SIZE" in os.environ:
            _read_number("LOCAL_WORLD_SIZE", 1, size, "WORLD_SIZE")
        if "LOCAL_RANK" in os.environ:
            _read_number("LOCAL_RANK", 0, size - 1, "WORLD_SIZE")
        rank = _read_number("RANK", 0, size - 1, "WORLD_SIZE")
        port = _read_number("MASTER_PORT", 0 if size == 1 else 1, 65_535)  # 0: one that is free
        return Launched(rank, size, os.environ["MASTER_ADDR"], port)
    if started := _find_other_launcher():
        raise InputError(
            f"{started}, but without WORLD_SIZE each would do all the work; start torchrun, once per node (srun "
            "--ntasks-per-node=1 torchrun ...), or set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT"
        )
    return None


def _find_other_launcher() -> str | None:
    """Which launcher that sets no WORLD_SIZE started several processes, in words; None: none did."""
    for name, launcher in OTHER_LAUNCHERS.items():
        if (count := os.environ.get(name, "1")) not in ("", "0", "1"):
            return f"{launcher} started {count} processes ({name})"
    return None


def _read_number(name: str, least: int, most: int | None = None, bound: str = "") -> int:
    """A whole number of the environment, from `least` to `most`, which follows from the variable `bound`."""
    text = os.environ[name].strip()
    if text.isascii() and text.isdigit() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    limits = f"at least {least}" if most is None else f"from {least} to {most}"
    given = f", since {bound} is {os.environ[bound]}" if bound else ""
    raise InputError(
        f"{name} is {text!r} in the environment; it must be a whole number, {limits}{given}. Start the stage with "
        "torchrun, which sets it, or unset WORLD_SIZE to run one process"
    )


def own_rank() -> int:
    """This process's rank among those that a launcher says it started; 0 where it is alone. Checks nothing."""
    rank = os.environ.get("RANK", "").strip()
    return int(rank) if started_processes() > 1 and rank.isascii() and rank.isdigit() else 0


def started_processes() -> int:
    """Number of processes that a launcher says it started; 1 where none says so. Checks nothing."""
    count = os.environ.get("WORLD_SIZE", "").strip()
    return int(count) if "RANK" in os.environ and count.isascii() and count.isdigit() else 1


def find_processes() -> str | None:
    """What started several processes, in words; None: nothing did. Checks nothing."""
    count = started_processes()
    return f"WORLD_SIZE is {count}" if count > 1 else _find_other_launcher()
