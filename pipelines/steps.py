"""Runs the commands of a pipeline one after the other, each printed as a user would type it."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from recgpt_torchrec.storage.finished import differences

ROOT = Path(__file__).resolve().parent.parent

STOP_SECONDS = 20.0
"""Grace period between SIGTERM and SIGKILL for a command."""


class Steps:
    """Runs commands and records their times.

    Example: `Steps("demo").run("Prepare", ["python", "-m", "recgpt_torchrec.prepare", ...])`
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: dict[str, float] = {}

    def run(self, title: str, command: list[str]) -> None:
        """Print and run a command; if it fails, end the pipeline with its exit status.

        `python` and `torchx` are those of this environment.
        """
        print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
        since = time.perf_counter()
        status = execute(command)
        if status:
            print(f"\n{self.name}: the step '{title}' failed with exit status {status}", file=sys.stderr)
            raise SystemExit(status)
        self.seconds[title] = time.perf_counter() - since

    def times(self) -> str:
        """Total time and the time of each step, in one line."""
        each = ", ".join(f"{title.lower()} {seconds:.0f} s" for title, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s: {each}"


class RecordedSteps:
    """Steps that run once: each leaves a record, and a later run skips the steps that are done.

        FOLDER/steps/NAME.json   command, settings, inputs and seconds; `id` once it is done
        FOLDER/steps/NAME.log    output of the command

    A step is done when its record has an id and the same command, settings and inputs, and its proof exists. A record
    with other settings or inputs ends the pipeline with a message.

    Example:
        with RecordedSteps("paper", "runs/paper", planned=["beauty prepare", ...]) as steps:
            steps.run("beauty/prepare", ["python", "-m", ...], proof="runs/paper/beauty/data/manifest.json")
    """

    def __init__(self, name: str, folder: str | Path, planned: list[str]) -> None:
        """Set the folder and the plan; entering the context locks the folder.

        Args:
            name: of the pipeline, for messages.
            folder: of the pipeline's output; created if missing.
            planned: the kind of every step, in any order, to count steps and estimate the time left. A kind ends in the
                stage's name: a kind that was not timed yet is estimated by those with the same ending.
        """
        self.name, self.folder, self.left = name, Path(folder), list(planned)
        self.total, self.number, self.since = len(planned), 0, time.perf_counter()
        self.executed = 0
        """Number of commands that this process ran."""

    def __enter__(self) -> "RecordedSteps":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "w")
        lock(self._lock, f"{self.name}: another process is running in {self.folder}; wait for it, or stop it first")
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def run(
        self,
        title: str,
        command: list[str],
        *,
        kind: str,
        proof: str | Path,
        needs: tuple[str, ...] = (),
        settings: Any = None,
        repeatable: bool = False,
    ) -> None:
        """Run a command unless it is done; if it fails, end the pipeline with its exit status.

        Args:
            title: unique title of the step, and path of its record, such as `beauty/seed0/pretrain`.
            command: as in `Steps.run`.
            kind: one of `planned`.
            proof: file that exists once the step is done, relative to the project.
            needs: titles of the steps whose results the command reads.
            settings: JSON values that the command reads from files, such as its configuration.
            repeatable: whether the command overwrites its output, so that it may run again with other inputs.
        """
        self.number += 1
        self.left.remove(kind)
        sources = {
            "command": shlex.join(command),
            "settings": settings,
            "needs": {need: self.record(need).get("id") for need in needs},
        }
        earlier = self.record(title)
        same = all(earlier.get(name) == value for name, value in sources.items())
        heading = f"\n== step {self.number} of {self.total}: {title}"
        if same and earlier.get("id") and (ROOT / proof).exists():
            print(f"{heading}: done before, in {clock(earlier['seconds'])}", flush=True)
            return
        if earlier and not same and not repeatable:
            self._refuse(title, earlier, sources)
        print(f"{heading} ({self._progress(kind)})\n$ {shlex.join(command)}", flush=True)
        record = {"kind": kind, **sources, "id": None, "seconds": earlier.get("seconds", 0.0) if same else 0.0}
        self._write(title, record)
        since, before = time.perf_counter(), record["seconds"]
        try:
            status = execute(command, self._path(title, "log"))
        finally:
            record["seconds"] = before + time.perf_counter() - since
            self._write(title, record)
        self.executed += 1
        log = self._path(title, "log")
        if status:
            print(f"\n{self.name}: the step {title} failed with exit status {status}; see {log}", file=sys.stderr)
            raise SystemExit(status)
        if not (ROOT / proof).exists():
            print(f"\n{self.name}: the step {title} succeeded but left no {proof}; see {log}", file=sys.stderr)
            raise SystemExit(1)
        self._write(title, {**record, "id": uuid.uuid4().hex[:12], "finished": time.strftime("%Y-%m-%d %H:%M:%S")})

    def record(self, title: str) -> dict[str, Any]:
        """Record of a step; empty if it never ran."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self._path(title, "json").read_text())
        return {}

    def records(self) -> dict[str, dict[str, Any]]:
        """Every record of the folder by title, in the order of finishing; unfinished ones last."""
        paths = (self.folder / "steps").rglob("*.json")
        records = {str(p.relative_to(self.folder / "steps").with_suffix("")): json.loads(p.read_text()) for p in paths}
        return dict(sorted(records.items(), key=lambda pair: (pair[1].get("finished") or "~", pair[0])))

    def _path(self, title: str, ending: str) -> Path:
        return self.folder / "steps" / f"{title}.{ending}"

    def _write(self, title: str, record: dict[str, Any]) -> None:
        path = self._path(title, "json")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(path)

    def _refuse(self, title: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
        lines = [f"\n  {line}" for line in differences({name: earlier.get(name) for name in now}, now)]
        print(
            f"\n{self.name}: the step {title} was run with other options or inputs before:{''.join(lines)}\n"
            "Give the same options, choose another --output, or delete the step's result and "
            f"{self._path(title, 'json')}",
            file=sys.stderr,
        )
        raise SystemExit(2)

    def _progress(self, kind: str) -> str:
        timed: dict[str, list[float]] = {}
        for record in self.records().values():
            if record.get("id"):
                timed.setdefault(record["kind"], []).append(record["seconds"])
        elapsed = clock(time.perf_counter() - self.since)
        if not timed:
            return f"{elapsed} elapsed"
        left = sum(_estimate_seconds(step, timed) for step in [kind, *self.left])
        return f"{elapsed} elapsed, about {clock(left)} left"


@contextlib.contextmanager
def pipeline(name: str, output: str, planned: list[str]) -> Iterator[RecordedSteps]:
    """Provide the recorded steps of a pipeline; Ctrl-C and SIGTERM also end the running step.

    Args:
        name: of the pipeline, for messages.
        output: its folder, relative to the project, which gets the report.
        planned: see `RecordedSteps`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with RecordedSteps(name, ROOT / output, planned) as steps:
            yield steps
            print(f"\n== Done: {steps.executed} of {steps.total} steps run now, the others earlier")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command resumes here", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"report        {output}/report.md, report.json")


