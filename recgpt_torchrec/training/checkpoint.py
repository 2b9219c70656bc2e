"""Checkpoints of a run: torch.distributed.checkpoint folders that count only once they are committed.

    OUTPUT/checkpoints/step-00001200/   the distributed checkpoint, and checkpoint.json, written last
    OUTPUT/best.json                    which of them is best on validation

A checkpoint is written under a temporary name and renamed when it is whole; readers look at nothing else. Tables and
optimizer state are saved by name and offset, so that another number of ranks or another sharding can read them.
"""

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.training.processes import rank

FACTS = "checkpoint.json"
BEST = "best.json"
FOLDER = "checkpoints"


def write_json(path: str, value: Any) -> None:
    """Write a JSON file so that readers see the old one or the new one, never a part."""
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def read_json(path: str) -> Any:
    """Read a JSON file; None where there is none."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


@dataclass
class Checkpoints:
    """The checkpoints of one run's output folder."""

    output: str
    keep: int
    """Newest checkpoints kept, beside the best one."""

    @property
    def folder(self) -> str:
        """Where the checkpoints lie."""
        return os.path.join(self.output, FOLDER)

    def committed(self) -> list[str]:
        """Paths of the checkpoints that are whole, oldest first."""
        if not os.path.isdir(self.folder):
            return []
        names = sorted(n for n in os.listdir(self.folder) if n.startswith("step-") and not n.endswith(".tmp"))
        paths = [os.path.join(self.folder, name) for name in names]
        return [path for path in paths if os.path.exists(os.path.join(path, FACTS))]

    def latest(self) -> str | None:
        """The newest whole checkpoint."""
        return next(reversed(self.committed()), None)

    def best(self) -> str | None:
        """The checkpoint that did best on validation."""
        found = read_json(os.path.join(self.output, BEST))
        path = found and os.path.join(self.folder, found["checkpoint"])
        return path if path and os.path.exists(os.path.join(path, FACTS)) else None

    def save(self, step: int, state: dict[str, Any], facts: dict[str, Any], best: bool = False) -> str:
        """Write a checkpoint on all ranks, commit it, and drop the ones that are not kept.

        Args:
            step: optimizer steps done; names the checkpoint.
            state: what torch.distributed.checkpoint saves (the same structure on every rank).
            facts: JSON values that readers need before they build a model.
            best: also remember it as the best one.
        """
        path = os.path.join(self.folder, f"step-{step:08d}")
        temporary = path + ".tmp"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
        dist.barrier()
        dcp.save(state, checkpoint_id=temporary)
        if rank() == 0:
            write_json(os.path.join(temporary, FACTS), facts)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(temporary, path)
            if best:
                write_json(os.path.join(self.output, BEST), {"checkpoint": os.path.basename(path), **facts["best"]})
            self._drop_old()
        dist.barrier()
        return path

    def _drop_old(self) -> None:
        whole, best = self.committed(), self.best()
        for path in whole[: -self.keep] if self.keep else whole[:-1]:
            if path != best:
                shutil.rmtree(path)


def facts_of(checkpoint: str) -> dict[str, Any]:
    """The facts of a checkpoint folder.

    Raises:
        InputError: it is not a whole checkpoint.
    """
    facts = read_json(os.path.join(checkpoint, FACTS))
    if facts is None:
        raise InputError(f"{checkpoint} is not a finished checkpoint: it has no {FACTS}")
    return facts


def find(path: str) -> str:
    """The checkpoint folder that `path` means: itself, or the best (else the newest) of a run's output folder.

    Raises:
        InputError: there is none.
    """
    if os.path.exists(os.path.join(path, FACTS)):
        return path
    checkpoints = Checkpoints(path, keep=0)
    found = checkpoints.best() or checkpoints.latest()
    if found is None:
        raise InputError(
            f"{path} holds no finished checkpoint; give a run's output folder or one of its {FOLDER}/step-* folders"
        )
    return found


def fingerprint(checkpoint: str) -> str:
    """32 hex digits of everything in a checkpoint folder, wherever it lies (collective: ranks share the files out)."""
    names = sorted(os.listdir(checkpoint))
    rank_, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [(name, _crc(os.path.join(checkpoint, name))) for name in names[rank_::world_size]]
    shares: list[list[tuple[str, int]]] = [mine]
    if dist.is_initialized():
        shares = [[] for _ in range(world_size)]
        dist.all_gather_object(shares, mine)
    return hashlib.sha256(repr(sorted(pair for share in shares for pair in share)).encode()).hexdigest()[:32]


def _crc(path: str) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc
