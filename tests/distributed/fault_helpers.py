"""A small training run as the tests of faults start it, and where something happens to it."""

import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from recgpt_torchrec.config import Loss, Model, Optimizer, Pretrain, Saving, Stream, Tables, Train, TrainingBatch
from tests.support import walks, write_dataset

ROWS, GROUPS = 8, 2
"""Of a row group, and of a part."""
HISTORIES = walks(200, 30, longest=14)
MAX_LEN, EPOCHS = 10, 2


def write_data(folder: Path) -> str:
    """The dataset that the runs are trained on; returns its path."""
    write_dataset(folder, HISTORIES, items=30, rows_per_group=ROWS, groups_per_part=GROUPS)
    return str(folder)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def train(rank: int, port: int, data: str, output: str, **options: Any) -> Any:
    """The stage `pretrain` on this rank, in a process group of its own; returns the status it ends with.

    What it says on standard error is in OUTPUT.rankN.
    """
    from recgpt_torchrec import pretrain

    dist.barrier()
    connected = dist.group.WORLD  # no rank closes its connections under another's collective
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = os.open(f"{output}.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    asynchronous = options.pop("asynchronous", True)
    config = Pretrain(
        data=data,
        output=output,
        model=Model(dim=8, max_len=MAX_LEN, layers=1),
        loss=Loss(negatives=10),
        batch=TrainingBatch(tokens=60),
        stream=Stream(workers=options.pop("workers", 0)),
        tables=Tables(sharding=options.pop("sharding", "row_wise")),
        optimizer=Optimizer(warmup_steps=5),
        train=Train(epochs=EPOCHS, **options),
        saving=Saving(every_steps=4, asynchronous=asynchronous),
    )
    status = 0
    try:
        pretrain.main(config)
    except SystemExit as end:
        assert isinstance(end.code, int)
        status = end.code
    del connected
    return status


def at_step(number: int, do: Any) -> None:
    """Do something before the step that follows `number` steps."""
    from recgpt_torchrec.training.schedule import Schedule

    set_rates = Schedule.set_rates

    def watched(self: Schedule, steps: int, progress: float) -> float:
        if steps == number:
            do()
        return set_rates(self, steps, progress)

    Schedule.set_rates = watched  # type: ignore[method-assign]
