"""Stage `generate_prompts`: dataset and pre-trained checkpoint -> a dataset with prompts between interactions."""

import time

from recgpt_torchrec import cli
from recgpt_torchrec.config import GeneratePrompts
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.texts.commands import next_line


def main(config: GeneratePrompts) -> None:
    """Generate the prompts of every history, and write a new dataset with them."""
    from recgpt_torchrec import progress
    from recgpt_torchrec.catalogue.catalogue import Catalogue
    from recgpt_torchrec.checkpoints.folder import checkpoint_fingerprint, find_checkpoint
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.data.windows import row_groups
    from recgpt_torchrec.distributed.processes import print_result, rank, run_on_first_rank, world_size
    from recgpt_torchrec.distributed.watchdog import beat, report_phase, watched_group
    from recgpt_torchrec.model.tabled.base import unwrapped, unwrapped_dense
    from recgpt_torchrec.prompts import prompt_dataset
    from recgpt_torchrec.prompts.averaging import AnswerAverage, open_others, record_others
    from recgpt_torchrec.prompts.boosting import open_boost
    from recgpt_torchrec.prompts.prompting import Prompter
    from recgpt_torchrec.training.loading import load, read_pretrained

    with watched_group(config.stall_seconds, config.device) as device:
        dataset, checkpoint = Dataset.open(config.data), find_checkpoint(config.checkpoint)
        vocabulary, groups = dataset.manifest.vocabulary, row_groups(dataset)
        settings = read_pretrained(checkpoint, dataset)
        max_len = settings.model.max_len
        if kept := settings.inputs.history_events:
            raise InputError(
                f"{checkpoint} reads only events of the types {', '.join(kept)}, and prompts lie between events of all "
                "types; give a checkpoint that was trained without --events.history"
            )
        prompt_dataset.check_input(dataset, config.prompts, groups, config.previous)
        record = prompt_dataset.record_of(
            dataset, config.prompts, max_len, checkpoint, checkpoint_fingerprint(checkpoint), config.neighbours
        )
        others = open_others(config.averaged_with, dataset, record)
        record |= record_others(others)
        following = {"data": config.output, "checkpoint": config.checkpoint, "output": "RUN_FOLDER"}
        next_command = next_line("prompt_tune", following)
        if not config.prompts.k and config.prompts.answers:
            learning = {"data": config.output, "soft_targets": "0.3", "output": "RUN_FOLDER"}
            next_command = next_line("pretrain", learning)
        if run_on_first_rank(lambda: prompt_dataset.finished(config.output, record, vocabulary)):
            print_result(f"Already there: {config.output}", next_command, sep="\n")
            return
        previous = None
        if config.previous is not None:
            previous = prompt_dataset.open_previous(config.previous, record, vocabulary)
        fill = vectors = None
        if config.prompts.needs_model:
            size = prompt_dataset.LOOKUP
            report_phase("loading the checkpoint")
            trained = load(checkpoint, dataset, config.tables, bags=size, device=device, item_keys=1)
            model = unwrapped(trained.model.eval())
            dense = unwrapped_dense(model)
            catalogue = Catalogue.of_model(model, dataset.manifest.items, device)
            if not catalogue.is_finite():
                raise InputError(f"{checkpoint} has diverged: item vectors are not finite; give an earlier checkpoint")
            boost = open_boost(config.neighbours, dataset)
            fill = Prompter(dense, catalogue, config.prompts, max_len, config.batch_users, boost).fill
            vectors = prompt_dataset.UserVectors(model, catalogue.rounds, device)
        report_phase("generating prompts")
        started = time.perf_counter()
        with progress.progress_bar(dataset.manifest.users, "users", active=rank() == 0) as bar:

            def done(users: int) -> None:
                beat()
                bar.update(min(users * world_size(), bar.total - bar.n))

            written = prompt_dataset.write_prompts(
                config.output,
                dataset,
                groups,
                record,
                fill=fill,
                vectors=vectors,
                pool_users=4 * config.batch_users,
                previous=previous,
                average=AnswerAverage(dataset, others, max_len).apply if others else None,
                columns=settings.inputs.columns,
                progress=done,
            )
        seconds = time.perf_counter() - started
        reused = f" (those of {written.reused:,} intervals reused from {config.previous})" if config.previous else ""
        averaged = f", answers averaged with those of {', '.join(config.averaged_with)}" if others else ""
        print_result(
            f"Written: {config.output}: {written.users:,} users, {written.generated:,} generated and "
            f"{written.exposed:,} shown prompts{reused}{averaged}, {written.bytes:,} bytes, in {seconds:.1f} s "
            f"({written.users / seconds:,.0f} users/s)",
            next_command,
            sep="\n",
        )


if __name__ == "__main__":
    cli.run(GeneratePrompts, main, "recgpt_torchrec.generate_prompts")
