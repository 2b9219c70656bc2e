"""What depends on a folder is rank 0's decision: the other ranks may see an older state of it, as on NFS."""

from typing import Any

import torch

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints import folder as folders
from recgpt_torchrec.checkpoints.folder import Checkpoints, checkpoint_fingerprint, find_checkpoint
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.config import Pretrain, Saving
from recgpt_torchrec.training import run as training_run
from recgpt_torchrec.training import trainer as trainers
from recgpt_torchrec.training.run import Run
from recgpt_torchrec.training.trainer import Trainer
from tools.ranks import run_ranks

PROGRESS = {"position": {"epoch": 3, "queues": None}, "step": 7}


def look(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    config = Pretrain(data="", output=folder)
    with Run.find(config, "v", "h", 2, step_tokens=64).claim_folder():
        pass
    with Saver(Checkpoints(folder, keep=2), Saving()) as saver:
        for step in (6, 7):
            saver.save(step, {"tensor": torch.arange(10.0)}, {"progress": PROGRESS})
    if rank == 1:  # it still sees the folder as it was before the run
        storage.names = lambda folder: []
        storage.exists = lambda path: False
        storage.read_json = training_run.read_json = lambda path: None
    # That it comes into sight is a test of the shared disk.
    folders.await_checkpoint = trainers.await_checkpoint = lambda checkpoint: None
    checkpoint = find_checkpoint(folder)

    def restored(model: Any, optimizer: Any, path: str, steps: int) -> None:
        assert (path, steps) == (checkpoint, 7)

    trainers.restore = restored  # type: ignore[assignment]
    blank = object.__new__(Trainer)
    blank.model, blank.optimizer, blank.saver = None, None, saver  # type: ignore[assignment]
    blank.resume(checkpoint)
    found = Run.find(config, "v", "h", 2)
    return {
        "checkpoint": checkpoint,
        "fingerprint": checkpoint_fingerprint(checkpoint),
        "progress": blank.progress,
        "run": (found.initial, found.histories),
    }


def test_all_ranks_go_on_from_what_rank_0_finds(tmp_path):
    first, second = run_ranks(look, 2, str(tmp_path / "run"))
    assert first == second
    assert first["checkpoint"].endswith("step-00000007")
    assert first["progress"].step == 7 and first["progress"].position.epoch == 3
    (alone,) = run_ranks(fingerprint, 1, first["checkpoint"])
    assert first["fingerprint"] == alone


def fingerprint(rank: int, world_size: int, checkpoint: str) -> str:
    return checkpoint_fingerprint(checkpoint)
