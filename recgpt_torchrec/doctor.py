"""Program `doctor`: versions, machine, dataset, configuration -> what would make a run fail or disappoint."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recgpt_torchrec import cli
from recgpt_torchrec.config.reports.doctor import Doctor
from recgpt_torchrec.texts.commands import next_line

if TYPE_CHECKING:
    from recgpt_torchrec.diagnosis.finding import Finding


def main(config: Doctor) -> None:
    """Print the findings; exits with status 1 where one is an error."""
    from recgpt_torchrec.diagnosis.finding import report, summary
    from recgpt_torchrec.diagnosis.versions import check_imports, check_versions, installed_versions

    sections: dict[str, Sequence[Finding]] = {"versions": [*check_versions(installed_versions()), *check_imports()]}
    if not any(each.severity == "error" for each in sections["versions"]):  # all else needs torch and torchrec
        sections |= examine(config)
    findings = [each for section in sections.values() for each in section]
    print(report(sections))
    print(summary(findings))
    if any(each.severity == "error" for each in findings):
        sys.exit(1)
    print(next_step(config))


def examine(config: Doctor) -> "dict[str, Sequence[Finding]]":
    """The findings about the machine and, where there is one, the dataset and the options."""
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.data.reading.preset import PREFIX, apply_preset
    from recgpt_torchrec.diagnosis.contents import Contents
    from recgpt_torchrec.diagnosis.datasets import check_dataset
    from recgpt_torchrec.diagnosis.finding import Finding
    from recgpt_torchrec.diagnosis.machine import Machine, check_machine
    from recgpt_torchrec.diagnosis.settings import check_settings
    from recgpt_torchrec.distributed.processes import silence_libraries
    from recgpt_torchrec.errors import InputError

    silence_libraries()
    machine = Machine.here(config.output)
    ranks = config.ranks or max(1, len(machine.gpus))
    sections: dict[str, Sequence[Finding]] = {
        "machine": check_machine(machine, ranks, config.device, config.stream.workers)
    }
    if config.data is None:
        return sections
    try:
        dataset = Dataset.open(config.data, damaged="skip", checksums=config.stream.checksums)
        contents = Contents.read(dataset)
    except InputError as error:
        return sections | {"dataset": [Finding("error", "dataset", str(error))]}
    sections["dataset"] = check_dataset(dataset.manifest, contents, time.time())
    try:
        config, lines = apply_preset(config)
    except InputError as error:
        return sections | {"configuration": [Finding("error", "preset", str(error))]}
    chosen = [Finding("ok", "preset", line.removeprefix(PREFIX)) for line in lines]
    return sections | {"configuration": [*chosen, *check_settings(config, machine, ranks, contents)]}


def next_step(config: Doctor) -> str:
    """The command to give next."""
    if config.data is None:
        return next_line("doctor", {"data": "DATASET_FOLDER"})
    preset = {} if config.preset == "none" else {"preset": config.preset}
    return next_line("pretrain", {"data": config.data, "output": "RUN_FOLDER", **preset})


if __name__ == "__main__":
    cli.run(Doctor, main, "recgpt_torchrec.doctor")
