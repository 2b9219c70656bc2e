"""Loads an export into a store, and applies deltas to it. What the store holds is recorded before and after."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.progress import LOGGER, progress_bar
from recgpt_torchrec.retrieval.exports.reading import Delta, Export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from tools.stores.store import Items, Record, Store, cluster_count

SHOWN = 12
"""Digits of a state in messages."""


def load(store: Store, export: Export, index: str = "flat", *, replaces: bool = False) -> bool:
    """Load an export's items into a store, batch by batch; what an interrupted load left is dropped first.

    Args:
        store: to load into.
        export: whose items are loaded.
        index: one of `store.indexes`, built after the last batch.
        replaces: whether another export may be dropped.

    Returns:
        Whether it was loaded; False: the store already holds it.

    Raises:
        InputError: the store holds another export, something else, or in the end another number of items.
    """
    manifest, before = export.manifest, store.read_record()
    if index not in store.indexes:
        raise InputError(f"--index {index}: {store.name} has {', '.join(store.indexes)}; give one of them")
    if before is None and store.has_table():
        raise InputError(
            f"{store.uri} has a table {store.table!r} (case aside) that was not loaded from an export; give "
            "another --table"
        )
    if before is not None and before.state and not replaces:
        if (before.state, before.pending, before.index) == (export.state, "", index):
            return False
        raise InputError(
            f"{store.uri} holds {describe(before)} in {store.table!r}; give another --table, or --replace to drop it"
        )
    if before is not None and not before.state:
        LOGGER.info(f"The load of {before.pending_path} was interrupted: starting over")
    clusters = cluster_count(manifest.items) if index == "ivf" else 0
    record = Record(
        pending=export.state, pending_path=export.path, dim=manifest.dim, index=index, clusters=clusters, items=0
    )
    store.write_record(record)
    store.create(manifest.dim)
    with progress_bar(manifest.items, "items") as bar:
        for items in read_items(export.items(rows=batch_rows(store, manifest.dim))):
            store.insert(items)
            bar.update(len(items.ids))
    if index != "flat":
        LOGGER.info(f"Building the index {index} of {manifest.items:,} items")
    store.build_index(record)
    check_count(store, manifest.items, export.path)
    store.write_record(
        replace(record, state=export.state, path=export.path, items=manifest.items, pending="", pending_path="")
    )
    return True


def apply(store: Store, delta: Delta) -> Record:
    """Apply a delta to a store that holds the state before it. After a crash it can be applied again.

    Returns:
        The record of what the store holds now.

    Raises:
        InputError: the store holds another state, nothing, or in the end another number of items.
    """
    manifest, record = delta.manifest, store.read_record()
    check_fits(store, record, delta)
    assert record is not None
    store.write_record(replace(record, pending=delta.state, pending_path=delta.path))
    after = replace(record, state=delta.state, path=delta.path, items=manifest.items, pending="", pending_path="")
    store.prepare_delta()
    rows = batch_rows(store, manifest.dim)
    total = sum(part.rows for part in manifest.item_parts + manifest.removed_item_parts)
    with progress_bar(total, "items") as bar, store.transaction():
        # Removed first: a key of an item that is gone may come back under another id.
        for batch in delta.removed_items():
            store.delete(batch["item_id"].to_numpy())
            bar.update(batch.num_rows)
        for items in read_items(delta.items(rows)):
            store.upsert(items)
            bar.update(len(items.ids))
        check_count(store, manifest.items, delta.path)
    store.finish_delta(record)
    store.write_record(after)
    return after


def find_missing(store: Store, deltas: list[Delta]) -> list[Delta]:
    """The deltas that a store does not hold yet: those after the last one whose state it holds.

    Args:
        store: to which they are to be applied.
        deltas: in order, at least one.

    Raises:
        InputError: a delta does not follow the one before it, or the store holds a part of another one.
    """
    for before, delta in pairwise(deltas):
        if delta.manifest.base != before.state:
            raise InputError(
                f"{delta.path} is for the state {delta.manifest.base[:SHOWN]}, but {before.path} leads to "
                f"{before.state[:SHOWN]}; give deltas in their order, without gaps"
            )
    record, states = store.read_record(), [delta.state for delta in deltas]
    if record is None or record.state not in states:
        return deltas
    missing = deltas[states.index(record.state) + 1 :]
    check_pending(store, record, missing[0].state if missing else "")
    return missing


def check_pending(store: Store, record: Record, state: str) -> None:
    """Check that a store holds no part of a delta but of that which leads to `state`.

    Raises:
        InputError: it does.
    """
    if record.pending not in ("", state):
        raise InputError(f"{record.pending_path} was applied to {store.uri} in part; apply it again first")


def check_fits(store: Store, record: Record | None, delta: Delta) -> None:
    """Check that a delta is the next one for a store.

    Raises:
        InputError: it is not; says why, and what to do.
    """
    base = delta.manifest.base
    if record is None:
        raise InputError(f"{store.uri} holds no export in {store.table!r}; load one before its deltas")
    if not record.state:
        raise InputError(f"the load of {record.pending_path} into {store.uri} was interrupted; run that load again")
    if record.state == delta.state:
        raise InputError(f"{store.uri} holds {describe(record)}: {delta.path} is applied already; go on with the next")
    check_pending(store, record, delta.state)
    if record.state != base:
        raise InputError(
            f"{delta.path} is for the state {base[:SHOWN]}, but {store.uri} holds {describe(record)}; apply the deltas "
            "between them first, or load a whole export with --replace"
        )


def describe(record: Record) -> str:
    """What a store holds, in words."""
    half = f" and a part of {record.pending_path}" if record.pending else ""
    if not record.state:
        return f"a part of {record.pending_path}"
    return f"{record.path} (state {record.state[:SHOWN]}, {record.items:,} items, index {record.index}){half}"


def check_count(store: Store, expected: int, path: str) -> None:
    """Check that a store has the number of items that a manifest promises.

    Raises:
        InputError: it has not.
    """
    if (count := store.count()) != expected:
        raise InputError(
            f"{store.uri} has {count:,} items in {store.table!r}, but should have {expected:,} after {path}: something "
            "else changed the table; load a whole export with --replace"
        )


def batch_rows(store: Store, dim: int) -> int:
    """Number of items of a batch whose vectors fit into `store.batch_bytes`."""
    return max(1, store.batch_bytes // (4 * dim))


def read_items(batches: Iterator[pa.RecordBatch]) -> Iterator[Items]:
    """Items of batches of an export or a delta, their vectors as float32."""
    for batch in batches:
        vectors = np.ascontiguousarray(vectors_of(batch), np.float32)
        yield Items(batch["item_id"].to_numpy(), batch["key"].to_pylist(), vectors)
