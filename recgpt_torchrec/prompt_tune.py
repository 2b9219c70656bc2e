"""Stage `prompt_tune`: prompt dataset and pre-trained checkpoint -> a checkpoint with segment embedding and W_l."""

from dataclasses import replace

from recgpt_torchrec import cli
from recgpt_torchrec.config import PromptTune
from recgpt_torchrec.errors import InputError


def main(config: PromptTune) -> None:
    """Go on training, and leave the best checkpoint in `config.output`."""
    from recgpt_torchrec.checkpoints.folder import find
    from recgpt_torchrec.data.dataset import fingerprint_of
    from recgpt_torchrec.distributed.processes import process_group, show
    from recgpt_torchrec.distributed.watchdog import Watchdog
    from recgpt_torchrec.training.building import answers_of, fit, open_dataset, pretrained_model, training_stream
    from recgpt_torchrec.training.run import RUN, Run

    train = config.train
    with process_group(train.timeout_seconds) as device, Watchdog(config.output, train.stall_seconds, RUN):
        dataset, checkpoint, tuning = open_dataset(config), find(config.checkpoint), config.tuning
        if tuning.prompts and "prompts" not in dataset.manifest.settings:
            raise InputError(
                f"{config.data} has no prompts; make some with python -m recgpt_torchrec.generate_prompts, "
                "or fine-tune without them: --tuning.prompts false"
            )
        if tuning.soft_targets and not answers_of(dataset):
            raise InputError(
                f"--tuning.soft_targets {tuning.soft_targets}: {config.data} holds no answers of the pre-trained "
                "model; generate it with --prompts.answers, for example 5, or leave the option out"
            )
        if tuning.soft_targets and config.loss.candidates == "bce":
            raise InputError("--tuning.soft_targets needs a softmax: --loss.candidates all, sampled or in_batch")
        config = replace(config, model=pretrained_model(checkpoint, dataset, config.model))
        stream = training_stream(config, dataset, tuning)  # finds what is wrong with options or data
        run = Run.find(config, dataset.manifest.vocabulary, fingerprint_of(dataset), keep=config.saving.keep)
        if run.finished:
            show(f"{config.output} is trained already.", run.summary(), sep="\n")
            return
        fit(config, config.saving, stream, run, device, tuning=tuning, pretrained=checkpoint)
        show(run.summary())


if __name__ == "__main__":
    cli.run(PromptTune, main, "recgpt_torchrec.prompt_tune")
