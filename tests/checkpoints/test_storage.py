"""Datasets, runs, evaluations and exports on a real S3 server, and on a local disk that is full."""

import contextlib
import json
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import METADATA, Checkpoints, find_checkpoint
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.reading.reader import Damage, Reader, SetAside
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.parts import _PartWriter
from tests.object_store import BUCKET, Server, server
from tests.support import SMALL, stage, walks, write_dataset
from tools.ranks import RankFailed, run_ranks

needs_moto = pytest.mark.skipif(find_spec("moto") is None, reason="moto[server] is not installed")

TRAINING = {**SMALL, "--saving.every_steps": 4, "--saving.keep": 2, "--train.precision": "fp32"}


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


def run_stage(
    rank: int, world_size: int, name: str, options: dict[str, Any], moment: tuple[str, int, int] | None = None
) -> tuple[int, str]:
    """A stage as its command line runs it: its exit status, and what it said on standard error.

    Args:
        rank, world_size: of the launcher; the stage makes a group of its own.
        name: of the stage.
        options: of the stage.
        moment: (file, n, process): when a checkpoint's file of that name is written for the nth time, this process
            ends at once, before; or (process is not 0) that process is killed, after.
    """
    dist.destroy_process_group()
    del os.environ["WORLD_SIZE"]
    if moment is not None:
        _watch(*moment)
    with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stderr(said):
        status = stage(name, options)
        said.seek(0)
        return status, said.read()


def _watch(name: str, number: int, process: int) -> None:
    write, times = storage.write_json, iter(range(1, 10_000))

    def watched(path: str, value: Any, sealed: bool = True) -> None:
        now = os.path.basename(path) == name and next(times) == number
        if now and not process:
            os._exit(1)
        write(path, value)
        if now:
            os.kill(process, signal.SIGKILL)

    storage.write_json = watched


