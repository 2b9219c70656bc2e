"""Writes the sbatch script of a stage: one homogeneous Slurm job, one task per node, without torchx.

    python -m recgpt_torchrec.launch.sbatch --nodes 2 --gpus 8 --processes 8 -- pretrain --data D --output R | sbatch

The script saves and requeues itself before its time limit and when it is preempted, resumes after the loss of a node,
and is not requeued if a stage refused its options. `launch.flow` submits several stages that wait for each other.
"""

import argparse
import shlex
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.errors import REFUSED, STOPPED, InputError

TASK = "{task}"
"""Stands in a stage's options for the index of an array's task."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage as a Slurm job; 0 and empty mean what the partition or the site has by default."""

    words: tuple[str, ...]
    """Stage and its options, as after `recgpt`. `{task}` stands for the index of an array's task."""
    name: str = ""
    """Name of the job, that of the stage by default."""
    nodes: int = 1
    """Number of nodes."""
    processes: int = 1
    """Processes per node: one per GPU."""
    cpus: int = 0
    """CPU cores per node; 0: two per process."""
    memory_mb: int = 0
    """Memory per node in MB."""
    gpus: int = 0
    """GPUs per node."""
    time: str = ""
    """Time limit of one start, as in 12:00:00; a run that needs longer saves before it and is requeued."""
    partition: str = ""
    """Partition."""
    account: str = ""
    """Account that is charged."""
    array: str = ""
    """Indices of an array, as in 0-3: one job for each."""
    log: str = ""
    """File of the job's output, %x its name and %j its id; %x-%j.out by default, of an array %x-%A_%a.out."""
    signal_seconds: int = 120
    """How long before the time limit the job is asked to save; longer than its slowest step and checkpoint take."""
    requeues: int = 3
    """After how many starts a job that failed is given up; one that saved after a signal is always requeued."""
    max_restarts: int = 0
    """How often torchrun restarts the processes on the same nodes when one fails, before the job counts as failed."""
    interface: str = ""
    """Network interface for NCCL and gloo, as in ib0, where nodes have several."""
    numa_binding: Literal["", "node", "socket", "exclusive", "core-complex"] = ""
    """Binds each process to the cores near its GPU (torchrun's --numa-binding); without GPUs leave it out."""
    container: str = ""
    """Container image with this project: an image file, or for pyxis an image of a registry."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the container."""
    mounts: tuple[str, ...] = ()
    """Folders that a container sees, as in /data:/data."""
    environment: tuple[str, ...] = ()
    """Environment variables, as in OMP_NUM_THREADS=4."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, as in --qos=high, --constraint=a100, --exclusive."""
    python: str = field(default_factory=lambda: sys.executable)
    """Interpreter; where it does not exist, and in a container, python3."""

    def __post_init__(self) -> None:
        """Check what cannot work.

        Raises:
            InputError: with the option that mends it.
        """
        stage = self.words[0] if self.words else ""
        if stage not in STAGES:
            raise InputError(f"'{stage}' is not a stage; give one of {', '.join(STAGES)} with its options after --")
        for name in ("nodes", "processes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if any("=" not in variable for variable in self.environment):
            raise InputError(f"environment is {', '.join(self.environment)}; give each variable as NAME=VALUE")
        for name in ("numa_binding", "container_runtime"):
            allowed = get_args({each.name: each.type for each in fields(self)}[name])
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is '{getattr(self, name)}'; give one of {', '.join(filter(None, allowed))}")
        if TASK in " ".join(self.words) and not self.array:
            raise InputError(f"{TASK} stands for the index of an array's task, but array is not set, as in 0-3")

    @property
    def job_name(self) -> str:
        """The name that Slurm shows."""
        return self.name or self.words[0]


def write_script(job: Job) -> str:
    """The text of the script, for `sbatch FILE` or `sbatch < FILE`."""
    options = {
        "job-name": job.job_name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus or 2 * job.processes,
        "mem": f"{job.memory_mb}M" if job.memory_mb else "",
        "gpus-per-node": job.gpus or "",
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "array": job.array,
        "output": job.log or ("%x-%A_%a.out" if job.array else "%x-%j.out"),
        "signal": f"B:USR1@{job.signal_seconds}",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value != ""]
    lines += ["--requeue", "--open-mode=append", *job.sbatch]
    exports = [f"export {name}={shlex.quote(value)}" for name, _, value in (v.partition("=") for v in job.environment)]
    network = f"export NCCL_SOCKET_IFNAME={job.interface} GLOO_SOCKET_IFNAME={job.interface}"
    exports.append(network if job.interface else "# If nodes have several networks: --interface, for NCCL and gloo.")
    return _SCRIPT.format(
        stage=job.words[0],
        size=f"{job.nodes} x {job.processes}",
        options="\n".join(f"#SBATCH {line}" for line in lines),
        exports="\n".join(exports),
        python=shlex.quote(job.python if not job.container else "python3"),
        srun=" ".join(["srun --ntasks-per-node=1 --kill-on-bad-exit=0", *_container(job)]),
        torchrun=" ".join(
            [
                f"--nproc_per_node {job.processes} --max_restarts {job.max_restarts}",
                *([f"--numa_binding {job.numa_binding}"] if job.numa_binding else []),
            ]
        ),
        words=" ".join([f"-m recgpt_torchrec.{job.words[0]}", *map(_quote, job.words[1:])]),
        stopped=STOPPED,
        refused=REFUSED,
        requeues=job.requeues,
    )


def _container(job: Job) -> list[str]:
    """The words between srun's options and the interpreter."""
    if not job.container:
        return []
    if job.container_runtime == "apptainer":
        binds = [word for mount in job.mounts for word in ("--bind", shlex.quote(mount))]
        return ["apptainer exec", *(["--nv"] if job.gpus else []), *binds, shlex.quote(job.container)]
    mounts = [f"--container-mounts={shlex.quote(','.join(job.mounts))}"] if job.mounts else []
    return [f"--container-image={shlex.quote(job.container)}", *mounts]


def _quote(word: str) -> str:
    """A word for the shell, in which the index of an array's task is put in."""
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in word.split(TASK)) or "''"


