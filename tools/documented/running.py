"""Runs a page's blocks in a scratch folder, in order. What stages import is imported once; each command is forked.

A fork saves the 3 to 15 s that a start of Python with torch takes; `recgpt`, `python -m` and `python FILE` are run so.
Other commands (`curl`, `torchx`, another interpreter) are given to bash.
"""

import contextlib
import os
import random
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.documented.blocks import ROOT, Block, commands, read_blocks
from tools.documented.files import write_files
from tools.documented.pages import Page

SECONDS = 600
"""Time limit of a command."""
LINKED = (
    "configs",
    "docs",
    "pipelines",
    "recgpt_torchrec",
    "tools",
    "torchx_components.py",
    ".torchxconfig",
    ".venv-stores",
)
"""What a reader sees who is in the repository's folder."""
PORT = "8080"


class CommandFailed(Exception):
    """A command of a page ended with another status than 0."""


class PageRun:
    """A page that is being run, in the current folder."""

    def __init__(self, name: str, show: bool) -> None:
        self.name, self.show = name, show
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.services: list[int] = []
        self.port = PORT

    def run_block(self, block: Block) -> None:
        """Run a block of commands or of Python."""
        if block.language == "python":
            self.watch(block.line, block.code.splitlines()[0], lambda log: self.run_python(block, log))
            return
        for line in commands(block.code):
            self.run_command(block.line, line, block.mark == "stays running")

    def run_python(self, block: Block, log: Path) -> None:
        """Run Python in the page's own names, as a reader types one block after the other."""
        source = "\n" * block.line + block.code
        with log.open("w") as file, contextlib.redirect_stdout(file):
            exec(compile(source, self.name, "exec"), self.names)

    def run_command(self, number: int, line: str, stays: bool = False) -> None:
        """Run one command, and wait for its end, or until a service says where it is."""
        typed = line.replace(f"localhost:{PORT}", f"localhost:{self.port}")
        if stays:
            self.port = find_port()
            typed += f" --port {self.port}"
        self.watch(number, line, lambda log: self.fork(typed, log, stays))

    def watch(self, number: int, text: str, function: Callable[[Path], None]) -> None:
        """Run a function that writes into a file, and say what took how long, or what failed."""
        log = Path(f"said-{number}.txt")
        started = time.monotonic()
        try:
            function(log)
        except BaseException as error:
            said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
            reason = str(error) if isinstance(error, CommandFailed) else traceback.format_exc()
            raise CommandFailed(f"{self.name}:{number}: {text}\n{said}{reason}") from error
        print(f"{time.monotonic() - started:6.1f} s  {self.name}:{number}  {text[:150]}", flush=True)
        if self.show and log.exists():
            print(log.read_text(errors="replace"), flush=True)

    def fork(self, line: str, log: Path, stays: bool) -> None:
        """Run a command in a forked process whose output goes to `log`."""
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setsid()
                signal.alarm(SECONDS)
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                status = run_line(line)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        if stays:
            self.services.append(child)
            while not (log.exists() and "http://" in log.read_text()):
                if os.waitpid(child, os.WNOHANG)[0]:
                    self.services.remove(child)
                    raise CommandFailed("the service has ended")
                time.sleep(0.05)
            return
        _, code = os.waitpid(child, 0)
        if code:
            raise CommandFailed(f"status {os.waitstatus_to_exitcode(code)}")

    def stop_services(self) -> None:
        """End what stays running."""
        for child in self.services:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def find_port() -> str:
    """A free port, below those that Linux gives to whoever asks for any: it stays free until a service starts."""
    while True:
        port = random.randrange(16_384, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


def run_line(line: str) -> int:
    """Run a command in this process where it is a program in Python, else with bash; returns its status."""
    words = shlex.split(line, comments=True)
    plain = not {"|", "&&", ";", ">", "&"} & set(words)
    if plain and words[0] == "recgpt":
        sys.argv = words
        runpy.run_module("recgpt_torchrec", run_name="__main__", alter_sys=True)
    elif plain and words[:2] == ["python", "-m"]:
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    elif plain and words[0] == "python" and words[1].endswith(".py"):
        sys.argv = words[1:]
        sys.path[0] = str(Path(words[1]).parent)
        runpy.run_path(words[1], run_name="__main__")
    else:
        return subprocess.run(["bash", "-c", f"set -eo pipefail; {line}"], timeout=SECONDS).returncode
    return 0


def run_page(name: str, page: Page, folder: Path, *, all_blocks: bool, show: bool) -> None:
    """Run a page's blocks in an empty folder. With `all_blocks` also those that are run by hand."""
    for linked in LINKED:
        if (ROOT / linked).exists():
            (folder / linked).symlink_to(ROOT / linked)
    write_files(folder)
    os.chdir(folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    run = PageRun(name, show)
    try:
        for line in page.before:
            run.run_command(0, line)
        for block in read_blocks(ROOT / name):
            skipped = block.mark == "not run" or (block.mark == "run by hand" and not all_blocks)
            if block.language in ("bash", "python") and not skipped:
                run.run_block(block)
    finally:
        run.stop_services()