def steps(output: str) -> list[str]:
    """Names of the whole checkpoints."""
    return [os.path.basename(path) for path in Checkpoints(output, keep=2).list_committed()]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a raw log, a dataset, and a run on it."""
    folder = tmp_path_factory.mktemp("local")
    rows = [f"u{u},i{i},{t}" for u, history in enumerate(walks(60, 30, longest=14)) for t, i in enumerate(history)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    assert stage("prepare", {"--input": folder / "log.csv", "--output": folder / "data", "--min_count": 2}) == 0
    train = {**TRAINING, "--data": folder / "data", "--output": folder / "run"}
    ((status, said),) = run_ranks(run_stage, 1, "pretrain", train)
    assert status == 0, said
    return folder


@needs_moto
def test_all_stages_give_the_same_results_on_an_object_store_and_on_a_local_disk(local: Path, s3: Server) -> None:
    place = f"s3://{BUCKET}"
    run = f"{place}/run"
    storage.write(f"{place}/raw/log.csv", (local / "log.csv").read_bytes())
    assert stage("prepare", {"--input": f"{place}/raw", "--output": f"{place}/data", "--min_count": 2}) == 0
    train = {**TRAINING, "--data": f"{place}/data", "--output": run}
    # An end in the midst: all tensors of the third checkpoint are on the store, but not what makes it one.
    with pytest.raises(RankFailed, match="exit code 1"):
        run_ranks(run_stage, 1, "pretrain", train, (METADATA, 3, 0))
    assert steps(run) == ["step-00000004", "step-00000006"]
    assert storage.names(f"{run}/checkpoints") == ["step-00000004", "step-00000006", "step-00000008"]
    assert find_checkpoint(run) == f"{run}/checkpoints/step-00000006"
    ((status, said),) = run_ranks(run_stage, 1, "pretrain", train)
    assert status == 0, said
    on_disk, on_store = results(str(local)), results(place)
    for name in ("checkpoints", "epochs", "vocabulary"):
        assert on_disk[name] == on_store[name]
    assert on_store["best"] == {**on_disk["best"], "value": pytest.approx(on_disk["best"]["value"], abs=1e-5)}
    for path, protocols in on_disk["recall"].items():
        for how, figures in protocols.items():
            assert on_store["recall"][path][how] == pytest.approx(figures, abs=1e-5)
    np.testing.assert_allclose(on_store["items"], on_disk["items"], atol=1e-5)
    assert on_disk["index"] == on_store["index"] == [1.0, 1.0]


def results(place: str) -> dict[str, Any]:
    """What a run, its evaluation and its export hold."""
    data, run, out, vectors = (f"{place}/{name}" for name in ("data", "run", "test.json", "vectors"))
    for name, options in {
        "evaluate": {"--data": data, "--checkpoint": run, "--output": out, "--split": "test"},
        "export": {"--data": data, "--checkpoint": run, "--output": vectors, "--index.kind": "ivf"},
    }.items():
        ((status, said),) = run_ranks(run_stage, 1, name, options)
        assert status == 0, said
    assert storage.names(f"{run}/tensorboard")
    assert not [name for folder in (data, vectors) for name in storage.names(folder) if name.startswith(".")]
    index = open_export(vectors).manifest.index
    assert index is not None
    return {
        "best": storage.read_json(f"{run}/best.json"),
        "checkpoints": storage.names(f"{run}/checkpoints"),
        "epochs": [json.loads(line)["epoch"] for line in storage.read(f"{run}/history.jsonl").splitlines()],
        "recall": json.loads(storage.read(out))["results"],
        "items": open_export(vectors).item_vectors()[1],
        "index": [index.measured[f"recall@{k}"] for k in (10, 50)],
        "vocabulary": Dataset.open(data).manifest.vocabulary,
    }


@needs_moto
def test_a_dataset_that_a_kill_left_half_written_is_overwritten(s3: Server) -> None:
    folder = f"s3://{BUCKET}/half"
    storage.write(f"{folder}/sequences/part-00000.parquet", b"half")
    with pytest.raises(InputError, match="already holds something"):
        folders.check_free(folder, "dataset")
    storage.write(f"{folder}/{folders.INCOMPLETE}", b"")
    folders.check_free(folder, "dataset")
    with folders.stage_folder(folder) as (fs, root):
        assert storage.names(folder) == [folders.INCOMPLETE]
        with fs.open_output_stream(f"{root}/manifest.json") as stream:
            stream.write(b"{}")
    assert storage.names(folder) == ["manifest.json"]


@needs_moto
def test_damaged_rows_are_listed_once_on_a_store(tmp_path: Path, s3: Server) -> None:
    damages = [Damage("sequences/part-00000.parquet", 0, row, 1, "has no items") for row in (3, 4)]
    for path in (str(tmp_path / "damaged.jsonl"), f"s3://{BUCKET}/damaged.jsonl"):
        lists = SetAside(path, limit=2), SetAside(path, limit=2)
        assert lists[0].listed() == []
        lists[0].add(damages[:1])
        lists[1].add(damages)
        assert sorted(lists[0].listed()) == damages
        with pytest.raises(InputError, match="3 rows are damaged, listed in"):
            lists[0].add([Damage("sequences/part-00001.parquet", None, None, 1, "is missing")])


def test_a_dataset_whose_store_does_not_answer_is_not_reported_as_damaged(tmp_path: Path, monkeypatch: Any) -> None:
    dataset = write_dataset(tmp_path / "data", walks(20, 10), items=10)
    groups, there = row_groups(dataset), SetAside(str(tmp_path / "damaged.jsonl"), limit=100)
    (tmp_path / "data" / dataset.manifest.sequences[0].path).unlink()

    def silent(path: str) -> bool:
        raise OSError("NETWORK_CONNECTION")

    monkeypatch.setattr(storage, "exists", silent)
    with pytest.raises(InputError, match="data cannot be reached: NETWORK_CONNECTION"):
        Reader(dataset, set_aside=there).read(groups[0])
    assert there.listed() == []


@needs_moto
def test_a_store_that_goes_away_ends_the_run_with_an_error_that_says_so(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", walks(60, 30, shortest=1, longest=14), items=30)
    options = {**TRAINING, "--data": tmp_path / "data", "--output": f"s3://{BUCKET}/run"}
    with server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        moment = (METADATA, 2, running.process.pid)
        ((status, said),) = run_ranks(run_stage, 1, "pretrain", options, moment)
    assert status == 2
    assert f"pretrain: error: cannot write a checkpoint to s3://{BUCKET}/run/checkpoints: " in said
    assert "resumes from the newest complete one" in said and "Traceback" not in said


def test_a_small_file_that_cannot_be_written_keeps_its_old_content(tmp_path: Path, monkeypatch: Any) -> None:
    path = str(tmp_path / "best.json")
    storage.write(path, b"old")

    def full(handle: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        storage.write(path, b"new")
    assert storage.read(path) == b"old"
    storage.write(path, b"new")
    assert storage.read(path) == b"new"


def full_disk(rank: int, world_size: int, name: str, options: dict[str, Any]) -> tuple[int, str]:
    """A stage on a disk that is full once the stage writes its result: to it, a limit on the size of files is alike."""
    write = _PartWriter.write

    def limited(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        write(*args)

    _PartWriter.write = limited  # type: ignore
    return run_stage(rank, world_size, name, options)


def test_a_full_disk_leaves_no_half_dataset_and_no_half_export(local: Path) -> None:
    stages: dict[str, dict[str, Any]] = {
        "prepare": {"--input": local / "log.csv", "--min_count": 2, "--output": local / "more_data"},
        "export": {"--data": local / "data", "--checkpoint": local / "run", "--output": local / "more_vectors"},
    }
    for name, options in stages.items():
        before = set(os.listdir(local))
        ((status, said),) = run_ranks(full_disk, 1, name, options)
        assert status == 2 and f"{name}: error: cannot write {options['--output']}: " in said, said
        assert "too large" in said
        assert set(os.listdir(local)) == before
