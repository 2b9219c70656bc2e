"""Stage `evaluate`: dataset and checkpoint -> HR and NDCG of every recall path, as a table and as JSON."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recgpt_torchrec import cli, storage
from recgpt_torchrec.config import Evaluate
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.finished import check_same, differences
from recgpt_torchrec.texts.commands import next_line

if TYPE_CHECKING:
    from recgpt_torchrec.evaluation.comparing.comparison import Difference, Evaluation


def main(config: Evaluate) -> None:
    """Measure the checkpoint's recall paths and the baselines on all users of a split."""
    from recgpt_torchrec.checkpoints.folder import find_checkpoint
    from recgpt_torchrec.checkpoints.settings import CheckpointSettings
    from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
    from recgpt_torchrec.data.inputs.events import request_for
    from recgpt_torchrec.data.reading.targets import describe_untargeted
    from recgpt_torchrec.distributed.processes import (
        log_message,
        print_result,
        rank,
        run_on_first_rank,
        world_size,
    )
    from recgpt_torchrec.distributed.watchdog import phase, report_phase, watched_group
    from recgpt_torchrec.evaluation import baselines
    from recgpt_torchrec.evaluation.groups import GroupedMetrics, Grouping, group_table
    from recgpt_torchrec.evaluation.held_out import check_has_event, check_has_targets
    from recgpt_torchrec.evaluation.list_sample import ListSample
    from recgpt_torchrec.evaluation.metrics import reduce_metrics
    from recgpt_torchrec.evaluation.per_user.facts import Facts
    from recgpt_torchrec.evaluation.per_user.files import PerUser
    from recgpt_torchrec.evaluation.per_user.recording import UserRecorder
    from recgpt_torchrec.evaluation.recall_paths import RecallPaths, path_names
    from recgpt_torchrec.evaluation.sampling import check_sample
    from recgpt_torchrec.training.loading import load

    with watched_group(config.stall_seconds, config.device) as device, ExitStack() as resources:
        dataset, checkpoint = Dataset.open(config.data), find_checkpoint(config.checkpoint)
        run_on_first_rank(lambda: check_output(config))
        check_has_targets(
            dataset,
            config.split,
            "Prepare the log with --hold_out last, time or given, and train a run on that",
        )
        check_sample("--users", config.users, dataset, config.split)
        ks = tuple(config.ks)
        report_phase("loading the checkpoint")
        trained = load(checkpoint, dataset, config.tables, bags=config.batch.tokens, device=device)
        manifest = dataset.manifest
        are_all_ranked = config.event is None and not trained.inputs.history_events
        ranked = manifest.count_targets(config.split) if are_all_ranked else None
        trained_on = CheckpointSettings.read(checkpoint)
        request = request_for(dataset, trained.inputs, "--event", config.event, config.ask)
        check_has_event(dataset, config.split, trained.inputs, request)
        if config.event is not None and config.ask and not request.event:
            log_message(f"Note: {checkpoint} is not told which event type is asked for; --event chooses users alone")
        if trained_on.hold_out != manifest.hold_out:
            log_message(
                f"Note: {checkpoint} was trained on {trained_on.data} with --hold_out {trained_on.hold_out}; it may "
                f"have seen items that {config.data} holds out (--hold_out {manifest.hold_out})"
            )
        lacks_prompts = trained.prompts and "prompts" not in manifest.settings
        if lacks_prompts:
            log_message(without_prompts(config, checkpoint))
        identity = {"vocabulary": manifest.vocabulary, "split": config.split, "hold_out": manifest.hold_out}
        other = run_on_first_rank(lambda: open_other(config, identity))
        grouping = Grouping.read(dataset)
        recorder = resources.enter_context(UserRecorder(config.output)) if config.per_user else None
        lists = ListSample(seed=config.seed)
        paths = RecallPaths(
            trained,
            dataset,
            config.batch,
            device,
            users=config.users,
            seed=config.seed,
            grouping=grouping,
            request=request,
            recorder=recorder,
            lists=lists,
        )
        is_sample = paths.sample(config.split) is not None
        of_all = "some of " if ranked is None else f"{ranked:,} of "
        of_all = f"a sample of {config.users:,} of the " if is_sample else of_all
        log_message(
            f"{checkpoint}: ranking {manifest.items:,} items for {of_all}{manifest.users:,} users ({config.split})"
        )
        report_phase("ranking users")
        users, results, chosen = paths.measure(config.split, ks, config.recall)
        grouped = dict(paths.grouped)
        if config.baselines:
            names = baselines.choose_baselines(manifest)
            of_baselines = {name: GroupedMetrics(grouping, ks) for name in names}
            with phase("ranking users by baselines", computes=True):
                measured = baselines.evaluate_baselines(
                    dataset,
                    config.split,
                    ks=ks,
                    rank=rank(),
                    world_size=world_size(),
                    names=names,
                    sample=paths.sample(config.split),
                    grouped=of_baselines,
                    inputs=trained.inputs,
                    request=request,
                    recorder=recorder,
                    lists=lists,
                )
            for name, protocols in measured.items():
                results[name] = {protocol: reduce_metrics(metrics).result() for protocol, metrics in protocols.items()}
            grouped |= of_baselines
        groups = {path: metrics.result() for path, metrics in grouped.items()}
        per_user: PerUser | None = None
        if recorder is not None:
            facts = Facts(
                dataset=dataset,
                split=config.split,
                inputs=trained.inputs,
                request=request,
                sample=paths.sample(config.split),
            )
            with phase("joining results by user", computes=True):
                has_age = facts.record(recorder)
                unit = manifest.time_unit if has_age else None
                per_user = recorder.join(manifest.users, paths=list(results), has_age=has_age, age_unit=unit)
        sample = {"of_users": ranked, "sample": {"users": config.users, "seed": config.seed}} if is_sample else {}
        evaluation = {
            "dataset": config.data,
            "checkpoint": checkpoint,
            "split": config.split,
            **({} if config.event is None else {"event": config.event, "asked": bool(request.event)}),
            "users": users,
            **sample,
            "results": results,
            "groups": groups,
            "recall": chosen,
            "vocabulary": manifest.vocabulary,
            "histories": histories_fingerprint(dataset),
            **({"without_prompts": True} if lacks_prompts else {}),
            **lists.result(dataset, list(results)),
            **({} if per_user is None else {"per_user": asdict(per_user)}),
            **({} if manifest.hold_out == "last" else {"hold_out": manifest.hold_out}),
            **({"request_time": told} if (told := trained.inputs.of_request_time) else {}),
        }
        one = path_names(trained)[0]
        with phase("comparing with baselines", computes=True):
            ahead = run_on_first_rank(lambda: find_ahead(config, evaluation, one))
        if ahead:
            evaluation["ahead"] = {"path": one, "protocol": "masked", "metric": ahead[0].metric}
            evaluation["ahead"]["of"] = {each.other: each.to_json() for each in ahead}
        run_on_first_rank(lambda: storage.write_json(config.output, evaluation, sealed=False))
        print_result(table(results))
        print_result(group_table(one, groups[one]["masked"]))
        if is_sample:
            with_item = "" if ranked is None else f" of {ranked:,}"
            print_result(f"evaluation on {users:,}{with_item} users with a {config.split} item (sample)")
        else:
            of_type = "" if config.event is None else f" of the event type {config.event}"
            print_result(f"{users:,} of {manifest.users:,} users have a {config.split} item{of_type}")
        if told:
            print_result(
                f"The model is told the time of each request ({', '.join(told)}), that of the held-out item: as at "
                "serving, but unlike results published for models without times."
            )
        if "m" in chosen:
            print_result(
                f"Two steps take m = {chosen['m']} items from the first interest and n = {chosen['n']} from the second "
                f"({chosen['because']})."
            )
        print_result(*(each.sentence() for each in ahead), sep="\n")
        if other is not None:
            print_result(run_on_first_rank(lambda: compare_text(config, evaluation, other)))
        for line in describe_untargeted(manifest, bool(trained.inputs.of_entity("item"))):
            print_result(line)
        print_result(f"Written: {config.output}{'' if per_user is None else f' and {per_user.file}'}")
        following = {"data": config.data, "checkpoint": config.checkpoint, "output": "EXPORT_FOLDER"}
        print_result(next_line("export", following))


