"""A run's output folder: started once, resumed by the same command, never overwritten by another."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import Checkpoints, read_metadata
from recgpt_torchrec.config.fields import current_name, options
from recgpt_torchrec.distributed.processes import run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import read_json, write_json
from recgpt_torchrec.storage.finished import check_same, differences, flatten

RUN = "run.json"
RECORDED = ("config", "vocabulary", "histories", "initial")
"""What of a run is in it."""
LOCK = "run.lock"
"""Locked by the job that trains the run, as long as its rank 0 lives."""


def defaults(config: Any) -> dict[str, Any]:
    """What a run was begun with that knew nothing of an option: its default, by dotted name.

    So the default of a new option must be what was done before there was one.
    """
    values: dict[str, Any] = {}
    for option in fields(config):
        given = getattr(config, option.name)
        group: Any = type(given) if is_dataclass(given) else None
        default: Any = option.default if option.default_factory is MISSING else option.default_factory()
        if group:
            values[option.name] = asdict(default or group())
        elif default is not MISSING:
            values[option.name] = default
    return flatten(values)


@dataclass
class Run:
    """One run: its configuration, the data it is trained on, and its checkpoints."""

    config: dict[str, Any]
    vocabulary: str
    histories: str
    """Fingerprint of the dataset's: an epoch that was begun on others cannot go on."""
    checkpoints: Checkpoints
    initial: str | None = None
    """Checkpoint that the run began, or is to begin, from."""

    @classmethod
    def find(cls, config: Any, vocabulary: str, histories: str, keep: int) -> "Run":
        """The run of this configuration in its output folder, begun or not (collective); nothing is written yet.

        Args:
            config: dataclass of options, `output` and `data` among them.
            vocabulary, histories: fingerprints of the dataset's.
            keep: newest checkpoints kept.

        Raises:
            InputError: the folder holds something else.
        """
        output = config.output

        def check() -> None:
            earlier = read_json(os.path.join(output, RUN))
            if earlier is None:
                begun = {LOCK, f"{RUN}.tmp"}  # what a kill leaves of a run that was just claimed
                if storage.exists(output) and (not storage.is_folder(output) or {*storage.names(output)} - begun):
                    raise InputError(
                        f"{output} holds something that is not a run of this program; choose another --output"
                    )
                return
            recorded = {current_name(name): value for name, value in flatten(earlier["config"]).items()}
            old, new = {**defaults(config), **recorded}, asdict(config)
            may_change = {option.name for option in options(type(config)) if option.may_change}
            differing = [f"--{line}" for line in differences(old, new, may_change)]
            check_same(f"--output {output}", "run", differing, "choose another --output, or the same options")
            if earlier["vocabulary"] != vocabulary:
                raise InputError(
                    f"{output} holds a run on another dataset ({old['data']}); "
                    f"choose another --output for {new['data']}"
                )
            if earlier.get("histories", histories) != histories:  # earlier versions did not note them
                raise InputError(
                    f"{output} holds a run on {old['data']} as it was then; the histories of {new['data']} are others, "
                    "though of the same users and items. Give the dataset as it was, or choose another --output"
                )

        run_on_first_rank(check)
        recorded = read_json(os.path.join(output, RUN)) or {}
        return cls(asdict(config), vocabulary, histories, Checkpoints(output, keep), recorded.get("initial"))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the output folder this run's own within the `with`, and clear up after a kill (collective); once
        everything that can be refused has been looked at.

        Raises:
            InputError: another job trains the run, or nothing can be written there.
        """
        with ExitStack() as held:

            def write() -> None:
                output = self.checkpoints.output
                try:
                    storage.make_folder(output)
                    held.enter_context(_locked(output))
                    if read_json(os.path.join(output, RUN)) is None:
                        record = {name: getattr(self, name) for name in RECORDED}
                        write_json(os.path.join(output, RUN), record)
                    self.checkpoints.settle()
                except OSError as error:
                    raise InputError(f"cannot write to --output {output}: {error}") from None

            run_on_first_rank(write)
            yield

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end."""
        latest = self.checkpoints.latest()
        return latest is not None and read_metadata(latest)["progress"]["finished"]

    def metadata(self, plan: str) -> dict[str, Any]:
        """What each checkpoint says of itself."""
        return {"config": self.config, "vocabulary": self.vocabulary, "plan": plan}

    def summary(self) -> str:
        """What was reached, where it lies, and what to do next."""
        output = self.checkpoints.output
        best = read_json(os.path.join(output, "best.json")) or {}
        data = self.config["data"]
        return (
            f"Trained: validation NDCG@10 {best.get('value', float('nan')):.4f} after epoch {best.get('epoch')}, "
            f"in {self.checkpoints.best()}\n"
            f"Curves:  tensorboard --logdir {output}/tensorboard\n"
            f"Next:    python -m recgpt_torchrec.evaluate --data {data} --checkpoint {output} "
            f"--output {output}/test.json --split test"
        )


@contextmanager
def _locked(output: str) -> Iterator[None]:
    """Keep other jobs out of a run's folder, if it is on a file system that knows locks; the end of this process,
    however it comes, lets them in."""
    if storage.remote(output):
        yield
        return
    path = os.path.join(output, LOCK)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 200).decode(errors="replace")
            raise InputError(
                f"{output} is being trained by another job (rank 0 is {who or 'unknown'}); wait until that has ended, "
                f"end it, or choose another --output. If there is no such process any more, remove {path}"
            ) from None
        except OSError:
            pass
        with suppress(OSError):  # on a full disk as well, a run may clear up
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(handle)
