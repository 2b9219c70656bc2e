"""Assigns slots of tables of fixed size to keys: by hash, or by managed collision.

Both read the keys of a log as a stream, some rows at a time, and hold only what is there once per slot. The stream has
a row for each key that the log kept and for each key with a slot; see `COLUMNS`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.ids.records import IdTable
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError

COLUMNS = {
    "code": pa.int64(),
    "hash": pa.string(),
    "known": pa.int64(),
    "kept": pa.int64(),
    "count": pa.int64(),
    "last": pa.int64(),
}
"""Columns of the stream: the code of the key; 16 hex digits of its hash; the slot it has, or -1; the number of its
interactions that the log kept; how many of these are counted now, and the time of the newest of those (or null)."""
CODES = pa.schema([("code", pa.int64()), ("id", pa.int64())])
"""Schema of the codes that have an id."""
Stream = Callable[[], Iterator[pa.RecordBatch]]
"""Reads the stream from its beginning."""
Codes = Iterator[pa.Table]


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What the slots of a table hold once the keys of a log were counted; arrays of one value per used slot."""

    record: IdTable
    code: Int64
    """[slots] int64 code of the key that the slot is named by."""
    columns: dict[str, Int64]
    """Further columns of the parts: see `assign_hashed` and `assign_managed`."""
    evicted: int = 0
    """Number of keys that lost their slot."""
    refused: int = 0
    """Number of keys of the log that got none."""


def read_hashes(column: pa.Array) -> Int64:
    """[n] int64 from 0 to 2^63 - 2: the hashes of which the stream has 16 hex digits."""
    digits = np.frombuffer(bytes.fromhex("".join(column.to_pylist())), dtype=">u8")
    return np.minimum(digits.astype(np.uint64) >> np.uint64(1), np.uint64(2**63 - 2)).astype(np.int64)


def assign_hashed(stream: Stream, record: IdTable, used: int) -> tuple[Slots, Callable[[], Codes]]:
    """Give every key the slot of its hash's bucket; buckets are numbered as they are first used.

    Args:
        stream: see `COLUMNS`.
        record: of the earlier dataset, or a new one.
        used: number of slots of the earlier dataset.

    Returns:
        The slots, named by their most frequent key, with the columns `bucket`, and `keys`: how many of the log's keys
        share the slot. And a function that reads the id of every code, with the schema `CODES`.
    """
    slot_of = np.full(record.rows, -1, np.int64)
    taken = np.zeros(record.rows, bool)
    for batch in stream():
        in_bucket, known = read_hashes(batch["hash"]) % record.rows, _values(batch, "known")
        slot_of[in_bucket[known >= 0]] = known[known >= 0]
        taken[in_bucket] = True
    new = np.flatnonzero(taken & (slot_of < 0))
    slot_of[new] = np.arange(used, used + len(new))
    used += len(new)

    code, most, keys = np.full(used, -1, np.int64), np.full(used, -1, np.int64), np.zeros(used, np.int64)
    for batch in stream():
        slots = slot_of[read_hashes(batch["hash"]) % record.rows]
        codes, kept = _values(batch, "code"), _values(batch, "kept")
        np.add.at(keys, slots, 1)
        order = np.lexsort((codes, -kept, slots))
        best = order[np.unique(slots[order], return_index=True)[1]]  # of each slot, the one with most in this batch
        best = best[kept[best] > most[slots[best]]]  # codes ascend, so the earlier batch's comes first if equal
        code[slots[best]], most[slots[best]] = codes[best], kept[best]

    def read_codes() -> Codes:
        for batch in stream():
            slots = slot_of[read_hashes(batch["hash"]) % record.rows]
            yield pa.table([batch["code"], pa.array(slots)], schema=CODES)

    (taken_buckets,) = np.nonzero(slot_of >= 0)
    buckets = np.empty(used, np.int64)
    buckets[slot_of[taken_buckets]] = taken_buckets
    return Slots(record=record, code=code, columns={"bucket": buckets, "keys": keys}), read_codes


