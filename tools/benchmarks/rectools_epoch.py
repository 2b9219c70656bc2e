"""Seconds of an epoch of RecTools' SASRec, estimated from some of its batches, on one thread.

Runs in an environment of its own, since RecTools wants an older numpy:

    python3.11 -m venv rectools && rectools/bin/pip install torch==2.13.0 rectools==0.19.0 pytorch-lightning
    OMP_NUM_THREADS=1 rectools/bin/python tools/benchmarks/rectools_epoch.py Beauty.txt --loss softmax

64 dimensions, one block, histories of 50, batches of 128 users, without each user's last two items: the model that
`python -m tools.benchmark --only epoch` trains, as RecTools trains it.
"""

import argparse
import json
import math
import statistics
import time
from typing import Any

WARM_UP = 3
"""Batches before the first that counts."""


def main() -> None:
    """Train some batches and print the estimate as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", help="text file with a line per user: user item item ..., in time order")
    parser.add_argument("--loss", choices=["softmax", "sampled_softmax"], default="softmax")
    parser.add_argument("--negatives", type=int, default=256, help="per target, for sampled_softmax")
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed")
    options = parser.parse_args()

    import pandas as pd
    import torch
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(1)
    rows = []
    with open(options.log) as file:
        for line in file:
            user, *items = line.split()
            rows += [(user, item, 1.0, day) for day, item in enumerate(items[:-2])]
    log = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Weight, Columns.Datetime])
    log[Columns.Datetime] = pd.to_datetime(log[Columns.Datetime], unit="D")

    class Clock(Callback):
        """Notes when each batch ends."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            """See Lightning."""
            self.ends.append(time.perf_counter())

    clock = Clock()

    def make_trainer(**_: Any) -> Trainer:
        return Trainer(
            max_epochs=1,
            limit_train_batches=options.batches + WARM_UP,
            accelerator="cpu",
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    sampled = {"n_negatives": options.negatives} if options.loss == "sampled_softmax" else {}
    model = SASRecModel(
        n_factors=64,
        n_blocks=1,
        n_heads=2,
        session_max_len=50,
        batch_size=128,
        loss=options.loss,
        get_trainer_func=make_trainer,
        **sampled,
    )
    model.fit(Dataset.construct(log))
    ends = clock.ends[WARM_UP - 1 :]
    seconds = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    batches = math.ceil(log[Columns.User].nunique() / 128)
    print(
        json.dumps(
            {
                "loss": options.loss,
                "batches_timed": len(seconds),
                "batches_per_epoch": batches,
                "seconds_per_batch": statistics.median(seconds),
                "epoch_seconds": statistics.mean(seconds) * batches,
            }
        )
    )


if __name__ == "__main__":
    main()
