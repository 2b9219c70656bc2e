"""Running the commands of a pipeline one after the other, each shown as a user would type it."""

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

ROOT = Path(__file__).resolve().parent.parent

STOP_SECONDS = 20.0
"""How long a command may take to end once it was asked to."""


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
        since = time.perf_counter()
        status = execute(command)
        if status:
            print(f"\n{self.name}: the step '{title}' failed with exit status {status}", file=sys.stderr)
            raise SystemExit(status)
        self.seconds[title] = time.perf_counter() - since

    def times(self) -> str:
        """The time of each step and of all, in one line."""
        each = ", ".join(f"{title.lower()} {seconds:.0f} s" for title, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.0f} s: {each}"


class RecordedSteps:
    """Steps that are done once: each leaves a record, and a later run passes over what is done.

        FOLDER/steps/NAME.json   the command, what it was made from, how long it took; `id` once it is done
        FOLDER/steps/NAME.log    everything the command said

    A step is done when its record says so, its command, settings and inputs are those of the record, and its proof is
    there. What was begun with other settings or inputs is never taken for the present one: the pipeline ends and says
    so.

    Example:
        with RecordedSteps("paper", "runs/paper", planned=["beauty prepare", ...]) as steps:
            steps.run("beauty/prepare", ["python", "-m", ...], proof="runs/paper/beauty/data/manifest.json")
    """

    def __init__(self, name: str, folder: str | Path, planned: list[str]) -> None:
        """Take the folder for this process.

        Args:
            name: of the pipeline, for messages.
            folder: of the pipeline's output; made.
            planned: the kind of every step to come, in any order, for counting and for the time left. A kind ends in
                the stage's name: where none of a kind was timed, those that end alike say how long it takes.
        """
        self.name, self.folder, self.left = name, Path(folder), list(planned)
        self.total, self.number, self.since = len(planned), 0, time.perf_counter()
        self.executed = 0
        """Commands run by this process; the others were done before."""

    def __enter__(self) -> "RecordedSteps":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "w")
        lock(self._lock, f"{self.name}: another process works in {self.folder}; wait for it, or stop it first")
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
        """Run a command, unless it is done; end the pipeline with its exit status where that is not 0.

        Args:
            title: of the step, unique; also the path of its record, as in `beauty/seed0/pretrain`.
            command: as in `Steps.run`.
            kind: one of those planned.
            proof: a file that is there once the step is done, relative to the project.
            needs: titles of the steps whose results it reads.
            settings: JSON values that the command reads elsewhere, such as its configuration file.
            repeatable: the command writes over its earlier output, so it may be run again with other inputs.
        """
        self.number += 1
        self.left.remove(kind)
        made_from = {
            "command": shlex.join(command),
            "settings": settings,
            "needs": {need: self.record(need).get("id") for need in needs},
        }
        earlier = self.record(title)
        same = all(earlier.get(name) == value for name, value in made_from.items())
        where = f"\n== step {self.number} of {self.total}: {title}"
        if same and earlier.get("id") and (ROOT / proof).exists():
            print(f"{where}: done before, in {clock(earlier['seconds'])}", flush=True)
            return
        if earlier and not same and not repeatable:
            self._refuse(title, earlier, made_from)
        print(f"{where} ({self._progress(kind)})\n$ {shlex.join(command)}", flush=True)
        record = {"kind": kind, **made_from, "id": None, "seconds": earlier.get("seconds", 0.0) if same else 0.0}
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
            print(f"\n{self.name}: the step {title} ended well but left no {proof}; see {log}", file=sys.stderr)
            raise SystemExit(1)
        self._write(title, {**record, "id": uuid.uuid4().hex[:12], "finished": time.strftime("%Y-%m-%d %H:%M:%S")})

    def record(self, title: str) -> dict[str, Any]:
        """What is known of a step; empty where it was never begun."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self._path(title, "json").read_text())
        return {}

    def records(self) -> dict[str, dict[str, Any]]:
        """Every record in the folder by title, in the order in which they were finished; unfinished ones last."""
        paths = (self.folder / "steps").rglob("*.json")
        found = {str(p.relative_to(self.folder / "steps").with_suffix("")): json.loads(p.read_text()) for p in paths}
        return dict(sorted(found.items(), key=lambda pair: (pair[1].get("finished") or "~", pair[0])))

    def _path(self, title: str, ending: str) -> Path:
        return self.folder / "steps" / f"{title}.{ending}"

    def _write(self, title: str, record: dict[str, Any]) -> None:
        path = self._path(title, "json")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(path)

    def _refuse(self, title: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
        lines = []
        for name in ("command", "settings", "needs"):
            old, new = _flat(name, earlier.get(name)), _flat(name, now[name])
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    lines.append(f"\n  {key}: {old.get(key)} there, {new.get(key)} now")
        print(
            f"\n{self.name}: the step {title} was made otherwise before:{''.join(lines)}\n"
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
        gone = clock(time.perf_counter() - self.since)
        if not timed:
            return f"{gone} gone"
        left = sum(_expected(step, timed) for step in [kind, *self.left])
        return f"{gone} gone, about {clock(left)} left"


@contextlib.contextmanager
def pipeline(name: str, output: str, planned: list[str]) -> Iterator[RecordedSteps]:
    """The recorded steps of a pipeline's `main`: stopped by Ctrl-C or SIGTERM, it ends the step that runs, too.

    Args:
        name: of the pipeline, for messages.
        output: its folder, relative to the project, which is to get a report.
        planned: see `RecordedSteps`.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with RecordedSteps(name, ROOT / output, planned) as steps:
            yield steps
            print(f"\n== Done: {steps.executed} of {steps.total} steps run now, the others before")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"report        {output}/report.md, report.json")


def execute(command: list[str], log: Path | None = None) -> int:
    """Run a command in the project's folder and return its exit status; `python` and `torchx` are this environment's.

    Args:
        command: program and arguments.
        log: a file to which what it says is added, beside being shown.
    """
    programs = {"python": [sys.executable], "torchx": [str(Path(sys.executable).parent / "torchx")]}
    words = programs.get(command[0], [command[0]]) + command[1:]
    if log is None:
        return subprocess.run(words, cwd=ROOT, env=environment()).returncode
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        # A session of its own: what stops the pipeline is passed on once, by `_stopped`, not by the terminal as well.
        started = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _stopped(started):
            assert started.stdout is not None
            while piece := os.read(started.stdout.fileno(), 65536):
                file.write(piece)
                file.flush()
                sys.stdout.write(piece.decode(errors="replace"))
                sys.stdout.flush()
            return started.wait()


@contextlib.contextmanager
def _stopped(started: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the command where the pipeline is interrupted, so that nothing of it goes on in the background."""
    try:
        yield
    except BaseException:
        started.terminate()
        try:
            started.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        raise


def lock(file: IO[str], message: str) -> None:
    """Hold a lock on an open file until it is closed; where another process holds it, end with the message."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(message, file=sys.stderr)
        raise SystemExit(2) from None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03 within the hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def environment() -> dict[str, str]:
    """This process's environment, with the programs of its virtual environment first on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _expected(kind: str, timed: dict[str, list[float]]) -> float:
    """Seconds of a step: the mean of its kind, else of those that end alike, else of all."""
    ending = kind.rpartition(" ")[2]
    alike = [s for other, times in timed.items() if other.rpartition(" ")[2] == ending for s in times]
    times = timed.get(kind) or alike or [s for each in timed.values() for s in each]
    return sum(times) / len(times)


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested values by dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for child, inner in value.items() for key, leaf in _flat(f"{name}.{child}", inner).items()}
