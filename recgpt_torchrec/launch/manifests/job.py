"""What every kind of job is written from: the stage's words, and what each node gets."""

from dataclasses import dataclass
from typing import NamedTuple

from recgpt_torchrec.config.launch.manifest import Manifest
from recgpt_torchrec.launch.resources import CPUS_PER_PROCESS, count_resources
from recgpt_torchrec.texts.words import count


class Share(NamedTuple):
    """What each node gets."""

    cores: float
    memory_gib: float | None
    """None: what the partition gives."""
    counted: str
    """How it was counted, in a sentence."""


@dataclass(frozen=True)
class Job:
    """A stage as a job."""

    options: Manifest
    words: list[str]
    """Options of the stage."""
    share: Share
    required: tuple[str, ...] = ()
    """Files and folders on volumes that the stage reads."""
    data: str | None = None
    """Folder that --copy_data is copied to."""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.options.command[0]

    @property
    def about(self) -> list[str]:
        """What the job is and gets, as lines of comment."""
        options = self.options
        size = f"{count(options.nodes, 'node')} of {count(options.processes_per_node, 'process', 'processes')}"
        return [
            f"# {self.stage} on {size}, written by recgpt manifest --kind {options.kind}",
            f"# {' '.join(self.share.counted.split())}",
        ]

    @property
    def launcher_options(self) -> list[str]:
        """Options of the launcher that are the same on every kind of cluster."""
        options = self.options
        words = ["--nproc_per_node", str(options.processes_per_node), "--max_restarts", str(options.max_restarts)]
        return words + (["--numa_binding", options.numa_binding] if options.numa_binding else [])


def count_share(options: Manifest, words: list[str], data: str | None) -> Share:
    """What each node gets: what is asked for, or what the stage needs as planned, or a default of the kind of job.

    Args:
        options: of the job.
        words: options of the stage.
        data: the stage's dataset; None: it has none.
    """
    processes, on_slurm = options.processes_per_node, options.kind == "slurm"
    if options.memory is not None:
        cores = options.cpus or CPUS_PER_PROCESS * processes
        return Share(cores, options.memory, f"Each node gets {cores:g} cores and {options.memory:g} GiB.")
    if options.copy_data is not None:
        words, data = [*words, "--data", options.copy_data], options.copy_data
    needed = count_resources(options.command[0], words, options.nodes, processes, options.gpus, data)
    cores, amount, memory = options.cpus or needed.cpu, "the memory that the partition gives", None
    if needed.is_planned or not on_slurm:
        memory = needed.memory_mb / 1024 + (0 if on_slurm else options.shm)
        amount = f"{memory:,.4g} GiB" + ("" if on_slurm else f", {options.shm:g} of them for --shm")
    return Share(cores, memory, f"Each node gets {cores:g} cores and {amount}, {needed.how}; --memory sets it.")
