"""Stage `pretrain`: a dataset -> a checkpoint of decoder and sharded tables, trained autoregressively."""

from functools import partial
from typing import TYPE_CHECKING

from recgpt_torchrec import cli
from recgpt_torchrec.config import Pretrain

if TYPE_CHECKING:
    import torch


def main(config: Pretrain) -> None:
    """Train the model; `config.output` then holds the best and the newest checkpoints."""
    from recgpt_torchrec.checkpoints.folder import TRAINED_DAYS
    from recgpt_torchrec.data.reading.preset import apply_preset
    from recgpt_torchrec.distributed.processes import log_message, print_result, process_group, run_on_first_rank
    from recgpt_torchrec.distributed.watchdog import Watchdog
    from recgpt_torchrec.training.days.training import is_folder_of_days, train_days
    from recgpt_torchrec.training.run import RUN

    with process_group(config.train.timeout_seconds, config.device) as device:
        given = config
        config, lines = run_on_first_rank(lambda: apply_preset(given))
        for line in lines:
            log_message(line)
        in_days = is_folder_of_days(config.data)
        with Watchdog(config.output, config.train.stall_seconds, TRAINED_DAYS if in_days else RUN):
            if in_days:
                train_days(config, lambda day, initial: print_result(train_run(day, device, initial).splitlines()[0]))
            else:
                print_result(train_run(config, device))


def train_run(config: Pretrain, device: "torch.device", initial: str | None = None) -> str:
    """Train a run on a dataset to the end, or find that it is (collective); returns the summary.

    Args:
        config: of the run.
        device: of this rank.
        initial: checkpoint of the day before, which a day's run starts from; None: that of the configuration.
    """
    from recgpt_torchrec.data.dataset import histories_fingerprint
    from recgpt_torchrec.data.inputs.choosing import choose_inputs
    from recgpt_torchrec.distributed.initial_values import initialise_tables
    from recgpt_torchrec.distributed.processes import log_message, run_on_first_rank
    from recgpt_torchrec.evaluation.validation import validation_of
    from recgpt_torchrec.training.building import check_answers, choose_tokens, open_dataset, training_stream
    from recgpt_torchrec.training.execution import Execution
    from recgpt_torchrec.training.loading import find_initial, reset_reassigned
    from recgpt_torchrec.training.run import Run
    from recgpt_torchrec.training.session import train
    from recgpt_torchrec.training.trainer import Trainer

    limits, dataset = config.train, open_dataset(config)
    check_answers(config.soft_targets, "--soft_targets", dataset)
    execution = Execution.choose(limits, config.model, config.loss, device, config.output, initial)
    tokens = choose_tokens(config, config.model, dataset, device)
    # The stream comes first, so that damaged data is reported before the output folder is checked.
    new_targets, inputs = config.targets == "new", choose_inputs(config, dataset)
    stream = training_stream(
        config, config.model, dataset, tokens.rank, execution, new_targets=new_targets, inputs=inputs
    )
    histories = histories_fingerprint(dataset)
    run = Run.find(config, dataset.manifest.vocabulary, histories, config.saving.keep, tokens.step)
    if run_on_first_rank(lambda: run.finished):
        return f"{config.output} is already trained.\n{run.summary(dataset.manifest)}"
    if config.initial is not None and run_on_first_rank(run.checkpoints.latest) is None:
        run.initial = find_initial(initial or run.initial or config.initial, config, dataset, inputs)

    def begin(trainer: Trainer) -> None:
        assert run.initial is not None
        initialise = partial(initialise_tables, trainer.model, config.tables.init_std_of, config.seed)
        trainer.begin_from(run.initial, initialise)
        reset_reassigned(trainer.model, trainer.optimizer, run.initial, config, dataset)
        log_message(f"Starting from {run.initial}")

    train(
        config,
        config.model,
        stream,
        run,
        device,
        tokens,
        execution,
        begin=None if run.initial is None else begin,
        validation=validation_of(stream, config.model, stream.maker.batch, device, limits, config.events.validate),
    )
    return run.summary(dataset.manifest)


if __name__ == "__main__":
    cli.run(Pretrain, main, "recgpt_torchrec.pretrain")
