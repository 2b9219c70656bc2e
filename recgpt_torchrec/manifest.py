"""Program `manifest`: a stage's command line -> a job for Kubernetes, as YAML."""

import importlib
import json
import os
import posixpath
from collections.abc import Iterator
from typing import Any

import yaml

from recgpt_torchrec import cli
from recgpt_torchrec.config.command_line import CommandLine, did_you_mean
from recgpt_torchrec.config.fields import options as options_of
from recgpt_torchrec.config.launch.manifest import SCRATCH, Manifest
from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.launch.manifests.pod import Job
from recgpt_torchrec.texts.commands import ONE_PROCESS

READ = {
    "data",
    "checkpoint",
    "export",
    "input",
    "initial",
    "items",
    "users",
    "vocabulary",
    "previous",
    "since",
    "deltas",
}
READ |= {"allow", "deny", "runs", "evaluations", "validation_input", "test_input", "compare", "pretrained"}
"""Options of stages that name files and folders which are read."""
WRITTEN = {"output", "scratch"}
"""Options that name files and folders which are written."""


def main(config: Manifest) -> None:
    """Check the stage's command line, and write the job."""
    job = describe_job(config)
    objects = importlib.import_module(f"recgpt_torchrec.launch.manifests.{config.kind}").write(job)
    text = "---\n".join(yaml.safe_dump(each, sort_keys=False, width=10**9) for each in objects)
    if config.output is None:
        print(text, end="")
        return
    there = read_text(config.output)
    if there == text:
        print(f"Already there: {config.output}")
    elif there is not None and not config.overwrite:
        raise InputError(f"{config.output} is there and differs; give --overwrite true, or another --output")
    else:
        with open(config.output, "w", encoding="utf-8") as file:
            file.write(text)
        print(f"Written: {config.output}")
    print(f"Next:    kubectl apply --filename {config.output}")


def describe_job(config: Manifest) -> Job:
    """The job of a stage, whose options are parsed as the stage would; files of options are written out in it.

    Raises:
        InputError: the stage, its place, or what it reads and writes cannot work in the job.
        SystemExit: with status 2, an option of the stage is wrong.
    """
    stage, *words = config.command
    if stage not in STAGES or stage == "manifest":
        raise InputError(f"{stage} is not a stage{did_you_mean(stage, STAGES)}")
    parsed: Any = cli.parse(STAGES[stage].config, f"recgpt {stage}", words)
    line = CommandLine.of(STAGES[stage].config, words)
    values = {option.name: value for option, _, value in line.values}
    if "--config" in line.arguments:  # the file is here, not in the pods
        words = write_out(values)
        if cli.parse(STAGES[stage].config, f"recgpt {stage}", words) != parsed:
            raise InputError("a file of --config sets a whole group to null; write its options out after --")
    if stage in ONE_PROCESS and config.nodes * config.processes_per_node > 1:
        raise InputError(f"{stage} runs in one process; leave --nodes, --processes and more than one GPU out")
    if values.get("device") == "cuda" and not config.gpus:
        raise InputError("the stage asks for --device cuda, but its pods get no GPU; give --gpus")
    takes_device = "device" in {option.name for option in options_of(STAGES[stage].config)}
    if config.gpus and (values.get("device") == "cpu" or not takes_device):
        raise InputError(f"{stage} would leave --gpus {config.gpus} unused; leave --gpus out")
    data = values.get("data")
    if config.copy_data and (not isinstance(data, str) or not is_in(data, SCRATCH) or data.rstrip("/") == SCRATCH):
        raise InputError(f"--copy_data is copied to the stage's --data, which is {data}; give it a folder in {SCRATCH}")
    required = []
    for name, path in paths(values):
        check_place(config, name, path)
        if name in READ and not is_in(path, SCRATCH):
            required.append(path)
    return Job(config, words, sorted(set(required)), data if config.copy_data else None)


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


def paths(values: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the option's name and the path of each file or folder of the pod that a stage names; URIs are left out."""
    for name, value in values.items():
        for path in value if isinstance(value, list) else [value]:
            if name in READ | WRITTEN and isinstance(path, str) and path != "null" and "://" not in path:
                # A pattern is there if its folder is.
                yield name, path.partition("*")[0].rpartition("/")[0] if "*" in path else path


def check_place(config: Manifest, name: str, path: str) -> None:
    """Check that a path is on a volume, which is not only read if the stage writes there.

    Raises:
        InputError: it is not.
    """
    found = [(claim, only_read) for claim, place, only_read in config.mounts if is_in(path, place)]
    if config.scratch is not None and is_in(path, SCRATCH):
        if name == "data" and not config.copy_data:
            raise InputError(f"--data is {path}, which is empty at first; give --copy_data what is copied there")
        if name in ("data", "scratch"):
            return
    if not found:
        raise InputError(
            f"--{name} is {path}, which no volume of the pods holds; mount a claim with --volumes CLAIM:/FOLDER and "
            "give a path in it, or a URI as s3://..."
        )
    if name in WRITTEN and found[-1][1]:
        raise InputError(f"--{name} is {path}, but claim {found[-1][0]} is mounted to be read; leave its :ro out")


def is_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return f"{posixpath.normpath(path)}/".startswith(f"{folder.rstrip('/')}/")


def read_text(path: str | os.PathLike[str]) -> str | None:
    """The text of a file; None: there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    cli.run(Manifest, main, "recgpt_torchrec.manifest")
