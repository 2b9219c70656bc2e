"""Program `manifest`: a stage's command line -> a job: a script for Slurm, or YAML for Kubernetes."""

import importlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from recgpt_torchrec import cli
from recgpt_torchrec.config.command_line import CommandLine, did_you_mean
from recgpt_torchrec.config.fields import options as options_of
from recgpt_torchrec.config.launch.manifest import TASK, Manifest
from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.launch.manifests import flow, slurm
from recgpt_torchrec.launch.manifests.job import Job, count_share
from recgpt_torchrec.launch.manifests.places import check_places
from recgpt_torchrec.texts.commands import ONE_PROCESS


def main(config: Manifest) -> None:
    """Check the stage's command line, and write the job."""
    text = make_text(config)
    if config.output is None:
        print(text, end="")
        return
    file = Path(config.output)
    there = file.read_text("utf-8", errors="replace") if file.exists() else None
    if there not in (text, None) and not config.overwrite:
        raise InputError(f"{config.output} is there and differs; give --overwrite true, or another --output")
    file.write_text(text, "utf-8")
    print(f"{'Already there' if there == text else 'Written'}: {config.output}")
    if config.flow is None:
        print(*re.findall(r"^# (Each node .*)", text, re.MULTILINE))
    print(f"Next:    {following(config)} {shlex.quote(config.output)}")


def following(config: Manifest) -> str:
    """The command that takes what was written, without the file."""
    if config.kind != "slurm":
        return "kubectl apply --filename"
    if config.flow is not None:
        return "bash"
    folder = os.path.dirname(config.log or "")  # without it Slurm ends the job, and says so nowhere
    return f"mkdir -p {shlex.quote(folder)} && sbatch" if folder and "%" not in folder else "sbatch"


def make_text(config: Manifest) -> str:
    """The job that a configuration describes, or all jobs of its flow, as text.

    Raises:
        InputError: see `describe_job`.
        SystemExit: see `describe_job`.
    """
    if config.flow is not None:
        entries = flow.read_flow(config.flow)
        jobs = []
        for entry in entries:
            made = cli.make_config(Manifest, entry.place, entry.values)
            try:
                jobs.append(describe_job(made, f"{entry.place}: "))
            except InputError as error:
                raise InputError(f"{entry.place}: {error}") from None
        return flow.write_flow(config.flow, entries, jobs)
    job = describe_job(config)
    if config.kind == "slurm":
        return slurm.write(job)
    objects = importlib.import_module(f"recgpt_torchrec.launch.manifests.{config.kind}").write(job)
    return "\n".join([*job.about, "---\n".join(yaml.safe_dump(each, sort_keys=False, width=10**9) for each in objects)])


def describe_job(config: Manifest, prefix: str = "recgpt ") -> Job:
    """The job of a stage, whose options are parsed as the stage would; files of options are written out in it.

    Args:
        config: of the job.
        prefix: put before the stage's name in messages about its options.

    Raises:
        InputError: the stage, its place, or what it reads and writes cannot work in the job.
        SystemExit: with status 2, an option of the stage is wrong.
    """
    stage, *words = config.command
    if stage not in STAGES or stage == "manifest":
        raise InputError(f"{stage} is not a stage{did_you_mean(stage, STAGES)}")
    options, prog = STAGES[stage].config, f"{prefix}{stage}"
    parsed: Any = cli.parse(options, prog, of_first_task(config, words))
    line = CommandLine.of(options, words)
    values = {option.name: value for option, _, value in line.values}
    if "--config" in line.arguments:  # the file is here, not where the stage runs
        words = write_out(values)
        if cli.parse(options, prog, of_first_task(config, words)) != parsed:
            raise InputError("a file of --config sets a whole group to null; write its options out after --")
    if stage in ONE_PROCESS and config.nodes * config.processes_per_node > 1:
        raise InputError(f"{stage} runs in one process; leave --nodes, --processes and more than one GPU out")
    if values.get("device") == "cuda" and not config.gpus:
        raise InputError("the stage asks for --device cuda, but its nodes get no GPU; give --gpus")
    takes_device = "device" in {option.name for option in options_of(options)}
    if config.gpus and (values.get("device") == "cpu" or not takes_device):
        raise InputError(f"{stage} would leave --gpus {config.gpus} unused; leave --gpus out")
    required = check_places(config, values) if config.kind != "slurm" else ()
    data = values.get("data")
    share = count_share(config, of_first_task(config, words), data if isinstance(data, str) else None)
    return Job(config, words, share, required, data if config.copy_data else None)


def of_first_task(config: Manifest, words: list[str]) -> list[str]:
    """The words of a stage with the first index of an array in the place of `TASK`; without an array as they are."""
    first = re.match(r"\d+", config.array or "")
    return [word.replace(TASK, first[0]) for word in words] if first else words


def write_out(values: dict[str, object]) -> list[str]:
    """Options as words of a command line: of a file, and of the command line, whose values are text already."""
    plain = {None: "null", True: "true", False: "false"}
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            words += [f"--{name}", json.dumps(value)]
        else:
            words.append(f"--{name}={plain[value] if value is None or isinstance(value, bool) else value}")
    return words


if __name__ == "__main__":
    cli.run(Manifest, main, "recgpt_torchrec.manifest")
