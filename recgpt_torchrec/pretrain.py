"""Stage `pretrain`: a dataset -> a checkpoint of decoder and sharded tables, trained autoregressively."""

from recgpt_torchrec import cli
from recgpt_torchrec.config import Pretrain


def main(config: Pretrain) -> None:
    """Train, and leave the best checkpoint in `config.output`."""
    from recgpt_torchrec.checkpoints.growing import find_initial
    from recgpt_torchrec.data.dataset import fingerprint_of
    from recgpt_torchrec.distributed.processes import process_group, show
    from recgpt_torchrec.distributed.watchdog import Watchdog
    from recgpt_torchrec.training.building import fit, open_dataset, training_stream
    from recgpt_torchrec.training.run import RUN, Run

    train = config.train
    with process_group(train.timeout_seconds) as device, Watchdog(config.output, train.stall_seconds, RUN):
        dataset = open_dataset(config)
        stream = training_stream(config, dataset)  # finds what is wrong with the data before the output is looked at
        run = Run.find(config, dataset.manifest.vocabulary, fingerprint_of(dataset), keep=config.saving.keep)
        if run.finished:
            show(f"{config.output} is trained already.", run.summary(), sep="\n")
            return
        if config.initial is not None and run.checkpoints.latest() is None:
            run.initial = find_initial(run.initial or config.initial, config, dataset)
        fit(config, config.saving, stream, run, device, initial=run.initial)
        show(run.summary())


if __name__ == "__main__":
    cli.run(Pretrain, main, "recgpt_torchrec.pretrain")
