"""The command `torchx run`: its words, and what it lacks, a job's results on standard output and its exit status.

torchx has options for neither. This is the only place that knows its functions; where a later torchx has others, its
own behaviour stays.
"""

import json
import os
import shlex
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from torchx.runner.config import get_config
from torchx.schedulers.api import Stream

from recgpt_torchrec.errors import LOST, REFUSED


def named_scheduler(words: Sequence[str]) -> str:
    """The scheduler of the command `torchx run`, from its options or .torchxconfig; without one, `local_cwd`."""
    for number, word in enumerate(words):
        if word == "--":
            break
        if word in ("-s", "--scheduler") and number + 1 < len(words):
            return words[number + 1]
        if word.startswith("--scheduler="):
            return word.partition("=")[2]
    return get_config(prefix="cli", name="run", key="scheduler") or "local_cwd"


def words_of_command(stage: str, j: str, given: list[str]) -> str:
    """The words with which torchx was started up to the stage's options, {} for its name, quoted for a shell.

    The program prints commands to go on with in this form. Names, environment variables and what torchx itself prints
    are left out: they may differ from job to job.

    Args:
        stage: name of the stage.
        j: nodes x processes.
        given: `sys.argv` of torchx; of another program, it is the plain command for these processes.
    """
    component = f"recgpt_torchrec.{stage}"
    if "run" not in given or component not in given:
        words = ["torchx", "run", "recgpt_torchrec.{}", *([] if j == "1x1" else ["-j", j])]
        return shlex.join([*words, "--"])
    words, rest = ["torchx"], iter(given[given.index("run") : given.index("--") if "--" in given else len(given)])
    for word in rest:
        name = word.partition("=")[0]
        if name in ("--name", "--env", "--parent_run_id", "--tee_logs"):
            if "=" not in word and name != "--tee_logs":
                next(rest, None)
        elif name not in ("--wait", "--log", "--dryrun"):
            words.append("recgpt_torchrec.{}" if word == component else word)
    return shlex.join([*words, "--"])


def improve_torchx_run() -> None:
    """Make `torchx run` separate the output of a local job, and end with its status; a second call does nothing."""
    command: Any = sys.modules.get("torchx.cli.cmd_run")
    if command is None or getattr(command, "is_improved", False):
        return
    command.is_improved = True
    if hasattr(command, "get_logs"):
        _separate_output(command)
    if hasattr(getattr(command, "CmdRun", None), "_wait_and_exit"):
        _pass_on_status(command.CmdRun)


def _separate_output(command: Any) -> None:
    """Print a local job's standard output to standard output, and its errors to standard error.

    torchx prints both to standard error, where a pipe or a file does not get results.
    """
    original = command.get_logs

    def get_logs(identifier: str, **options: Any) -> None:
        if not identifier.startswith("local"):
            original(identifier=identifier, **options)
            return
        errors = threading.Thread(
            target=original, kwargs={**options, "identifier": identifier, "streams": Stream.STDERR}, daemon=True
        )
        errors.start()
        original(**{**options, "identifier": identifier, "file": sys.stdout, "streams": Stream.STDOUT})
        errors.join()

    command.get_logs = get_logs


def _pass_on_status(command: Any) -> None:
    """Exit with the status of a local job; torchx exits with 1 for all but 0."""
    original = command._wait_and_exit

    def wait_and_exit(self: Any, runner: Any, app_handle: str, log: bool) -> None:
        try:
            original(self, runner, app_handle, log)
        except SystemExit as end:
            if end.code == 1 and app_handle.startswith("local"):
                end.code = choose_status(_exit_codes(runner.status(app_handle))) or 1
            raise

    command._wait_and_exit = wait_and_exit


def _exit_codes(status: Any) -> list[int]:
    """Exit codes of a local job's launchers, which torchx writes into the file SUCCESS of its folder of logs."""
    folder = (getattr(status, "ui_url", None) or "").removeprefix("file://")
    try:
        with open(os.path.join(folder, "SUCCESS")) as file:
            roles = json.load(file)["roles"]
        return [int(replica["exitcode"]) for replicas in roles.values() for replica in replicas]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def choose_status(codes: Iterable[int]) -> int:
    """The exit status of a job, of those of its launchers: that of the cause, not of those which lost another."""
    failed = [128 - code if code < 0 else code for code in codes if code]
    if REFUSED in failed:
        return REFUSED
    return next((code for code in failed if code != LOST), failed[0] if failed else 0)
