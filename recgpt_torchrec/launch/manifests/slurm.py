"""A script for sbatch: one homogeneous Slurm job, with a task per node.

It saves and requeues itself before its time limit and when it is preempted, resumes after the loss of a node, and is
not requeued if the stage refused its options.
"""

import math
import shlex
import sys

from recgpt_torchrec.config.launch.manifest import TASK, Manifest
from recgpt_torchrec.errors import REFUSED, STOPPED
from recgpt_torchrec.launch.manifests.job import Job


def write(job: Job) -> str:
    """The text of the script, for `sbatch FILE` or `sbatch < FILE`."""
    options, memory = job.options, job.share.memory_gib
    values = {
        "job-name": options.job_name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": math.ceil(job.share.cores),
        "mem": memory and f"{round(memory * 1024)}M",
        "gpus-per-node": options.gpus or None,
        "time": options.time,
        "partition": options.queue,
        "account": options.account,
        "array": options.array,
        "output": options.log or ("%x-%A_%a.out" if options.array else "%x-%j.out"),
        "signal": f"B:USR1@{options.grace_seconds}",
        "open-mode": "append",
    }
    lines = [f"{name}={value}" for name, value in values.items() if value is not None]
    lines += ["requeue", *(each.removeprefix("--") for each in options.sbatch)]
    return _SCRIPT.format(
        about="\n".join(job.about),
        options="\n".join(f"#SBATCH {shlex.quote(f'--{line}')}" for line in lines),
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in options.environment.items()),
        python="python3" if options.image else shlex.quote(sys.executable),
        srun=" ".join(["srun --ntasks-per-node=1 --kill-on-bad-exit=0", *_container(options)]),
        launcher=" ".join(job.launcher_options),
        port=options.port or 0,
        words=" ".join([f"-m recgpt_torchrec.{job.stage}", *map(_quote, job.words)]),
        stopped=STOPPED,
        refused=REFUSED,
        retries=options.retries,
    )


def _container(options: Manifest) -> list[str]:
    """The words between srun's options and the interpreter."""
    if options.image is None:
        return []
    if options.container_runtime == "apptainer":
        binds = [word for volume in options.volumes for word in ("--bind", shlex.quote(volume))]
        return ["apptainer exec", *(["--nv"] if options.gpus else []), *binds, shlex.quote(options.image)]
    mounts = [f"--container-mounts={shlex.quote(','.join(options.volumes))}"] if options.volumes else []
    return [f"--container-image={shlex.quote(options.image)}", *mounts]


def _quote(word: str) -> str:
    """A word for the shell, in which the index of an array's task is put in."""
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in word.split(TASK)) or "''"


# The job is requeued by its own script, after the ranks have saved; `squeue` says RUNNING unless somebody cancelled it.
_SCRIPT = """#!/bin/bash
{about}
{options}

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since Slurm 22.05 srun does not inherit it
export PYTHONUNBUFFERED=1
{exports}first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
python={python}
[ -x "$python" ] || python=python3

# Slurm signals this script before the time limit; srun passes SIGUSR1 on to the launchers, and they to the ranks.
step=
trap '[ -z "$step" ] || kill -USR1 "$step"' USR1 TERM
{srun} \\
    "$python" -m recgpt_torchrec.launch.node {launcher} \\
    --nnodes "$SLURM_JOB_NUM_NODES" --rdzv_backend c10d --rdzv_endpoint "$first:{port}" \\
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
        *) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {retries} ] || scontrol requeue "$job" ;;
    esac
fi
exit "$status"
"""
