"""A run resumes with the same options, also if an earlier version that lacked some of them started it."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.config import Loss, Model, Pretrain, PromptTune, Tables
from recgpt_torchrec.distributed.processes import process_group
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training.run import RUN, Run
from recgpt_torchrec.training.runlog import RunLog
from tests.support import change_json
from tests.training.test_runlog import SPEED


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with process_group():
        yield


def start_run(config: Any, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Start a run, and change its recorded options."""
    with Run.find(config, "vocabulary", "histories", keep=1).claim_folder():
        pass
    change_json(Path(config.output) / RUN, lambda record: change(record["config"]))


def test_an_option_missing_from_the_record_counts_as_its_default(tmp_path: Path) -> None:
    config = Pretrain(data="data", output=str(tmp_path / "run"), model=Model(dim=8), tables=Tables(lr=0.5))
    start_run(config, lambda old: [old.pop("targets"), old["loss"].pop("candidates"), old["tables"].pop("lr")])
    with pytest.raises(InputError, match=r"other options(.|\n)*--tables.lr: 0.05 there, 0.5 now"):
        Run.find(config, "vocabulary", "histories", keep=1)
    config.tables.lr = Tables().lr
    Run.find(config, "vocabulary", "histories", keep=1)
    config.loss = Loss(candidates="in_batch")
    with pytest.raises(InputError, match="--loss.candidates: sampled there, in_batch now"):
        Run.find(config, "vocabulary", "histories", keep=1)


def test_defaults_are_those_of_the_stage(tmp_path: Path) -> None:
    config = PromptTune(data="data", checkpoint="base", output=str(tmp_path / "run"), model=Model(dim=8))
    start_run(config, lambda old: [old["tables"].pop("lr"), old["model"].pop("heads")])
    Run.find(config, "vocabulary", "histories", keep=1)
    config.tables.lr = Tables().lr
    with pytest.raises(InputError, match="--tables.lr: 0.02 there"):
        Run.find(config, "vocabulary", "histories", keep=1)


def test_another_value_and_another_dataset_are_refused(tmp_path: Path) -> None:
    config = Pretrain(data="data", output=str(tmp_path / "run"))
    start_run(config)
    config.saving.keep, config.stream.workers = 7, 2  # may change
    Run.find(config, "vocabulary", "histories", keep=7)
    with pytest.raises(InputError, match="run on another dataset"):
        Run.find(config, "another", "histories", keep=7)
    config.data = "elsewhere"  # may change as well, but not what is there
    Run.find(config, "vocabulary", "histories", keep=7)
    with pytest.raises(InputError, match="elsewhere is not as .* was when the run started"):
        Run.find(config, "vocabulary", "others", keep=7)
    config.seed = 1
    with pytest.raises(InputError, match=r"--seed: 0 there, 1 now"):
        Run.find(config, "vocabulary", "histories", keep=7)


def test_a_run_that_named_its_groups_as_earlier_versions_did_is_resumed(tmp_path: Path) -> None:
    pretrain = Pretrain(data="data", output=str(tmp_path / "run"))
    start_run(pretrain, lambda old: old.update(checkpoint={**old.pop("saving"), "keep": 5}))
    Run.find(pretrain, "vocabulary", "histories", keep=1)
    tune = PromptTune(data="data", checkpoint="base", output=str(tmp_path / "tuned"), model=Model(dim=8))
    start_run(tune, lambda old: old.update(checkpointing={**old.pop("saving"), "keep": 5}))
    Run.find(tune, "vocabulary", "histories", keep=1)
    tune.checkpoint = "other"  # a path, not the group
    with pytest.raises(InputError, match="--checkpoint: base there, other now"):
        Run.find(tune, "vocabulary", "histories", keep=1)


def test_a_recorded_option_that_no_longer_exists_is_named(tmp_path: Path) -> None:
    config = Pretrain(data="data", output=str(tmp_path / "run"))
    start_run(config, lambda old: old["loss"].update(temper=3))
    with pytest.raises(InputError, match="--loss.temper: 3 there, None now"):
        Run.find(config, "vocabulary", "histories", keep=1)


def test_a_run_that_another_job_trains_is_refused_until_that_has_ended(tmp_path: Path) -> None:
    config = Pretrain(data="data", output=str(tmp_path / "run"))
    with Run.find(config, "vocabulary", "histories", keep=1).claim_folder():
        again = Run.find(config, "vocabulary", "histories", keep=1)
        with (
            pytest.raises(InputError, match=rf"by another job \(rank 0 is process {os.getpid()} on "),
            again.claim_folder(),
        ):
            pass
    (tmp_path / "run" / RUN).unlink()  # as a kill right after the lock leaves it
    with Run.find(config, "vocabulary", "histories", keep=1).claim_folder():
        assert (tmp_path / "run" / RUN).exists()


def test_a_full_disk_is_named_when_curves_and_figures_cannot_be_written(tmp_path: Path, capfd: Any) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))  # to who writes it looks alike
        with pytest.raises(InputError, match=rf"cannot write to {tmp_path}: .*Make room"):
            RunLog(str(tmp_path), 10, 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        with (
            pytest.raises(InputError, match=rf"cannot write to {tmp_path}: .*Make room"),
            RunLog(str(tmp_path), 10, 0) as log,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
            log.log_epoch({"epoch": 1, "loss": 0.5}, SPEED, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "Traceback" not in capfd.readouterr().err


def test_incomplete_lines_of_a_history_are_dropped(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    history.write_bytes(b'{"epoch": 1}\n' + b"\0" * 9 + b'\n\xff\n[]\n{"epoch": 3}\n{"epoch": 2}\n{"epoch": 2}')
    with RunLog(str(tmp_path), 10, 0, epochs=2):
        assert history.read_bytes() == b'{"epoch": 1}\n{"epoch": 2}\n'


@pytest.mark.parametrize("validated", [False, True])
def test_a_run_of_a_version_that_did_not_validate_the_start_resumes(tmp_path: Path, validated: bool) -> None:
    config = PromptTune(data="data", checkpoint="run", output=str(tmp_path / "run"))
    start_run(config)
    change_json(tmp_path / "run" / RUN, lambda record: record["config"]["train"].pop("validate_start"))
    config.train.validate_start = validated
    Run.find(config, "vocabulary", "histories", keep=1)


def test_a_run_of_a_version_that_did_not_record_the_histories_resumes(tmp_path: Path) -> None:
    config = Pretrain(data="data", output=str(tmp_path / "run"))
    start_run(config)
    path = tmp_path / "run" / RUN
    change_json(path, lambda record: record.pop("histories"))
    Run.find(config, "vocabulary", "others", keep=1)
