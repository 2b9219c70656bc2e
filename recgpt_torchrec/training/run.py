"""A run's output folder: resumed by the same command, never overwritten by another."""

import fcntl
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.repeat_bias import describe_bias
from recgpt_torchrec.config.fields import changeable_names, current_name, default_values, given_options
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.distributed.placements import Placement
from recgpt_torchrec.distributed.processes import run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import raise_storage_failure, read_json, write_json
from recgpt_torchrec.storage.finished import check_same, differences, flatten
from recgpt_torchrec.storage.typed import make_typed
from recgpt_torchrec.texts.commands import command, next_line
from recgpt_torchrec.training.progress import Progress

RUN = "run.json"
RECORDED = ("config", "vocabulary", "histories", "initial", "step_tokens")
"""Fields of `Run` that are recorded in run.json."""
PATH_LENGTH = 4000
"""Maximum length of a path, in Linux."""
MAX_TOKENS = 2**30
"""Maximum number of tokens of a step that is read from a file."""
LOCK = "run.lock"
"""File locked by the job that trains the run, until its rank 0 ends."""


@dataclass
class Record:
    """The contents of run.json."""

    config: dict[str, Any]
    vocabulary: str
    histories: str | None = None
    initial: str | None = None
    step_tokens: int | None = None

    @property
    def rank_tokens(self) -> int | None:
        """What the run was given as the number of tokens per rank; None: it was chosen, or is no number."""
        batch = self.config.get("batch")
        tokens = batch.get("tokens") if isinstance(batch, dict) else None
        return tokens if type(tokens) is int and 0 < tokens <= MAX_TOKENS else None


def read_record(output: str) -> Record | None:
    """Read the run.json of a run's folder; None: there is none.

    Raises:
        InputError: it is damaged.
    """
    path = os.path.join(output, RUN)
    values = read_json(path)
    try:
        record = None if values is None else make_typed(Record, values, others=True)
        if record is not None and len(record.initial or "") > PATH_LENGTH:
            raise ValueError(f"initial is {record.initial!r:.60}..., it must be a path")
        step_tokens = None if record is None else record.step_tokens
        if step_tokens is not None and not 0 < step_tokens <= MAX_TOKENS:
            raise ValueError(f"step_tokens is {step_tokens}, it must be from 1 to {MAX_TOKENS:,}")
        return record
    except ValueError as error:
        raise storage.damaged(path, error) from None