def assign_managed(
    stream: Stream, record: IdTable, since: Int64, seen: Int64, last_seen: Int64, version: int
) -> tuple[Slots, Callable[[], Codes]]:
    """Count the keys of a log in a managed table, and see which keys have which slots then.

    Args:
        stream: see `COLUMNS`.
        record: of the earlier dataset, or a new one.
        since, seen, last_seen: [used] int64 columns of the earlier dataset's parts, by slot.
        version: number of the new vocabulary, if an id changes.

    Returns:
        The slots, with the columns `since` (the version in which the slot was given to another key, 0 if it never was),
        `seen` and `last_seen` (number of interactions and step of the last, where the policy needs them). And a
        function that reads the id of every code that has one, with the schema `CODES`.
    """
    from recgpt_torchrec.preparation.ids.managed import ManagedTable

    assert record.eviction != "none"
    used, table = len(since), ManagedTable(record.rows, record.eviction)
    known_hashes = np.full(used, -1, np.int64)
    first = newest = None
    for batch in stream():
        known = _values(batch, "known")
        known_hashes[known[known >= 0]] = read_hashes(batch["hash"])[known >= 0]
        times = batch["last"].drop_null().to_numpy()
        if len(times):
            first = min(int(times.min()), first if first is not None else int(times.min()))
            newest = max(int(times.max()), newest if newest is not None else int(times.max()))
    if (known_hashes < 0).any() or len(np.unique(known_hashes)) < used:
        raise InputError("two of the earlier dataset's keys have one slot or one hash; restore that dataset")
    table.restore(known_hashes, seen, last_seen)
    record = _advance(record, first, newest, any(_values(batch, "count").any() for batch in stream()))

    for has_slot in (True, False):  # first all known keys are counted, so that none is evicted as if it were not there
        for batch in stream():
            known, counts = _values(batch, "known"), _values(batch, "count")
            (rows,) = np.nonzero(((known >= 0) == has_slot) & (counts > 0))
            hashes = read_hashes(batch["hash"])[rows]
            _, places = np.unique(hashes, return_index=True)  # two keys with one hash: the first
            rows = rows[places]
            table.count(hashes[places], counts[rows], _steps(record, batch, rows), record.now)
    table.number_new()

    now_hashes, seen, last_seen = table.state()
    changed = np.zeros(table.used, bool)
    changed[:used] = now_hashes[:used] != known_hashes
    since = np.concatenate([since, np.zeros(table.used - used, np.int64)])
    since[changed] = version
    own = np.full(table.used, -1, np.int64)
    """[used] code of the key that has the slot."""
    present = 0
    for batch in stream():
        known, codes = _values(batch, "known"), _values(batch, "code")
        slots = table.find(read_hashes(batch["hash"]))
        new = (slots >= 0) & ((slots >= used) | changed[np.minimum(slots, table.used - 1)])
        (rows,) = np.nonzero((slots >= 0) & ((known == slots) | ((known < 0) & new)))
        rows = rows[np.unique(slots[rows], return_index=True)[1]]
        rows = rows[own[slots[rows]] < 0]
        own[slots[rows]] = codes[rows]
        present += int((known < 0).sum())
    got = int((own >= 0).sum()) - int((~changed[:used]).sum())
    if changed.any():
        record = replace(record, reassigned=version)

    def read_codes() -> Codes:
        for batch in stream():
            slots, codes = table.find(read_hashes(batch["hash"])), _values(batch, "code")
            has = slots >= 0
            has[has] = own[slots[has]] == codes[has]
            yield pa.table([pa.array(codes[has]), pa.array(slots[has])], schema=CODES)

    columns = {"since": since, "seen": seen, "last_seen": last_seen}
    held = Slots(record=record, code=own, columns=columns, evicted=int(changed.sum()), refused=present - got)
    return held, read_codes


def _advance(record: IdTable, first: int | None, newest: int | None, counts: bool) -> IdTable:
    """The record once interactions with times from `first` to `newest` are counted; without times a step has passed."""
    if newest is None or first is None:
        return replace(record, now=record.now + counts)
    origin = first if record.origin is None else record.origin
    until = newest if record.until is None else max(record.until, newest)
    return replace(record, origin=origin, until=until, now=max(record.now, _step_of(record.step, origin, until)))


def _step_of(step: int, origin: int, time: int) -> int:
    return time // step - origin // step + 1


def _steps(record: IdTable, batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> Int64:
    """[rows] int64 step of the last interaction of some rows of a batch; those before the first are in it."""
    last = batch["last"].take(pa.array(rows))
    if record.origin is None:
        return np.full(len(rows), record.now, np.int64)
    steps = last.to_numpy(zero_copy_only=False) // record.step - record.origin // record.step + 1
    return np.maximum(steps.astype(np.int64), 1)


def _values(batch: pa.RecordBatch, name: str) -> Int64:
    values: Int64 = batch[name].to_numpy(zero_copy_only=False)
    return values