# The job is requeued by its own script, after the ranks have saved; `squeue` says RUNNING unless somebody cancelled it.
_SCRIPT = """#!/bin/bash
# {stage} on {size} processes, one task per node. Written by recgpt_torchrec.launch.sbatch.
{options}

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since Slurm 22.05 srun does not inherit it
export PYTHONUNBUFFERED=1
{exports}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
python={python}
[ -x "$python" ] || python=python3

# Slurm signals this script before the time limit; srun passes SIGUSR1 on to the launchers, and they to the ranks.
step=
trap '[ -z "$step" ] || kill -USR1 "$step"' USR1 TERM
{srun} \\
    "$python" -m recgpt_torchrec.launch.node {torchrun} \\
    --nnodes "$SLURM_JOB_NUM_NODES" --rdzv_backend c10d --rdzv_endpoint "$first:0" \\
    --rdzv_id "$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}" \\
    {words} &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a signal ends `wait` before srun has ended
wait "$step"
status=$?

job=$SLURM_JOB_ID
[ -z "${{SLURM_ARRAY_TASK_ID:-}}" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID # this task, not the array
if [ "$(squeue --noheader --jobs "$job" --format %T)" = RUNNING ]; then # not cancelled meanwhile
    case $status in
        0 | {refused}) ;; # complete; or refused: another start does not help
        {stopped}) scontrol requeue "$job" ;;
        *) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {requeues} ] || scontrol requeue "$job" ;;
    esac
fi
exit "$status"
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a job to a parser, except for its words."""
    import inspect
    import re

    text = dict(re.findall(r"^    (\w+): .*\n    \"\"\"(.*)\"\"\"$", inspect.getsource(Job), re.MULTILINE))
    for each in fields(Job):
        if each.name == "words":
            continue
        default: Any = each.default if each.default is not MISSING else ""
        more: dict[str, Any] = {"action": "append"} if isinstance(default, tuple) else {"type": type(default)}
        parser.add_argument(
            f"--{each.name}", help=text[each.name].replace("%", "%%"), metavar=each.name.upper(), **more
        )


def main(arguments: list[str] | None = None) -> int:
    """Print the script of the job that the command line describes; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="recgpt_torchrec.launch.sbatch", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser)
    options = {name: value for name, value in vars(parser.parse_args(words[:place])).items() if value is not None}
    lists = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    try:
        print(write_script(Job(words=tuple(words[place + 1 :]), **{**options, **lists})), end="")
    except InputError as error:
        print(f"recgpt_torchrec.launch.sbatch: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
