"""Stage `prompt_tune`: prompt dataset and pre-trained checkpoint -> a checkpoint with segment embedding and W_l."""

from dataclasses import replace
from typing import TYPE_CHECKING

from recgpt_torchrec import cli
from recgpt_torchrec.config import PromptTune
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.texts.commands import command

if TYPE_CHECKING:
    from recgpt_torchrec.config import Tuning
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.training.trainer import Trainer


def main(config: PromptTune) -> None:
    """Tune the pre-trained model; `config.output` then holds the best and the newest checkpoints."""
    from recgpt_torchrec.checkpoints.folder import find_checkpoint
    from recgpt_torchrec.checkpoints.settings import CheckpointSettings
    from recgpt_torchrec.data.dataset import histories_fingerprint
    from recgpt_torchrec.data.reading.preset import apply_preset
    from recgpt_torchrec.distributed.processes import log_message, print_result, process_group, run_on_first_rank
    from recgpt_torchrec.distributed.watchdog import Watchdog
    from recgpt_torchrec.evaluation.validation import validation_of
    from recgpt_torchrec.training.building import choose_tokens, open_dataset, training_stream
    from recgpt_torchrec.training.execution import Execution
    from recgpt_torchrec.training.loading import load_pretrained, pretrained_inputs, pretrained_model
    from recgpt_torchrec.training.run import RUN, Run
    from recgpt_torchrec.training.session import train

    with (
        process_group(config.train.timeout_seconds, config.device) as device,
        Watchdog(config.output, config.train.stall_seconds, RUN),
    ):
        given = config
        config, lines = run_on_first_rank(lambda: apply_preset(given))
        for line in lines:
            log_message(line)
        limits, tuning = config.train, config.tuning
        dataset, checkpoint = open_dataset(config), find_checkpoint(config.checkpoint)
        check_dataset(config, dataset)
        tuning = choose_predicting(tuning, dataset)
        model = pretrained_model(checkpoint, dataset, config.model)
        config = replace(config, model=model, tuning=tuning)
        execution = Execution.choose(limits, model, config.loss, device, config.output)
        tokens = choose_tokens(config, model, dataset, device, tuning)
        inputs = pretrained_inputs(checkpoint, dataset, tuning)
        stream = training_stream(config, model, dataset, tokens.rank, execution, tuning=tuning, inputs=inputs)
        histories = histories_fingerprint(dataset)
        run = Run.find(config, dataset.manifest.vocabulary, histories, config.saving.keep, tokens.step)
        if run_on_first_rank(lambda: run.finished):
            print_result(f"{config.output} is already trained.", run.summary(dataset.manifest), sep="\n")
            return

        def begin(trainer: "Trainer") -> None:
            load_pretrained(trainer.model, checkpoint)
            trainer.progress.repeat_bias = CheckpointSettings.read(checkpoint).repeat_bias

        validation = validation_of(stream, model, stream.maker.batch, device, limits, config.events.validate)
        train(
            config,
            model,
            stream,
            run,
            device,
            tokens,
            execution,
            begin=begin,
            validation=validation,
            tuning=tuning,
        )
        print_result(run.summary(dataset.manifest))


def choose_predicting(tuning: "Tuning", dataset: "Dataset") -> "Tuning":
    """The options with which entries predict chosen, where `--tuning.predict_from` is auto."""
    if tuning.predict_from != "auto":
        return tuning
    if not tuning.prompts or not dataset.manifest.feedback:
        return replace(tuning, predict_from="interacted")
    # As at a request: the last entry before it. Generated prompts stand behind the feedback, but not there.
    exposed = dataset.manifest.settings["prompts"]["source"] == "exposed"
    return replace(tuning, predict_from="last" if exposed else "every")


def check_dataset(config: PromptTune, dataset: "Dataset") -> None:
    """Check that the dataset has the prompts and answers that the options need.

    Raises:
        InputError: it lacks them, or the loss cannot use answers.
    """
    from recgpt_torchrec.training.building import check_answers

    tuning = config.tuning
    if tuning.prompts and "prompts" not in dataset.manifest.settings:
        made = {"data": config.data, "checkpoint": config.checkpoint, "output": "PROMPTS_FOLDER"}
        generate = command("generate_prompts", made)
        raise InputError(
            f"{config.data} has no prompts; generate them with {generate}, or fine-tune without prompts: "
            "--tuning.prompts false"
        )
    check_answers(tuning.soft_targets, "--tuning.soft_targets", dataset)
    if tuning.soft_targets and config.loss.candidates == "bce":
        raise InputError(
            f"--tuning.soft_targets is {tuning.soft_targets}, but --loss.candidates bce has no softmax; give "
            "--loss.candidates all, sampled or in_batch"
        )


if __name__ == "__main__":
    cli.run(PromptTune, main, "recgpt_torchrec.prompt_tune")
