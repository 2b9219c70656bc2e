"""Loads exports and deltas into vector stores, and compares their lists with exact ones. See docs/vector_stores.md.

python -m tools.stores load --store lancedb --uri vectors/lance --export vectors/mine --index hnsw
python -m tools.stores apply --store lancedb --uri vectors/lance --delta vectors/mine-0900
python -m tools.stores show --store lancedb --uri vectors/lance
python -m tools.stores compare --store lancedb --uri vectors/lance --export vectors/mine --users 1000 --k 50
"""

import argparse
import json
import sys
import time
from typing import Any

from recgpt_torchrec.errors import REFUSED, InputError
from recgpt_torchrec.progress import LOGGER
from recgpt_torchrec.retrieval.exports.reading import open_delta, open_export
from tools.stores import comparing, loading
from tools.stores.store import INDEXES, STORES, Store, one_line, open_store


def main() -> int:
    """Run one command; the exit status is 2 where something that the user gave cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.stores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", choices=STORES, required=True)
    common.add_argument("--uri", required=True, help="where the store is: a folder, a file or a server, by store")
    common.add_argument("--table", default="items", help="name of the table or collection (default: items)")
    load = commands.add_parser("load", parents=[common], help="load an export's items")
    load.add_argument("--export", required=True, help="folder of the export")
    load.add_argument("--index", choices=INDEXES, default="flat", help="flat is exact (default: flat)")
    load.add_argument("--replace", action="store_true", help="drop what the table holds")
    apply = commands.add_parser("apply", parents=[common], help="apply deltas, in order")
    apply.add_argument("--delta", nargs="+", required=True, help="folders of deltas, the earliest first")
    commands.add_parser("show", parents=[common], help="say what the store holds")
    compare = commands.add_parser("compare", parents=[common], help="compare the store's lists with exact ones")
    compare.add_argument("--export", required=True, help="folder of the export that the store holds")
    compare.add_argument("--lists", help="folder of lists that retrieve wrote; compare with these too")
    compare.add_argument("--data", help="folder of the dataset, if retrieve had --data")
    compare.add_argument("--users", type=positive, default=1000, help="number of users (default: 1000)")
    compare.add_argument("--k", type=positive, default=50, help="items per list (default: 50)")
    compare.add_argument("--effort", type=positive, default=0, help="ivf: clusters searched; hnsw: candidates held")
    compare.add_argument("--output", help="also write the figures to this JSON file")
    options = parser.parse_args()
    try:
        # What is to be read is looked at first: a wrong folder is told before a store is made.
        folder = None
        if options.command in ("load", "compare"):
            folder = open_export(options.export)
        deltas = [open_delta(path) for path in options.delta] if options.command == "apply" else []
        with open_store(options.store, options.uri, options.table, creates=options.command == "load") as store:
            try:
                {"load": run_load, "apply": run_apply, "show": run_show, "compare": run_compare}[options.command](
                    store, options, folder or deltas
                )
            except store.errors as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{options.store} at {options.uri} refused: {type(error).__name__}: {one_line(error)}. "
                    "What was written is not taken for whole; run the same command again when this is mended"
                ) from error
    except InputError as error:
        print(f"tools.stores: {error}", file=sys.stderr)
        return REFUSED
    return 0


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def run_load(store: Store, options: argparse.Namespace, export: Any) -> None:
    """Load an export."""
    started = time.perf_counter()
    is_new = loading.load(store, export, options.index, replaces=options.replace)
    seconds, count = time.perf_counter() - started, export.manifest.items
    record = store.read_record()
    assert record is not None
    took = f", in {seconds:.1f} s: {count / seconds:,.0f} items/s with the index" if is_new else ""
    LOGGER.info(f"{'Loaded' if is_new else 'Already there'}: {loading.describe(record)}{took}")
    where = f"--store {options.store} --uri {options.uri}"
    LOGGER.info(f"Next:    python -m tools.stores compare {where} --export {options.export}")


def run_apply(store: Store, options: argparse.Namespace, deltas: Any) -> None:
    """Apply deltas in order; those that the store holds already are passed over."""
    missing = loading.find_missing(store, deltas)
    if not missing:
        record = store.read_record()
        assert record is not None
        LOGGER.info(f"Already there: {loading.describe(record)}")
    for delta in missing:
        started = time.perf_counter()
        record = loading.apply(store, delta)
        changed = sum(part.rows for part in delta.manifest.item_parts)
        removed = sum(part.rows for part in delta.manifest.removed_item_parts)
        LOGGER.info(
            f"Applied: {loading.describe(record)}: {changed:,} items new or moved, {removed:,} removed, in "
            f"{time.perf_counter() - started:.1f} s"
        )


def run_show(store: Store, options: argparse.Namespace, _: Any) -> None:
    """Say what the store holds."""
    record = store.read_record()
    LOGGER.info(f"{options.uri} holds {'no export' if record is None else loading.describe(record)}")


def run_compare(store: Store, options: argparse.Namespace, export: Any) -> None:
    """Compare the store's lists with exact ones, and with those of `retrieve`."""
    record = comparing.check_comparable(store, export)
    if options.k > export.manifest.items:
        raise InputError(f"--k is {options.k}, but {options.export} has {export.manifest.items} items; give fewer")
    users = comparing.read_users(export, options.users)
    queries = users.vectors.reshape(-1, export.manifest.dim)
    found = comparing.search_all(store, record, queries, options.k, options.effort)
    exact = comparing.compare_exactly(export, queries, *found)
    rate = exact.lists / exact.seconds
    LOGGER.info(
        f"{options.store}, index {record.index}: {exact.lists:,} lists of {options.k}, {exact.equal:.1%} equal to "
        f"the exact ones, recall@{options.k} {exact.recall:.4f}, {rate:,.0f} queries/s"
    )
    figures: dict[str, Any] = {
        "store": options.store,
        "index": record.index,
        "items": record.items,
        "dim": record.dim,
        "k": options.k,
        "effort": options.effort,
        "exact": vars(exact) | {"queries_per_second": rate},
    }
    if options.lists:
        lists = comparing.compare_with_lists(
            store, record, export, options.lists, options.data, options.users, options.effort
        )
        LOGGER.info(
            f"beside {options.lists} ({lists.source}): {lists.lists:,} users, {lists.equal:.1%} of the merged lists "
            f"equal, {lists.recall:.4f} of their items found"
        )
        figures["lists"] = vars(lists)
    if options.output:
        with open(options.output, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
