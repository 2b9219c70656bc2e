"""Checkpoints of a run on disk: torch.distributed.checkpoint folders that count only once they are committed.

    OUTPUT/checkpoints/step-00001200/   the distributed checkpoint, and checkpoint.json, written last
    OUTPUT/best.json                    which of them is best on validation

A checkpoint is written under a temporary name and renamed when it is whole; readers look at nothing else. Whatever
comes after the rename (best.json, dropping old ones) follows from the checkpoints, so that it can be made up for after
a kill. `saving` writes them, `state` says what is in them.
"""

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from recgpt_torchrec.errors import InputError

FACTS = "checkpoint.json"
BEST = "best.json"
FOLDER = "checkpoints"
TEMPORARY = ".tmp"


def write_json(path: str, value: Any) -> None:
    """Write a JSON file so that readers see the old one or the new one, never a part."""
    with open(path + ".tmp", "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def read_json(path: str) -> Any:
    """Read a JSON object; None where there is no file.

    Raises:
        InputError: it is damaged.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path) as file:
            value = json.load(file)
    except ValueError as error:
        value, reason = None, str(error)
    else:
        reason = "not an object"
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged ({reason}); restore it, or remove what it belongs to: an older one counts")
    return value


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

    def path(self, step: int) -> str:
        """Where the checkpoint lies that is made after `step` steps."""
        return os.path.join(self.folder, f"step-{step:08d}")

    def temporary(self, step: int) -> str:
        """Where it is written before it counts."""
        return self.path(step) + TEMPORARY

    def committed(self) -> list[str]:
        """Paths of the checkpoints that are whole, oldest first."""
        paths = [path for path in self._all() if not path.endswith(TEMPORARY)]
        return [path for path in paths if os.path.exists(os.path.join(path, FACTS))]

    def _all(self) -> list[str]:
        if not os.path.isdir(self.folder):
            return []
        return [os.path.join(self.folder, name) for name in sorted(os.listdir(self.folder)) if name.startswith("step-")]

    def latest(self) -> str | None:
        """The newest whole checkpoint."""
        return next(reversed(self.committed()), None)

    def best(self) -> str | None:
        """The checkpoint that did best on validation."""
        found = read_json(os.path.join(self.output, BEST))
        path = found and os.path.join(self.folder, found["checkpoint"])
        return path if path and os.path.exists(os.path.join(path, FACTS)) else None

    def begin(self, step: int) -> None:
        """Make an empty folder to write a checkpoint into, `temporary` (on one rank)."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)
        os.makedirs(self.temporary(step))

    def commit(self, step: int, facts: dict[str, Any]) -> None:
        """Make what was written after `begin` a checkpoint, and settle what follows from it (on one rank).

        Where the step has a checkpoint already only its facts are written: nothing was trained in between, and at no
        moment may there be none.

        Args:
            step: optimizer steps done.
            facts: JSON values that readers need before they build a model. `best` among them holds what becomes
                best.json: its `checkpoint` names the best one so far, or is None.
        """
        path, temporary = self.path(step), self.temporary(step)
        if os.path.exists(os.path.join(path, FACTS)):
            write_json(os.path.join(path, FACTS), facts)
        else:
            write_json(os.path.join(temporary, FACTS), facts)
            _sync(temporary)
            os.rename(temporary, path)
            _sync(self.folder)
        self.settle()

    def settle(self) -> None:
        """Bring everything in line with the newest checkpoint: best.json, and no half or dropped ones (on one rank)."""
        whole = self.committed()
        if whole:
            best = facts_of(whole[-1]).get("best", {})
            if best.get("checkpoint") and best != read_json(os.path.join(self.output, BEST)):
                write_json(os.path.join(self.output, BEST), best)
        kept = [*whole[-max(self.keep, 1) :], self.best()]
        for path in self._all():
            if path.endswith(TEMPORARY) or (path in whole and path not in kept):
                shutil.rmtree(path)


def _sync(folder: str) -> None:
    """Make the names in a folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
