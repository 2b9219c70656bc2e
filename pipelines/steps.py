"""Running the commands of a pipeline one after the other, each shown as a user would type it."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Steps:
    """Runs commands, and remembers how long each took.

    Example: `Steps("demo").run("Prepare", ["python", "-m", "recgpt_torchrec.prepare", ...])`
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: dict[str, float] = {}

    def run(self, title: str, command: list[str]) -> None:
        """Show and run a command; end the pipeline with its exit status where that is not 0.

        `python` and `torchx` stand for those of this environment.
        """
        print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
        programs = {"python": [sys.executable], "torchx": [str(Path(sys.executable).parent / "torchx")]}
        since = time.perf_counter()
        done = subprocess.run(programs.get(command[0], [command[0]]) + command[1:], cwd=ROOT, env=environment())
        if done.returncode:
            print(f"\n{self.name}: the step '{title}' failed with exit status {done.returncode}", file=sys.stderr)
            raise SystemExit(done.returncode)
        self.seconds[title] = time.perf_counter() - since

    def times(self) -> str:
        """The time of each step and of all, in one line."""
        each = ", ".join(f"{title.lower()} {seconds:.0f} s" for title, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s: {each}"


def environment() -> dict[str, str]:
    """This process's environment, with the programs of its virtual environment first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
