"""Trains a run's model, from the start or a checkpoint to the end, for both training stages."""

from collections.abc import Callable

import torch
from torch import nn

from recgpt_torchrec.checkpoints.state import table_tensors
from recgpt_torchrec.config import Model, Pretrain, PromptTune, Tuning
from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.distributed import watchdog
from recgpt_torchrec.distributed.placements import placements
from recgpt_torchrec.distributed.processes import log_message, run_on_first_rank, world_size
from recgpt_torchrec.distributed.replicas import Replicas
from recgpt_torchrec.distributed.sharding import ranks_per_group
from recgpt_torchrec.training.building import Tokens, build, check_lost
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.header import environment_of, header
from recgpt_torchrec.training.run import Run
from recgpt_torchrec.training.trainer import Trainer

Validate = Callable[[], dict[str, float]]


def train(
    config: Pretrain | PromptTune,
    model: Model,
    stream: SequenceStream,
    run: Run,
    device: torch.device,
    tokens: Tokens,
    execution: Execution,
    *,
    begin: Callable[[Trainer], None] | None,
    validation: Callable[[nn.Module], Validate] | None,
    tuning: Tuning | None = None,
) -> None:
    """Build a configuration's model and train it to the end, resuming from the run's newest checkpoint (collective).

    Args:
        config: of the stage.
        model: the decoder's configuration.
        stream: made by `training_stream`.
        run: found by `Run.find`; its folder is first written to once the model is built.
        device: of this rank.
        tokens: of the stream's batches.
        execution: how steps are computed.
        begin: fills the tables and the decoder of a run that has no checkpoint yet from another run's; None: it starts
            from initial values.
        validation: makes the validation of a model, see `Trainer.fit`; None: there is nothing to validate on.
        tuning: what is tuned; None: pre-training.

    Raises:
        Stopped: a rank received a stop signal; everything is saved.
        InputError: the data or the configuration is refused, a step is not finite, or something cannot be written.
    """
    dataset = stream.dataset
    check_lost(dataset)
    maker = stream.maker
    capacity, inputs = maker.capacity, maker.reader.inputs
    restored = begin is not None or run_on_first_rank(run.checkpoints.latest) is not None
    with watchdog.phase("building the model"):
        built, optimizer = build(
            config,
            model,
            dataset,
            capacity=capacity,
            device=device,
            tuning=tuning,
            restored=restored,
            inputs=inputs,
            attributes=maker.attributes,
        )
    group = ranks_per_group(config.tables)
    placed = placements(built.plan, built, config.tables.optimizer, groups=world_size() // group)
    with run.claim_folder():
        trainer = Trainer(
            model=built,
            optimizer=optimizer,
            device=device,
            execution=execution,
            stream=stream,
            entries=dataset.manifest.entries,
            train=config.train,
            schedule=config.optimizer,
            saving=config.saving,
            checkpoints=run.checkpoints,
            metadata=run.metadata(
                str(built.plan), placed, dataset.manifest.hold_out, inputs, environment_of(device, execution)
            ),
            seed=config.seed,
            replicas=Replicas(table_tensors(built, optimizer), group, config.tables.sync_steps),
        )
        if resumed := run_on_first_rank(run.checkpoints.latest):
            trainer.resume(resumed)
            log_message(f"Resuming from {resumed}")
        elif begin is not None:
            begin(trainer)
        validates = validation is not None
        log_message(
            header(
                built,
                dataset.manifest,
                device,
                execution,
                placed=placed,
                tokens=tokens,
                train=config.train,
                validates=validates,
                repeat_bias=trainer.progress.repeat_bias,
            )
        )
        trainer.fit(None if validation is None else validation(built))
        if (set_aside := maker.reader.set_aside) is not None:
            log_message(set_aside.summary())
