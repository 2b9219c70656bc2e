"""Stage `pretrain`: a dataset -> a checkpoint of decoder and sharded tables, trained autoregressively."""

from dataclasses import asdict

from recgpt_torchrec import cli
from recgpt_torchrec.config import Pretrain


def run(config: Pretrain) -> None:
    """Train, and leave the best checkpoint in `config.output`."""
    from recgpt_torchrec.building import build, encoding_stream, training_stream
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.retrieval.validation import Validation
    from recgpt_torchrec.training.processes import process_group, say
    from recgpt_torchrec.training.run import Run
    from recgpt_torchrec.training.trainer import Trainer

    with process_group() as device:
        dataset = Dataset.open(config.data)
        stream = training_stream(config, dataset)  # finds what is wrong with options or data before anything is written
        run = Run.find(config.output, asdict(config), dataset.manifest.vocabulary, keep=config.checkpoint.keep)
        if run.finished:
            say(f"{config.output} is trained already.", run.summary(), sep="\n")
            return
        model, optimizer = build(config, dataset, stream.maker.capacity.items, device)
        run.claim()
        trainer = Trainer(
            model=model,
            optimizer=optimizer,
            device=device,
            stream=stream,
            interactions=dataset.manifest.entries,
            train=config.train,
            schedule=config.optimizer,
            saving=config.checkpoint,
            checkpoints=run.checkpoints,
            facts=run.facts(str(model.plan)),
            seed=config.seed,
        )
        if resumed := run.checkpoints.latest():
            trainer.resume(resumed)
            say(f"Going on from {resumed}")
        validation = encoding_stream(dataset, "validation", config.model, config.batch)
        trainer.fit(Validation(model, validation, device), metric="NDCG@10")
        say(run.summary())


if __name__ == "__main__":
    cli.run(Pretrain, run, "recgpt_torchrec.pretrain")