def execute(command: list[str], log: Path | None = None) -> int:
    """Run a command in the project's folder and return its exit status; `python` and `torchx` are this environment's.

    Args:
        command: program and arguments.
        log: file to which the output is appended, besides being printed.
    """
    programs = {"python": [sys.executable], "torchx": [str(Path(sys.executable).parent / "torchx")]}
    words = programs.get(command[0], [command[0]]) + command[1:]
    if log is None:
        return subprocess.run(words, cwd=ROOT, env=environment()).returncode
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        # Its own session: `_end_on_error` ends it once, and the terminal's Ctrl-C does not reach it as well.
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _end_on_error(process):
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 65536):
                file.write(piece)
                file.flush()
                sys.stdout.write(piece.decode(errors="replace"))
                sys.stdout.flush()
            return process.wait()


@contextlib.contextmanager
def _end_on_error(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the command if the pipeline is interrupted, so that nothing keeps running in the background."""
    try:
        yield
    except BaseException:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def lock(file: IO[str], message: str) -> None:
    """Lock an open file until it is closed; exit with the message if another process holds the lock."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(message, file=sys.stderr)
        raise SystemExit(2) from None


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03, or 2:03 below one hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def environment() -> dict[str, str]:
    """Environment of this process, with its virtual environment first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _estimate_seconds(kind: str, timed: dict[str, list[float]]) -> float:
    """Mean seconds of the steps of a kind, else of kinds with the same ending, else of all."""
    ending = kind.rpartition(" ")[2]
    alike = [s for other, times in timed.items() if other.rpartition(" ")[2] == ending for s in times]
    times = timed.get(kind) or alike or [s for each in timed.values() for s in each]
    return sum(times) / len(times)
