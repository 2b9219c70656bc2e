"""Several Slurm jobs that wait for each other: read from a file, written as a script that submits them all at once.

The file has a list `jobs`: `run` is a stage with its options, `after` the names of the jobs it waits for (the one
before it by default), the rest are options of the job; `defaults` holds those of all jobs. If a job fails for good,
Slurm cancels those that wait for it. Submit them again: what is complete ends at once, the rest resumes.
"""

import os
import shlex
from typing import Any, NamedTuple

from recgpt_torchrec.config.command_line import describe_type, fits, values_of
from recgpt_torchrec.config.fields import options
from recgpt_torchrec.config.launch.manifest import Manifest
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.launch.manifests import slurm
from recgpt_torchrec.launch.manifests.job import Job

NO_OPTIONS = ("kind", "command", "flow", "output", "overwrite")
"""Options of the program that are not a job's."""


class Entry(NamedTuple):
    """A job as the file has it."""

    place: str
    """File and number, for messages."""
    values: dict[str, Any]
    """Its options."""
    after: list[str] | None
    """Names of the jobs it waits for; None: the one before it."""


def read_flow(path: str) -> list[Entry]:
    """Read the jobs of a flow, in the order of the file; their options are checked when they are parsed.

    Raises:
        InputError: what cannot be used, with file and job.
    """
    try:
        content = values_of(path)
    except ValueError as error:
        raise InputError(str(error).replace("--config", "--flow", 1)) from None
    jobs, defaults = content.get("jobs"), content.get("defaults") or {}
    if not isinstance(jobs, list) or not jobs or not isinstance(defaults, dict):
        raise InputError(f"{path} has no list 'jobs', or 'defaults' are no options; see configs/slurm/flow.yaml")
    if unknown := set(content) - {"jobs", "defaults"}:
        raise InputError(f"{path}: '{min(unknown)}' is neither 'jobs' nor 'defaults'")
    return [_read_entry(f"{path}, job {number}", defaults, entry) for number, entry in enumerate(jobs, 1)]


def _read_entry(place: str, defaults: dict[str, Any], entry: Any) -> Entry:
    if not isinstance(entry, dict) or not isinstance(entry.get("run"), str):
        raise InputError(f"{place} has no 'run', as in run: pretrain --data data --output runs/first")
    known = {option.name: option for option in options(Manifest)}
    values: dict[str, Any] = {**defaults, **entry}
    run, after = values.pop("run"), values.pop("after", None)
    try:
        command = shlex.split(run)
    except ValueError as error:
        raise InputError(f"{place}: 'run' cannot be read: {error}") from None
    for name, value in values.items():
        if name in NO_OPTIONS:
            raise InputError(f"{place} has '{name}', which is no option of a job in a flow; leave it out")
        if name in known and known[name].is_list and not isinstance(value, list):
            values[name] = value = [value]
        if name in known and not fits(known[name].type, value):  # 12:00:00 without quotes is a number in YAML
            raise InputError(f"{place}: '{name}' is {value!r}; it must be {describe_type(known[name].type)}")
    after = after if after is None or isinstance(after, list) else [after]
    return Entry(place, {"kind": "slurm", **values, "command": command}, after)


def write_flow(path: str, entries: list[Entry], jobs: list[Job]) -> str:
    """The text of a script that submits all jobs, or none.

    Args:
        path: of the flow, for the script's first line.
        entries: of the file.
        jobs: of the entries.

    Raises:
        InputError: two jobs have one name, or one waits for a job that is not before it.
    """
    before: dict[str, Job] = {}
    parts = []
    for entry, job in zip(entries, jobs, strict=True):
        after = [*before][-1:] if entry.after is None else entry.after
        name = job.options.job_name
        if missing := [each for each in after if each not in before]:
            raise InputError(f"{entry.place} is after '{missing[0]}', which is no job before it")
        if name in before:
            raise InputError(f"{entry.place} is the second with the name '{name}'; give it a 'name' of its own")
        what = name + (f" after {', '.join(after)}" if after else "")
        words = ["submit", shlex.quote(what), *_waiting(job, after, before)]
        parts.append(f"\n{' '.join(words)} <<'END_OF_JOB'\n{slurm.write(job)}END_OF_JOB\n")
        before[name] = job
    folders = sorted({os.path.dirname(job.options.log or "") for job in jobs})
    made = "".join(f"mkdir -p {shlex.quote(each)}\n" for each in folders if each and "%" not in each)
    return _SUBMIT.format(count=len(jobs), path=path, folders=made) + "".join(parts)


def _waiting(job: Job, after: list[str], before: dict[str, Job]) -> list[str]:
    """Options of sbatch that make a job wait; of two arrays with the same indices a task waits for its own."""
    array, names = job.options.array, list(before)
    rules = [
        f"{'aftercorr' if array and before[name].options.array == array else 'afterok'}:${{ids[{names.index(name)}]}}"
        for name in after
    ]
    return [f'--dependency="{",".join(rules)}"', "--kill-on-invalid-dep=yes"] if rules else []


# Without the folder of its log Slurm ends a job, and says so nowhere.
_SUBMIT = """#!/bin/bash
# Submits the {count} jobs of {path}, or none; written by recgpt manifest --kind slurm
ids=()
submit() {{ # what it is, options of sbatch; the job's script is standard input
    local what=$1 id
    shift
    if ! id=$(sbatch --parsable "$@"); then
        [ "${{#ids[@]}}" = 0 ] || scancel "${{ids[@]}}"
        echo "sbatch refused $what, and nothing is submitted" >&2
        exit 2
    fi
    ids+=("${{id%%;*}}")
    printf '%10s  %s\\n' "${{ids[-1]}}" "$what"
}}
{folders}"""
