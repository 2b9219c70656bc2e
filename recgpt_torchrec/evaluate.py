"""Stage `evaluate`: dataset and checkpoint -> HR and NDCG of every recall path, as a table and as JSON."""

from recgpt_torchrec import cli, storage
from recgpt_torchrec.config import Evaluate


def main(config: Evaluate) -> None:
    """Measure the checkpoint's recall paths and the baselines on all users of a split."""
    from recgpt_torchrec.checkpoints.folder import find_checkpoint
    from recgpt_torchrec.checkpoints.settings import CheckpointSettings
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.data.inputs.events import request_for
    from recgpt_torchrec.distributed.processes import log_message, print_result, run_on_first_rank
    from recgpt_torchrec.distributed.watchdog import phase, report_phase, watched_group
    from recgpt_torchrec.evaluation import result
    from recgpt_torchrec.evaluation.held_out import check_has_event, check_has_targets
    from recgpt_torchrec.evaluation.measuring import lacks_prompts, measure
    from recgpt_torchrec.evaluation.recall_paths import path_names
    from recgpt_torchrec.evaluation.sampling import check_sample
    from recgpt_torchrec.training.loading import load

    with watched_group(config.stall_seconds, config.device) as device:
        dataset, checkpoint = Dataset.open(config.data), find_checkpoint(config.checkpoint)
        run_on_first_rank(lambda: result.check_output(config))
        remedy = "Prepare the log with --hold_out last, time or given, and train a run on that"
        check_has_targets(dataset, config.split, remedy)
        check_sample("--users", config.users, dataset, config.split)
        report_phase("loading the checkpoint")
        trained = load(checkpoint, dataset, config.tables, bags=config.batch.tokens, device=device)
        request = request_for(dataset, trained.inputs, "--event", config.event, config.ask)
        check_has_event(dataset, config.split, trained.inputs, request)
        manifest, trained_on = dataset.manifest, CheckpointSettings.read(checkpoint)
        if config.event is not None and config.ask and not request.event:
            log_message(f"Note: {checkpoint} is not told which event type is asked for; --event chooses users alone")
        if trained_on.hold_out != manifest.hold_out:
            log_message(
                f"Note: {checkpoint} was trained on {trained_on.data} with --hold_out {trained_on.hold_out}; it may "
                f"have seen items that {config.data} holds out (--hold_out {manifest.hold_out})"
            )
        if lacks_prompts(trained, dataset):
            log_message(
                f"Note: {checkpoint} was tuned on histories with prompts, but {config.data} has none: it is measured "
                "without them. For the figures of its stage give --data the dataset that generate_prompts wrote"
            )
        identity = {"vocabulary": manifest.vocabulary, "split": config.split, "hold_out": manifest.hold_out}
        other = run_on_first_rank(lambda: result.open_other(config, identity))
        evaluation = measure(config, dataset, checkpoint, trained, request, device)
        path = path_names(trained)[0]
        with phase("comparing with baselines", computes=True):
            ahead = run_on_first_rank(lambda: result.find_ahead(config, evaluation, path))
        if ahead:
            of = {each.other: each.to_json() for each in ahead}
            evaluation["ahead"] = {"path": path, "protocol": "masked", "metric": ahead[0].metric, "of": of}
        run_on_first_rank(lambda: storage.write_json(config.output, evaluation, sealed=False))
        print_result(*result.describe(config, evaluation, path, dataset, trained.inputs, ahead), sep="\n")
        if other is not None:
            print_result(run_on_first_rank(lambda: result.compare_text(config, evaluation, other)))
        print_result(*result.describe_end(config, evaluation), sep="\n")


if __name__ == "__main__":
    cli.run(Evaluate, main, "recgpt_torchrec.evaluate")