@dataclass
class Run:
    """One run: its configuration, the data it is trained on, and its checkpoints."""

    config: dict[str, Any]
    vocabulary: str
    histories: str
    """Fingerprint of the dataset's histories: an epoch cannot resume on others."""
    checkpoints: Checkpoints
    initial: str | None = None
    """Another run's checkpoint that this run starts from; None: it starts from initial values."""
    step_tokens: int | None = None
    """Maximum number of tokens of a step over all ranks that `--batch.tokens auto` chose when the run began, see
    `building.choose_tokens`; None: it was given."""

    @classmethod
    def find(cls, config: Any, vocabulary: str, histories: str, keep: int, step_tokens: int | None = None) -> "Run":
        """Find the run of a configuration in its output folder, started or not; writes nothing (collective).

        Args:
            config: dataclass of options with `output` and `data`.
            vocabulary, histories: fingerprints of the dataset's vocabulary and histories.
            keep: number of newest checkpoints to keep.
            step_tokens: see the field.

        Raises:
            InputError: the folder holds something else, or a run with other options or data.
        """
        output = config.output

        def check() -> Record | None:
            earlier = read_record(output)
            if earlier is None:
                leftovers = {LOCK, f"{RUN}.tmp"}  # of a run that was killed at its start
                if storage.exists(output) and (not storage.is_folder(output) or {*storage.names(output)} - leftovers):
                    raise InputError(
                        f"{output} holds something that is not a run of this program; choose another --output"
                    )
                return None
            recorded = {current_name(name): value for name, value in flatten(earlier.config).items()}
            if "train.validate_start" not in recorded:  # a run of an earlier version is beyond its start
                recorded["train.validate_start"] = config.train.validate_start
            old, new = {**flatten(default_values(config)), **recorded}, asdict(config)
            if config.batch.tokens == "auto" and earlier.rank_tokens is not None:
                new["batch"]["tokens"] = earlier.rank_tokens  # `auto` keeps what the run was given
            differing = [f"--{line}" for line in differences(old, new, changeable_names(type(config)))]
            check_same(f"--output {output}", "run", differing, _suggest_way(config, old, differing))
            if earlier.vocabulary != vocabulary:
                raise InputError(
                    f"{output} holds a run on another dataset ({old.get('data')}); "
                    f"choose another --output for {new['data']}"
                )
            if earlier.histories not in (None, histories):  # earlier versions did not record them
                raise InputError(
                    f"{output} holds a run on other histories or attributes of the same users and items: {new['data']} "
                    f"is not as {old.get('data')} was when the run started. Restore the dataset, or choose another "
                    "--output"
                )
            return earlier

        recorded = run_on_first_rank(check)
        initial = None if recorded is None else recorded.initial
        return cls(asdict(config), vocabulary, histories, Checkpoints(output, keep), initial, step_tokens)

    @contextmanager
    def claim_folder(self) -> Iterator[None]:
        """Lock and set up the output folder within the `with`, and clean up after a kill (collective).

        Call it after all other checks: it is the first to write to the folder.

        Raises:
            InputError: another job trains the run, or the folder cannot be written to.
        """
        with ExitStack() as lock:

            def set_up() -> None:
                output = self.checkpoints.output
                try:
                    storage.make_folder(output)
                    lock.enter_context(_lock_folder(output))
                    if read_record(output) is None:
                        record = {name: getattr(self, name) for name in RECORDED}
                        write_json(os.path.join(output, RUN), record)
                    self.checkpoints.clean_up()
                except OSError as error:
                    raise_storage_failure(error, output, "write to")
                    raise InputError(f"cannot write to --output {output}: {error}") from None

            run_on_first_rank(set_up)
            yield

    @property
    def finished(self) -> bool:
        """Whether the run's training is finished."""
        latest = self.checkpoints.latest()
        return latest is not None and Progress.of_checkpoint(latest).finished

    def metadata(
        self,
        plan: str,
        placed: list[Placement],
        hold_out: str = "last",
        inputs: Inputs | None = None,
        environment: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The run's part of each checkpoint's metadata.

        Args:
            plan: describes the sharding.
            placed: where the tables are.
            hold_out: what the dataset holds out; `last` is not recorded.
            inputs: what the model reads beside ids; nothing is not recorded.
            environment: ranks, device and versions, for reports.
        """
        more: dict[str, Any] = {} if hold_out == "last" else {"hold_out": hold_out}
        if inputs is not None and (values := inputs.to_json()):
            more["inputs"] = values
        if environment is not None:
            more["environment"] = environment
        tables = [asdict(each) for each in placed]
        return {"config": self.config, "vocabulary": self.vocabulary, "plan": plan, "placements": tables, **more}

    def summary(self, manifest: Manifest) -> str:
        """The best validation figure, its checkpoint and repeat bias, and the next command, as text.

        `manifest` is the dataset's.
        """
        output, train = self.checkpoints.output, self.config["train"]
        unit = "step" if train["steps"] else "epoch"
        count = train[f"{unit}s"]
        trained = (
            f"{count:,} {unit}{'s' * (count != 1)}, nothing held out for validation, "
            f"in {self.checkpoints.latest()} (the newest)"
        )
        if (best := self.checkpoints.read_best()) is not None:
            moment, sample = f"after epoch {best.epoch}", ""
            if best.checkpoint is not None and (train["steps"] or train["validate_steps"]):
                moment = f"after step {int(best.checkpoint.removeprefix('step-')):,} (epoch {best.epoch})"
            if best.epoch == 0:
                moment = "before the first step (no epoch was better)"
            if train["validate_users"]:
                sample = f" on {describe_users(manifest, train['validate_users'])}"
            trained = f"validation {train['metric']} {best.value:.4f}{sample} {moment}, in {self.checkpoints.best()}"
        done = {"data": self.config["data"], "checkpoint": output}
        if manifest.count_targets("test") == 0:
            following = next_line("export", {**done, "output": "EXPORT_FOLDER"})
        else:
            following = next_line("evaluate", {**done, "output": f"{output}/test.json", "split": "test"})
        found = self.checkpoints.best() or self.checkpoints.latest()
        repeats = "" if found is None else f"\nRepeat {describe_bias(Progress.of_checkpoint(found).repeat_bias)}"
        curves = f"tensorboard --logdir {shlex.quote(f'{output}/tensorboard')}"
        return f"Trained: {trained}{repeats}\nCurves:  {curves}\n{following}"


def describe_users(manifest: Manifest, sample: int) -> str:
    """The users that are validated on, in words; `sample`: number of users, 0: all."""
    users = manifest.count_targets("validation")
    if not sample:
        return "all users" if users is None else f"all {users:,} users"
    return f"a sample of {sample:,} users" if users is None else f"{sample:,} of {users:,} users (sample)"


def _suggest_way(config: Any, recorded: dict[str, Any], differing: list[str]) -> str:
    """What to do where an output folder holds a run with other options."""
    ends = [recorded[f"train.{name}"] for name in ("epochs", "steps")]
    longer = len(differing) == 1 and any(
        type(end) is int and given > end
        for end, given in zip(ends, (config.train.epochs, config.train.steps), strict=True)
    )
    if not longer or not Checkpoints(config.output, 1).latest():
        return "choose another --output, or the same options"
    unit = "step" if config.train.steps else "epoch"
    ended, asked = (ends[1], config.train.steps) if config.train.steps else (ends[0], config.train.epochs)
    new = f"{config.output.rstrip('/')}_{asked}_{unit}s"
    options = {**given_options(config), "output": new}
    options.pop("preset", None)  # what it chose is among the options
    why = f"its learning-rate schedule ends with its last {unit}"
    if hasattr(config, "initial"):
        options |= {"initial": config.output, f"train.{unit}s": asked - ended}
        return f"{why}. {asked - ended} more, from its model, in a run of their own: {command('pretrain', options)}"
    return f"{why}. Tune again for {asked}: {command('prompt_tune', options)}"


@contextmanager
def _lock_folder(output: str) -> Iterator[None]:
    """Lock a run's folder against other jobs, where the file system can; the end of the process releases it."""
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
                f"{output} is being trained by another job (rank 0 is {who or 'unknown'}); wait until it has "
                f"ended, end it, or choose another --output. If that process no longer exists, remove {path}"
            ) from None
        except OSError:
            pass
        with suppress(OSError):  # the lock holds without this text, and on a full disk cleaning up must still run
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(handle)