def without_prompts(config: Evaluate, checkpoint: str) -> str:
    """The line about a model that was tuned on prompts, on a dataset without any."""
    return (
        f"Note: {checkpoint} was tuned on histories with prompts, but {config.data} has none: it is measured without "
        "them. For the figures of its stage give --data the dataset that generate_prompts wrote"
    )


def open_other(config: Evaluate, identity: dict[str, Any]) -> "Evaluation | None":
    """The evaluation to compare with; None: none is asked for.

    Raises:
        InputError: there is none, or it has other users or held-out items.
    """
    if config.compare is None:
        return None
    from recgpt_torchrec.evaluation.comparing.comparison import Evaluation, check_comparable
    from recgpt_torchrec.evaluation.comparing.finding import find_evaluation

    path = find_evaluation(config.compare, config.split)
    if os.path.realpath(path) == os.path.realpath(config.output):
        raise InputError(f"--compare {config.compare} is the evaluation that --output replaces; name another one")
    other = Evaluation.open(path)
    check_comparable(identity, other.values, (config.data, path))
    return other


def find_ahead(config: Evaluate, evaluation: dict[str, Any], path: str) -> "list[Difference]":
    """By how much a path is ahead of each baseline; empty without results by user."""
    from recgpt_torchrec.evaluation.comparing.comparison import against_baselines
    from recgpt_torchrec.evaluation.per_user.files import UserResults

    results = UserResults.of(config.output, evaluation)
    return [] if results is None else against_baselines(results, path, evaluation)


