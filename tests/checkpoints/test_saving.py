"""Asynchronous saving: writes the state of the call, reports failures, and survives a kill at any moment."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints import folder, saving
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.config import Loss, Model, Pretrain, Saving, Tables, Train, TrainingBatch
from recgpt_torchrec.errors import InputError
from tests.support import read_epochs, walks, write_dataset
from tools.ranks import RankFailed, run_ranks

# ------------------------------------------------------------------------------------------------ one saver, two ranks


def values(number: float) -> dict[str, Any]:
    """A state of one small tensor that all ranks have, and a larger one of each rank's own."""
    return {
        "shared": torch.full((3,), number),
        f"own{dist.get_rank()}": torch.full((300_000,), number + dist.get_rank()),
    }


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(os.listdir(checkpoints.folder))


def use_a_saver(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    checkpoints = Checkpoints(folder, keep=2)
    saver = Saver(checkpoints, Saving())
    seen: dict[str, Any] = {}

    # Written beside the training: the state changes while the writing is held up.
    go, write = threading.Event(), dcp.save

    def held_up(*args: Any, **more: Any) -> Any:
        assert go.wait(60)
        return write(*args, **more)

    saving.dcp.save = held_up
    state = values(1)
    saver.save(1, state, {"step": 1})
    seen["meanwhile"] = saver.is_writing, checkpoints.list_committed()
    for tensor in state.values():
        tensor.zero_()
    go.set()
    saver.finish()
    saving.dcp.save = write
    read = values(0)
    dcp.load(read, checkpoint_id=checkpoints.latest())
    seen["as it was"] = all(torch.equal(read[name], value) for name, value in values(1).items())

    # The same step again, now the best one: only its metadata is written.
    (tensors,) = [p for p in Path(checkpoints.path(1)).iterdir() if p.name.startswith(f"__{rank}_")]
    before = tensors.stat().st_mtime_ns
    saver.save(1, values(7), {"step": 1, "best": {"checkpoint": "step-00000001", "value": 0.5}})
    saver.finish()
    seen["again"] = checkpoints.best(), tensors.stat().st_mtime_ns == before

    for step in (2, 3, 4):
        saver.save(step, values(step), {"step": step, "best": {"checkpoint": "step-00000001", "value": 0.5}})
    saver.finish()
    seen["kept"] = names(checkpoints)
    dist.barrier()

    # One rank's disk is full: to the file system a limit on the size of files looks alike.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limit[1]))
    saver.save(5, values(5), {"step": 5})
    while saver.is_writing:
        pass
    dist.barrier()
    seen["asks"] = saver.requests_checkpoint()
    with pytest.raises(InputError) as failure:
        saver.save(6, values(6), {"step": 6})
    dist.barrier()
    seen["said"], seen["left"] = str(failure.value), names(checkpoints)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return seen


def test_two_ranks_save_the_state_of_the_call_while_training_continues(tmp_path):
    for seen in run_ranks(use_a_saver, 2, str(tmp_path)):
        assert seen["meanwhile"] == (True, [])
        assert seen["as it was"]
        assert seen["again"] == (str(tmp_path / "checkpoints" / "step-00000001"), True)
        assert seen["kept"] == ["step-00000001", "step-00000003", "step-00000004"]  # the best, and the newest two
        assert seen["asks"]
        assert f"cannot write a checkpoint to {tmp_path}/checkpoints (rank 1): " in seen["said"]
        assert "MiB free" in seen["said"]
        assert f"resumes from {tmp_path}/checkpoints/step-00000004" in seen["said"]
        assert seen["left"] == seen["kept"]


def save_watched(rank: int, world_size: int, folder: str) -> list[tuple[str, str, str]]:
    """What this rank asks of the disk while a checkpoint is saved: (sync, path, "") or (rename, from, to), in order."""
    asked: list[tuple[str, str, str]] = []
    sync = os.fsync

    def synced(handle: int) -> None:
        sync(handle)
        asked.append(("sync", os.readlink(f"/proc/self/fd/{handle}"), ""))

    def renaming(name: str) -> Callable[..., None]:
        call = getattr(os, name)

        def renamed(source: Any, target: Any) -> None:
            asked.append(("rename", os.fspath(source), os.fspath(target)))
            call(source, target)

        return renamed

    os.fsync, os.rename, os.replace = synced, renaming("rename"), renaming("replace")  # type: ignore[assignment]
    saver = Saver(Checkpoints(folder, keep=2), Saving())
    saver.save(1, values(1), {"best": {"checkpoint": "step-00000001"}})
    saver.finish()
    return asked


def test_a_checkpoint_is_synced_to_disk_before_it_gets_its_final_name(tmp_path):
    ranks = run_ranks(save_watched, 2, str(tmp_path))
    folder, whole = tmp_path / "checkpoints", tmp_path / "checkpoints/step-00000001"
    temporary = f"{whole}.tmp"
    counts = ranks[0].index(("rename", temporary, str(whole)))
    before = [*ranks[0][:counts], *ranks[1]]  # rank 1 is done with its part, or this rank would not continue
    durable = {path for what, path, _ in before if what == "sync"}
    durable |= {to for what, path, to in before if what == "rename" and path in durable}
    assert {path.name for path in whole.iterdir()} >= {".metadata", "checkpoint.json", "__0_0.distcp", "__1_0.distcp"}
    assert {f"{temporary}/{path.name}" for path in whole.iterdir()} | {temporary} <= durable
    best = str(tmp_path / "best.json")
    after = [("sync", str(folder), ""), ("sync", f"{best}.tmp", ""), ("rename", f"{best}.tmp", best)]
    assert ranks[0][counts + 1 :] == after


# ------------------------------------------------------------------------------------------------ a kill at any moment


def pretrain(rank: int, world_size: int, data: str, output: str, kill: str | None, options: dict[str, Any]) -> None:
    """The stage `pretrain` in this process, which kills itself at a certain moment."""
    from recgpt_torchrec import pretrain as stage

    dist.destroy_process_group()
    del os.environ["WORLD_SIZE"]  # no launcher: a group of its own
    if kill is not None:
        KILLS[kill]()
    stage.main(
        Pretrain(
            data=data,
            output=output,
            model=Model(dim=8, max_len=10, layers=1),
            loss=Loss(negatives=10),
            batch=TrainingBatch(tokens=60),
            tables=Tables(lr=0.01),  # slow, so that each epoch is better than the one before
            train=Train(epochs=3, precision="fp32"),  # auto measures, and may choose another the next time
            **options,
        )
    )


def die(*args: Any, **more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(module: Any, name: str, when: Callable[..., bool], after: bool = False) -> Callable[[], None]:
    """Die in a call of `module.name`, before or after it is done, the first time that `when` says so."""

    def arm() -> None:
        call = getattr(module, name)

        def watched(*args: Any, **more: Any) -> Any:
            if not after and when(*args):
                die()
            result = call(*args, **more)
            if after and when(*args):
                die()
            return result

        setattr(module, name, watched)

    return arm


def counted(number: int) -> Callable[..., bool]:
    calls = iter(range(1, 10_000))
    return lambda *args: next(calls) == number


def writes(name: str, number: int) -> Callable[..., bool]:
    """The `number`th time that a file of that name is written."""
    calls = counted(number)
    return lambda path, *args: os.path.basename(path) == name and calls()


def commits(number: int) -> Callable[..., bool]:
    """The `number`th time that a checkpoint is renamed to its final name."""
    calls = counted(number)
    return lambda source, target: is_temporary(source) and calls()


def is_temporary(path: Any) -> bool:
    return bool(re.fullmatch(r"step-\d+\.tmp", os.path.basename(path)))


def half_deleted(path: str, *args: Any) -> bool:
    """Delete a file of a whole checkpoint, and say that it is time to die."""
    if not os.path.exists(os.path.join(path, "checkpoint.json")):
        return False  # what an earlier kill left
    os.unlink(os.path.join(path, "checkpoint.json"))
    return True


KILLS = {
    "with half a checkpoint written": at(saving.dcp, "save", counted(3), after=True),
    "before it counts": at(folder.os, "rename", commits(3)),
    "before its epoch is known to be the best": at(storage, "write_json", writes("best.json", 1)),
    "before an old one is dropped": at(folder.os, "rename", lambda source, target: is_temporary(target)),
    "with half an old one dropped": at(folder.shutil, "rmtree", half_deleted),
    "between the line of an epoch and its checkpoint": at(Saver, "save", lambda self, step, state, known: epoch(known)),
}


def epoch(metadata: dict[str, Any]) -> bool:
    position = metadata["progress"]["position"]
    return position["queues"] is None and position["epoch"] == 3


def test_a_run_killed_at_any_moment_resumes_to_the_same_result(tmp_path):
    data, whole, killed = (tmp_path / name for name in ("data", "whole", "killed"))
    write_dataset(data, walks(60, 30, shortest=1, longest=14), items=30, rows_per_group=8)
    options = {"saving": Saving(every_steps=2, keep=2)}
    run_ranks(pretrain, 1, str(data), str(whole), None, options)
    reached = []
    for moment in KILLS:
        with pytest.raises(RankFailed, match="exit code -9"):
            run_ranks(pretrain, 1, str(data), str(killed), moment, options)
        latest = Checkpoints(str(killed), keep=2).latest()
        reached.append(os.path.basename(latest or ""))
    assert reached[0] and reached == sorted(reached), reached  # never lost, never behind
    run_ranks(pretrain, 1, str(data), str(killed), None, options)

    known = {"epoch", "step"}
    assert [{k: line[k] for k in known} for line in read_epochs(killed)] == [
        {k: line[k] for k in known} for line in read_epochs(whole)
    ]
    for mine, theirs in zip(read_epochs(killed), read_epochs(whole), strict=True):
        assert mine["NDCG@10"] == pytest.approx(theirs["NDCG@10"], abs=1e-5)
    best, other = (storage.read_json(str(folder / "best.json")) for folder in (killed, whole))
    assert best is not None and other is not None
    assert best == {**other, "value": pytest.approx(other["value"], abs=1e-5)}
    assert names(Checkpoints(str(killed), 2)) == names(Checkpoints(str(whole), 2))


# ------------------------------------------------------------------------------------------------ what follows from it


def checkpoint_folder(checkpoints: Checkpoints, step: int, metadata: dict[str, Any]) -> None:
    checkpoints.start(step)
    checkpoints.commit(step, metadata)


def test_what_a_kill_left_undone_is_made_up_for(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoint_folder(checkpoints, 1, {"best": {"checkpoint": "step-00000001", "value": 0.1}})
    shutil.copytree(checkpoints.path(1), checkpoints.path(2))
    (Path(checkpoints.path(2)) / "checkpoint.json").write_text(
        json.dumps({"best": {"checkpoint": "step-00000002", "value": 0.2}})
    )
    checkpoints.start(3)
    assert checkpoints.best() == checkpoints.path(1) and checkpoints.latest() == checkpoints.path(2)
    checkpoints.clean_up()
    assert checkpoints.best() == checkpoints.path(2)
    assert names(checkpoints) == ["step-00000002"]
    assert storage.read_json(str(tmp_path / "best.json")) == {"checkpoint": "step-00000002", "value": 0.2}


def test_a_best_checkpoint_of_an_earlier_version_stays_the_best(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    for step in (1, 2):
        checkpoints.start(step)
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "best.json").unlink()
        os.rename(checkpoints.temporary_path(step), checkpoints.path(step))
        (Path(checkpoints.path(step)) / "checkpoint.json").write_text(json.dumps({"best": {"epoch": 1, "value": 0.1}}))
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "step-00000001", "epoch": 1, "value": 0.1}))
    checkpoints.clean_up()
    assert checkpoints.best() == checkpoints.path(1)
    assert names(checkpoints) == ["step-00000001", "step-00000002"]
