"""Submits several stages to Slurm at once, each of which waits until those before it have ended well.

    python -m recgpt_torchrec.launch.flow configs/slurm/flow.yaml --dry_run

The file has a list `jobs`: `run` is a stage with its options, `after` the names of the jobs it waits for (the one
before it by default), the rest are options of `launch.sbatch`; `defaults` holds those of all jobs. If a job fails for
good, Slurm cancels those that wait for it. Submit the file again: what is complete ends at once, the rest resumes.
"""

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from recgpt_torchrec.errors import REFUSED, InputError
from recgpt_torchrec.launch.sbatch import Job, write_script


@dataclass(frozen=True)
class Step:
    """A job of a flow, and the names of those that it waits for."""

    job: Job
    after: tuple[str, ...]


def read_flow(path: Path | str) -> list[Step]:
    """Read the jobs of a flow, in the order of the file.

    Raises:
        InputError: what cannot be used, with file and job.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), list) or not content["jobs"]:
        raise InputError(f"{path} has no list 'jobs'; see configs/slurm/flow.yaml")
    if unknown := set(content) - {"jobs", "defaults"}:
        raise InputError(f"{path}: '{min(unknown)}' is neither 'jobs' nor 'defaults'")
    steps: list[Step] = []
    for number, entry in enumerate(content["jobs"], 1):
        place = f"{path}, job {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("run"), str):
            raise InputError(f"{place} has no 'run', as in run: pretrain --data data --output runs/first")
        job = _read_job({**(content.get("defaults") or {}), **entry}, place)
        earlier = [step.job.job_name for step in steps]
        after = entry.get("after", earlier[-1:])
        after = tuple([after] if isinstance(after, str) else after)
        if missing := set(after) - set(earlier):
            raise InputError(f"{place} is after '{min(missing)}', which is no job before it")
        if job.job_name in earlier:
            raise InputError(f"{place} is the second with the name '{job.job_name}'; give it a 'name' of its own")
        steps.append(Step(job, after))
    return steps


def _read_job(options: dict[str, Any], place: str) -> Job:
    known = {each.name: each for each in fields(Job)}
    values: dict[str, Any] = {"words": tuple(shlex.split(options["run"]))}
    for name, value in options.items():
        if name in ("run", "after"):
            continue
        if name not in known or name == "words":
            raise InputError(f"{place} has no option '{name}'; python -m recgpt_torchrec.launch.sbatch --help has them")
        if "tuple" in str(known[name].type):
            value = tuple(map(str, value)) if isinstance(value, list) else (str(value),)
        elif known[name].type is not int:
            value = str(value)
        elif not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{place}: '{name}' is {value!r}; a whole number is needed")
        values[name] = value
    try:
        return Job(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def submit(steps: list[Step]) -> dict[str, str]:
    """Submit all jobs; returns Slurm's ids by name.

    Raises:
        InputError: sbatch refused one; those before it are cancelled.
    """
    ids: dict[str, str] = {}
    for step in steps:
        folder = Path(step.job.log).parent
        if "%" not in str(folder):
            folder.mkdir(parents=True, exist_ok=True)  # without it Slurm ends the job, and says so nowhere
        try:
            done = subprocess.run(
                ["sbatch", "--parsable", *_waiting(step, steps, ids)],
                input=write_script(step.job),
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise InputError("there is no sbatch on this machine; submit where Slurm's commands are") from None
        if done.returncode:
            if ids:
                subprocess.run(["scancel", *ids.values()])
            raise InputError(f"sbatch refused {step.job.job_name}, and nothing is submitted: {done.stderr.strip()}")
        ids[step.job.job_name] = done.stdout.strip().partition(";")[0]
    return ids


def _waiting(step: Step, steps: list[Step], ids: dict[str, str]) -> list[str]:
    """Options of sbatch that make a job wait; of two arrays with the same indices a task waits for its own."""
    if not step.after:
        return []
    arrays = {each.job.job_name: each.job.array for each in steps}
    kinds = {
        name: "aftercorr" if step.job.array and arrays[name] == step.job.array else "afterok" for name in step.after
    }
    rules = ",".join(f"{kinds[name]}:{ids[name]}" for name in step.after)
    return [f"--dependency={rules}", "--kill-on-invalid-dep=yes"]


def main(arguments: list[str] | None = None) -> int:
    """Submit the flow of a file, and print the jobs' ids; returns the exit status."""
    parser = argparse.ArgumentParser(prog="recgpt_torchrec.launch.flow", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="YAML file of the jobs")
    parser.add_argument("--dry_run", action="store_true", help="print the scripts instead")
    options = parser.parse_args(arguments)
    try:
        steps = read_flow(options.file)
        if options.dry_run:
            ids = {step.job.job_name: f"<{step.job.job_name}>" for step in steps}
            for step in steps:
                print(" ".join(["# sbatch", *_waiting(step, steps, ids)]), write_script(step.job), sep="\n")
            return 0
        ids = submit(steps)
    except InputError as error:
        print(f"recgpt_torchrec.launch.flow: {error}", file=sys.stderr)
        return REFUSED
    for step in steps:
        waits = f" after {', '.join(f'{name} ({ids[name]})' for name in step.after)}" if step.after else ""
        print(f"{ids[step.job.job_name]:>10}  {step.job.job_name}{waits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
