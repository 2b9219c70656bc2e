"""Measures a checkpoint's recall paths, and the baselines beside them, on the users of a split."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch

from recgpt_torchrec.checkpoints.repeat_bias import NAME
from recgpt_torchrec.config import Evaluate
from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.distributed.processes import log_message, rank, world_size
from recgpt_torchrec.distributed.watchdog import phase, report_phase
from recgpt_torchrec.evaluation import baselines
from recgpt_torchrec.evaluation.groups import GroupedMetrics, Grouping
from recgpt_torchrec.evaluation.list_sample import ListSample
from recgpt_torchrec.evaluation.metrics import reduce_metrics
from recgpt_torchrec.evaluation.per_user.facts import Facts
from recgpt_torchrec.evaluation.per_user.recording import UserRecorder
from recgpt_torchrec.evaluation.recall_paths import RecallPaths
from recgpt_torchrec.retrieval.neighbours import NeighbourRecall
from recgpt_torchrec.texts.words import count
from recgpt_torchrec.training.loading import Trained


def lacks_prompts(trained: Trained, dataset: Dataset) -> bool:
    """Whether a model was tuned on histories with prompts, and a dataset has none."""
    return trained.prompts and "prompts" not in dataset.manifest.settings


def measure(
    config: Evaluate, dataset: Dataset, checkpoint: str, trained: Trained, request: Request, device: torch.device
) -> dict[str, Any]:
    """Measure a model (collective); the evaluation, as `evaluate` writes it, on every rank.

    Args:
        config: options of the stage.
        dataset: whose users are measured.
        checkpoint: folder of the model, for the record.
        trained: the model.
        request: what every user asks for.
        device: of this rank.
    """
    manifest, ks = dataset.manifest, tuple(config.ks)
    are_all_ranked = config.event is None and not trained.inputs.history_events
    ranked = manifest.count_targets(config.split) if are_all_ranked else None
    grouping, lists = Grouping.read(dataset), ListSample(seed=config.seed)
    neighbours = NeighbourRecall.open(config.neighbours, dataset)
    with ExitStack() as resources:
        recorder = resources.enter_context(UserRecorder(config.output)) if config.per_user else None
        shared: dict[str, Any] = {"request": request, "recorder": recorder, "lists": lists}
        paths = RecallPaths(
            trained,
            dataset,
            config.batch,
            device,
            users=config.users,
            seed=config.seed,
            grouping=grouping,
            neighbours=neighbours,
            **shared,
        )
        chosen_users = paths.sample(config.split)
        of_all = "some of " if ranked is None else f"{ranked:,} of "
        of_all = f"a sample of {config.users:,} of the " if chosen_users is not None else of_all
        log_message(
            f"{checkpoint}: ranking {count(manifest.items, 'item')} for {of_all}{count(manifest.users, 'user')} "
            f"({config.split})"
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
                    sample=chosen_users,
                    grouped=of_baselines,
                    inputs=trained.inputs,
                    **shared,
                )
            for name, protocols in measured.items():
                results[name] = {protocol: reduce_metrics(metrics).result() for protocol, metrics in protocols.items()}
            grouped |= of_baselines
        groups = {path: metrics.result() for path, metrics in grouped.items()}
        per_user = None
        if recorder is not None:
            facts = Facts(
                dataset=dataset, split=config.split, inputs=trained.inputs, request=request, sample=chosen_users
            )
            with phase("joining results by user", computes=True):
                has_age = facts.record(recorder)
                unit = manifest.time_unit if has_age else None
                per_user = recorder.join(manifest.users, paths=list(results), has_age=has_age, age_unit=unit)
    sample = {"of_users": ranked, "sample": {"users": config.users, "seed": config.seed}}
    optional = {
        "event": config.event,
        "asked": None if config.event is None else bool(request.event),
        "without_prompts": lacks_prompts(trained, dataset) or None,
        "per_user": None if per_user is None else asdict(per_user),
        "neighbours": None if neighbours is None else neighbours.describe(),
        "hold_out": None if manifest.hold_out == "last" else manifest.hold_out,
        "request_time": trained.inputs.of_request_time or None,
    }
    return {
        "dataset": config.data,
        "checkpoint": checkpoint,
        "split": config.split,
        "users": users,
        **({} if chosen_users is None else sample),
        "results": results,
        NAME: paths.bias,
        "groups": groups,
        "recall": chosen,
        "vocabulary": manifest.vocabulary,
        "histories": histories_fingerprint(dataset),
        **lists.result(dataset, list(results)),
        **{name: value for name, value in optional.items() if value is not None},
    }
