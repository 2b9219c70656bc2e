"""Stage `retrieve`: an export -> a list of items for each user, from an exact or an approximate index."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recgpt_torchrec import cli
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from recgpt_torchrec.retrieval.chosen_users import ChosenUsers
    from recgpt_torchrec.retrieval.exports.reading import Export
    from recgpt_torchrec.retrieval.filters import FilterRecord
    from recgpt_torchrec.retrieval.list_folder import ListBatch, ListManifest
    from recgpt_torchrec.retrieval.merging import MergeRule


def main(config: Retrieve) -> None:
    """Search the items for every user, and write the lists."""
    from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
    from recgpt_torchrec.data.neighbours.folder import open_neighbours
    from recgpt_torchrec.data.reading.targets import describe_untargeted
    from recgpt_torchrec.distributed.processes import print_result, run_on_first_rank
    from recgpt_torchrec.distributed.watchdog import watched_group
    from recgpt_torchrec.retrieval.exports.reading import open_on_all_ranks
    from recgpt_torchrec.retrieval.list_folder import ListManifest
    from recgpt_torchrec.retrieval.list_summary import describe_lists, look_line
    from recgpt_torchrec.retrieval.search.choosing import resolve

    with watched_group(config.stall_seconds):  # no search runs on a GPU
        export = open_on_all_ranks(config.export)
        given, config = config, resolve(config, export)
        dataset = Dataset.open(config.data) if config.data is not None else None
        rule, interests = check(config, export, dataset)
        content = {}
        if config.neighbours.path is not None and dataset is not None:
            found = open_neighbours(config.neighbours.path, dataset)
            content = {"content of --neighbours.path": found.fingerprint}
        manifest = ListManifest(
            k=config.k,
            export=config.export,
            export_fingerprint=export.fingerprint,
            vocabulary=export.manifest.vocabulary,
            dataset_fingerprint="" if dataset is None else histories_fingerprint(dataset),
            filters=start_filters(config),
            settings=asdict(config) | content,
        )
        earlier = run_on_first_rank(lambda: finished(config, manifest, given))
        if earlier is None:
            manifest = retrieve(config, export, dataset, rule, interests, manifest)
        print_result(describe_lists(config, export.manifest, earlier or manifest, rule, interests))
        if dataset is not None:
            for line in describe_untargeted(dataset.manifest, bool(dataset.manifest.attributes)):
                print_result(line)
        print_result(f"{'Already there' if earlier else 'Written'}: {config.output}")
        print_result(look_line(config.output))


def start_filters(config: Retrieve) -> "dict[str, FilterRecord]":
    """The records of the files of keys that options name; without any, DuckDB and Ibis are not imported (.35 s)."""
    if not config.key_files:
        return {}
    from recgpt_torchrec.retrieval.key_inputs import start_records

    return start_records(config)


def choose_users(config: Retrieve) -> "AbstractContextManager[ChosenUsers | None]":
    """The users whose lists are asked for (collective); None: all."""
    if config.users is None:
        return nullcontext()
    from recgpt_torchrec.retrieval.chosen_users import ChosenUsers

    return ChosenUsers(config)


def check(config: Retrieve, export: "Export", dataset: Any) -> "tuple[MergeRule, int]":
    """Check the options against the export and the dataset.

    Returns:
        The rule that merges interests, and the number of interests to use.

    Raises:
        InputError: the export has fewer items or interests than asked for, or is from another dataset; or an
            approximate index cannot weigh the items of the history, or raise neighbours.
    """
    from recgpt_torchrec.retrieval.merging import merge_rule

    manifest = export.manifest
    if config.k > manifest.items:
        raise InputError(f"--k is {config.k}, but {config.export} has {manifest.items} items; give at most that many")
    name, interests = config.merge, config.interests or manifest.interests
    if name == "auto":
        name = "two_step" if interests > 1 else "score"
    rule = merge_rule(name, config.m)
    interests = rule.interests or interests
    if interests > manifest.interests:
        raise InputError(
            f"{'two_step merges 2 interests' if rule.interests else f'--interests is {interests}'}, but "
            f"{config.export} has {manifest.interests} per user; export again with --interests {interests}"
        )
    if config.m and name != "two_step":
        raise InputError(
            f"--m is {config.m}, but {config.export} has one interest per user; export again with --interests 2, or "
            "leave --m out"
        )
    if dataset is not None and dataset.manifest.vocabulary != manifest.vocabulary:
        raise InputError(
            f"{config.export} was made from another dataset than {config.data}: its ids mean other items (vocabulary "
            f"{manifest.vocabulary[:12]}, not {dataset.manifest.vocabulary[:12]}). Give --data {manifest.dataset}"
        )
    if config.neighbours.path is not None and config.index != "exact":
        raise InputError(
            f"--neighbours.path {config.neighbours.path}: neighbours raise items that --index {config.index} does not "
            "find; give --index exact"
        )
    if config.seen == "weigh" and manifest.repeat_bias > 0 and config.index != "exact":
        raise InputError(
            f"--seen weigh: {config.export} has the repeat bias {manifest.repeat_bias:g}, which lifts items of a "
            f"history that --index {config.index} does not find; give --index exact"
        )
    made_from = manifest.settings.get("hold_out", "last")
    if dataset is not None and manifest.settings.get("history") != "all" and made_from != dataset.manifest.hold_out:
        raise InputError(
            f"{config.export} was made from a dataset with --hold_out {made_from}, {config.data} has --hold_out "
            f"{dataset.manifest.hold_out}: other items come before the held-out one. Give --data {manifest.dataset}"
        )
    return rule, interests


def finished(config: Retrieve, manifest: "ListManifest", given: Retrieve) -> "ListManifest | None":
    """The manifest of the finished lists in the output folder; None if there are none yet.

    Args:
        config: of this stage.
        manifest: of the lists that are to be made.
        given: the configuration before auto was resolved: lists stay whatever index the export got after them.

    Raises:
        InputError: the folder holds something else, or lists of another export, dataset or other options.
    """
    from recgpt_torchrec.config.fields import changeable_names, default_values
    from recgpt_torchrec.retrieval.list_folder import open_lists
    from recgpt_torchrec.retrieval.search.choosing import CHOICES, EARLIER, is_open
    from recgpt_torchrec.storage.finished import differences, find_finished, flatten

    def values(of: "ListManifest") -> dict[str, Any]:
        names = ("export_fingerprint", "dataset_fingerprint")
        inputs = {name: getattr(of, name) for name in names}
        inputs |= {f"content of --{name}": record.checksum for name, record in of.filters.items()}
        return {**flatten(default_values(config)), **EARLIER, **flatten(of.settings), **inputs}

    def compare(earlier: "ListManifest") -> list[str]:
        there, wanted = values(earlier), values(manifest)
        if is_open(given):
            wanted |= {name: value for name, value in there.items() if name.split(".")[0] in CHOICES}
        return differences(there, wanted, changeable_names(Retrieve))

    return find_finished(config.output, manifest.KIND.name, open_lists, compare)


def retrieve(
    config: Retrieve, export: "Export", dataset: Any, rule: "MergeRule", interests: int, manifest: "ListManifest"
) -> "ListManifest":
    """Open or build the index, search it for every user, and write the lists.

    Collective: each rank has a share of the users, and a share of the items.
    """
    from recgpt_torchrec.distributed.processes import log_message
    from recgpt_torchrec.distributed.watchdog import report_phase
    from recgpt_torchrec.evaluation.list_quality import ListQuality
    from recgpt_torchrec.retrieval.exports.item_keys import ItemKeys
    from recgpt_torchrec.retrieval.fallback import popular_lists
    from recgpt_torchrec.retrieval.list_folder import write_lists
    from recgpt_torchrec.retrieval.neighbours import NeighbourRecall
    from recgpt_torchrec.retrieval.search.searching import build_retrievers, search_users
    from recgpt_torchrec.retrieval.user_histories import UserHistories

    total, count = export.manifest.users, export.manifest.interests
    interests_each = f"{count} interest{'s' * (count > 1)} each"
    log_message(f"{config.export}: {export.manifest.items:,} items, {total:,} users, {interests_each}")
    allowed = None
    if config.key_files:
        from recgpt_torchrec.retrieval.search.item_filter import find_allowed

        allowed = find_allowed(config, export, manifest.filters)
        if allowed is not None:
            manifest.allowed = int(allowed.sum())
    neighbours = None if dataset is None else NeighbourRecall.open(config.neighbours, dataset)
    started = time.perf_counter()
    report_phase("opening the index")
    exact, retriever, finish = build_retrievers(config, export, rule, allowed, neighbours)
    index_seconds = time.perf_counter() - started
    split = export.manifest.settings.get("history", "all")
    histories = UserHistories(dataset, split) if dataset is not None else None
    with choose_users(config) as chosen:
        total = total if chosen is None else min(total, chosen.keys)
        quality = ListQuality(
            config.k,
            held_out=histories is not None and split != "all",
            exact=exact if config.sample and retriever is not exact else None,
            every=max(1, total // max(1, config.sample)),
            by_place=chosen is not None,
        )
        started = time.perf_counter()

        def batches() -> "Iterator[ListBatch]":
            yield from search_users(export, retriever, histories, interests, quality.update, chosen)
            if config.fallback == "popular":
                finish()  # the other ranks need not wait for it
                yield from popular_lists(export, dataset, config.k, allowed, chosen)

        def measurements() -> dict[str, Any]:
            seconds = time.perf_counter() - started - quality.seconds
            if chosen is not None:
                chosen.complete(manifest.filters["users"], config)
            searched = manifest.users - manifest.popular
            return {"index_seconds": index_seconds, "users_per_second": searched / seconds, **quality.result()}

        report_phase("searching")
        with ItemKeys(export, config.output) as keys:
            return write_lists(config.output, manifest, batches(), keys, measurements, finish)


if __name__ == "__main__":
    cli.run(Retrieve, main, "recgpt_torchrec.retrieve")