def compare_text(config: Evaluate, evaluation: dict[str, Any], other: "Evaluation") -> str:
    """The differences between this evaluation and another one, as text.

    Raises:
        InputError: shared users have other held-out items or histories.
    """
    from recgpt_torchrec.evaluation.comparing.comparison import Evaluation, compare, comparison_text
    from recgpt_torchrec.evaluation.per_user.files import UserResults

    results = UserResults.of(config.output, evaluation)
    assert results is not None
    return comparison_text(compare(Evaluation(config.output, evaluation, results), other), other.path)


def check_output(config: Evaluate) -> None:
    """Check that the output file can be written, and that an existing one may be replaced.

    Raises:
        InputError: its folder does not exist or is not writable; or the file holds something else than an evaluation of
            this dataset and split, and `--overwrite` is not given.
    """
    if not storage.remote(config.output):  # an object store has no folders
        folder = os.path.dirname(os.path.abspath(config.output))
        if not os.path.isdir(folder):
            raise InputError(f"--output {config.output}: the folder {folder} does not exist; make it first")
        if not os.access(folder, os.W_OK):
            raise InputError(f"--output {config.output}: the folder {folder} is not writable; choose another one")
    if storage.is_folder(config.output):
        raise InputError(f"--output {config.output} is a folder; name a file, such as {config.output}/test.json")
    if config.overwrite or not storage.exists(config.output):
        return
    remedy = "choose another --output, or give --overwrite true"
    wanted = {"dataset": config.data, "split": config.split}
    try:
        earlier = storage.read_json(config.output) or {}
    except InputError:
        earlier = {}
    if not wanted.keys() <= earlier.keys():
        raise InputError(f"--output {config.output} holds something else; {remedy}")
    found = {name: earlier.get(name) for name in (*wanted, "event")}
    differing = differences(found, {**wanted, "event": config.event})
    check_same(f"--output {config.output}", "evaluation", differing, remedy)


def table(results: dict[str, Any]) -> str:
    """The results as text: one line per recall path, masked and unmasked."""
    lines = []
    for protocol, meaning in (("masked", "items of the history are left out"), ("unmasked", "every item is ranked")):
        names = list(next(iter(results.values()))[protocol])
        lines.append(f"\n{protocol} ({meaning})\n{'':<28}" + "".join(f"{name:>9}" for name in names))
        for path, figures in results.items():
            lines.append(f"{path:<28}" + "".join(f"{figures[protocol][name]:>9.4f}" for name in names))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(Evaluate, main, "recgpt_torchrec.evaluate")
