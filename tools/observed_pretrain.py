"""Runs the stage pretrain, and writes down every target of every step that was trained.

    python -m tools.observed_pretrain trained.jsonl --data data/days --output runs/days --train.epochs 1

The targets are read from the packed batches, where the loss reads them. Each fit of a run begins with a line that says
from which step; what an earlier, killed process trained after it is not in the model, and `read_targets` leaves it out.
"""

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recgpt_torchrec import cli, pretrain
from recgpt_torchrec.config import Pretrain


class Target(NamedTuple):
    """A target that was trained: ids, and the item that it was predicted after."""

    user: int
    after: int
    item: int


def targets_in(batch: Any) -> list[Target]:
    """The targets of a batch, padding left out."""
    bags, of_key = batch.bags, {}
    keys, lengths = bags.keys(), bags.lengths().view(len(bags.keys()), bags.stride())
    values = iter(bags.values().tolist())
    for key, sizes in zip(keys, lengths.tolist(), strict=True):
        held = [[next(values) for _ in range(size)] for size in sizes]
        of_key[key] = [bag[0] if bag else None for bag in held]
    users = of_key["user"]
    item_keys = [of_key[key] for key in keys if key.startswith("item_")]
    items = [held[place] for place in range(bags.stride()) for held in item_keys]
    slots, found = batch.target_slot[: batch.targets], batch.target_bag[: batch.targets]
    of_slot = [bag.flatten()[slots].tolist() for bag in (batch.user_bag, batch.item_bag)]
    return [Target(users[u], items[a], items[t]) for u, a, t in zip(*of_slot, found.tolist(), strict=True)]


def observe(path: str) -> None:
    """Write down in the file `path` what every training of this process trains from now on."""
    from recgpt_torchrec.data.stream import Share
    from recgpt_torchrec.training.trainer import Trainer

    pending: dict[Any, list[Target]] = {}
    current: dict[str, Any] = {}
    iterate, done, fit = Share.__iter__, Share.done, Trainer.fit

    def write(line: dict[str, Any]) -> None:
        with open(path, "a") as file:
            file.write("\n" + json.dumps({**line, "time": time.time()}))

    def watched(share: Share) -> Iterator[Any]:
        for batch in iterate(share):
            pending[batch.cursor] = targets_in(batch)
            yield batch

    def counted(share: Share, cursor: Any) -> None:
        done(share, cursor)
        progress = current["trainer"].progress
        targets = [list(target) for target in pending.pop(cursor)]
        write({"run": current["run"], "step": progress.step + 1, "targets": targets})

    def begun(trainer: Trainer, *arguments: Any, **more: Any) -> None:
        pending.clear()
        current.update(trainer=trainer, run=os.path.abspath(trainer.checkpoints.output))
        write({"run": current["run"], "from": trainer.progress.step})
        fit(trainer, *arguments, **more)

    for place, name, function in ((Share, "__iter__", watched), (Share, "done", counted), (Trainer, "fit", begun)):
        setattr(place, name, function)


def read_targets(*paths: str | Path) -> dict[str, list[Target]]:
    """The targets that are in each run's model, by the run's folder, from the files of `observe` of all its ranks."""
    steps: dict[str, list[tuple[int, list[Target]]]] = defaultdict(list)
    lines = []
    for text in [text for path in paths for text in Path(path).read_text().splitlines()]:
        with contextlib.suppress(ValueError):  # blank, or cut by a kill
            lines.append(json.loads(text))
    for line in sorted(lines, key=lambda line: line["time"]):
        if "from" in line:
            steps[line["run"]] = [each for each in steps[line["run"]] if each[0] <= line["from"]]
        else:
            steps[line["run"]].append((line["step"], [Target(*target) for target in line["targets"]]))
    return {run: [target for _, targets in trained for target in targets] for run, trained in steps.items()}


def main() -> None:
    """Observe, and run the stage with the other arguments."""
    path = sys.argv.pop(1)
    torch.set_num_threads(1)
    observe(f"{path}.{os.environ['RANK']}" if "RANK" in os.environ else path)
    cli.run(Pretrain, pretrain.main, "tools.observed_pretrain")


if __name__ == "__main__":
    main()
