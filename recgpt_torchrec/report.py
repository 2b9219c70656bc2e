"""Program `report`: runs and their evaluations -> one HTML file."""

import os

from recgpt_torchrec import cli, storage
from recgpt_torchrec.config.reports.report import Report
from recgpt_torchrec.errors import InputError


def main(config: Report) -> None:
    """Read the runs and write the page."""
    from recgpt_torchrec.distributed.processes import silence_libraries
    from recgpt_torchrec.reports.making import make_values
    from recgpt_torchrec.reports.page import make_page

    silence_libraries()
    check_output(config.output)
    values = make_values(config)
    storage.write(config.output, make_page(values).encode())
    for note in values.notes:
        print(f"Note: {note}")
    for run in values.runs:
        files = ", ".join(each.file for each in run.evaluations)
        print(
            f"{run.folder}: {run.kind}, {run.state}; " + (f"evaluations: {files}" if files else "no evaluation found")
        )
    for each in values.comparisons:
        if each.reason is not None:
            print(f"No paired differences of {each.run} and {each.reference} on {each.split}: {each.reason}")
    print(f"Written: {config.output}")


def check_output(output: str) -> None:
    """Check that the file can be written, and that an existing one is a report.

    Raises:
        InputError: its folder does not exist, or it is something else.
    """
    from recgpt_torchrec.reports.page import DATA

    folder = os.path.dirname(os.path.abspath(output))
    if not storage.remote(output) and not os.path.isdir(folder):
        raise InputError(f"--output {output}: the folder {folder} does not exist; make it first")
    if storage.is_folder(output):
        raise InputError(f"--output {output} is a folder; name a file, such as {output}/report.html")
    if storage.exists(output) and f'id="{DATA}"'.encode() not in storage.read(output):
        raise InputError(f"--output {output} holds something that is not a report; choose another --output")


if __name__ == "__main__":
    cli.run(Report, main, "recgpt_torchrec.report")
