"""A training session: a run's model trained from where the run is to its end, by whichever stage."""

from collections.abc import Callable

import torch
from torch import nn

from recgpt_torchrec.config import Model, Pretrain, PromptTune, Tuning
from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.distributed.processes import log_message
from recgpt_torchrec.training.building import build, check_lost
from recgpt_torchrec.training.header import header
from recgpt_torchrec.training.run import Run
from recgpt_torchrec.training.trainer import Trainer

Validate = Callable[[], dict[str, float]]


def train(
    config: Pretrain | PromptTune,
    model: Model,
    stream: SequenceStream,
    run: Run,
    device: torch.device,
    *,
    begin: Callable[[Trainer], None],
    validation: Callable[[nn.Module], Validate],
    metric: str,
    tuning: Tuning | None = None,
) -> None:
    """Train a configuration's model from where its run is to its end (collective).

    Args:
        config: of the stage.
        model: the decoder's configuration.
        stream: its `training_stream`.
        run: the output folder; claimed once nothing can be refused any more.
        device: of this rank.
        begin: gives a run that has not begun what it starts from.
        validation: from the model to what measures it.
        metric: the figure of validation that decides about the best checkpoint.
        tuning: what is tuned; None: pre-training.
    """
    dataset = stream.dataset
    check_lost(dataset)
    built, optimizer = build(
        config, model, dataset, batch_size=stream.maker.capacity.items, device=device, tuning=tuning
    )
    with run.claimed():
        trainer = Trainer(
            model=built,
            optimizer=optimizer,
            device=device,
            stream=stream,
            interactions=dataset.manifest.entries,
            train=config.train,
            schedule=config.optimizer,
            saving=config.saving,
            checkpoints=run.checkpoints,
            metadata=run.metadata(str(built.plan)),
            seed=config.seed,
        )
        if resumed := run.checkpoints.latest():
            trainer.resume(resumed)
            log_message(f"Going on from {resumed}")
        else:
            begin(trainer)
        log_message(header(built, dataset.manifest, device, tokens=config.batch.tokens, epochs=config.train.epochs))
        trainer.fit(validation(built), metric)
        if (set_aside := stream.maker.reader.set_aside) is not None:
            log_message(set_aside.summary())
