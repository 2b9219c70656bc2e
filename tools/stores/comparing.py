"""Compares a store's lists with exact ones by brute force over the export, and with those that `retrieve` wrote.

A list is equal to another one if their items have the same scores place by place, within rounding: items with equal
scores may be in any order. recall@k counts an item that has at least the k-th best score, for the same reason.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from tools.stores.loading import describe
from tools.stores.store import Float32, Int64, Record, Store

QUERIES = 256
"""Queries per search."""
SCORES = 2**24
"""Maximum number of scores that are held at once."""
ROUNDING = 1e-5
"""Scores that differ by less are equal: a share of the largest score that the vectors allow."""

EXACT = ("exact", "flat")
"""Values of `--index` of `retrieve` that give exact lists."""
FILTERS = ("allow", "deny", "where", "users")
"""Options of `retrieve` that restrict its lists to some items or users."""


class Users(NamedTuple):
    """Some users of an export."""

    ids: Int64
    """[users] int64."""
    vectors: Float32
    """[users, interests, dim] float32."""


@dataclass(kw_only=True)
class Comparison:
    """How far a store's lists agree with others."""

    lists: int
    """Number of lists compared."""
    equal: float
    """Share of lists that are equal, ties aside."""
    recall: float
    """Mean share of a list's items that the store found."""
    seconds: float = 0.0
    """Time of the store's searches."""
    index: str = "exact"
    """Index that found the lists compared with: exact, or the kind that `retrieve` searched."""
    index_recall: float | None = None
    """Share of the exact lists that this index found, if `retrieve` measured it."""

    @property
    def source(self) -> str:
        """The index in words."""
        if self.index in EXACT:
            return f"index {self.index}"
        share = "not measured" if self.index_recall is None else f"{self.index_recall:.4f}"
        return f"approximate index {self.index}, its recall {share}"


def check_comparable(store: Store, export: Export) -> Record:
    """The record of a store that holds `export`.

    Raises:
        InputError: it holds nothing, or something else.
    """
    record = store.read_record()
    if record is None:
        raise InputError(f"{store.uri} holds no export in {store.table!r}; load one first")
    if record.state != export.state or record.pending:
        raise InputError(
            f"{store.uri} holds {describe(record)}, not {export.path}; compare it with the export it holds"
        )
    return record


def read_users(export: Export, count: int) -> Users:
    """At most `count` users, evenly spaced over the export's rows."""
    total = export.manifest.users
    wanted = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    ids, vectors, first = [], [], 0
    for batch in export.users(rows=max(1, SCORES // (export.manifest.interests * export.manifest.dim))):
        places = wanted[(wanted >= first) & (wanted < first + batch.num_rows)] - first
        first += batch.num_rows
        if places.size:
            chosen = batch.take(pa.array(places))
            ids.append(chosen["user_id"].to_numpy())
            vectors.append(vectors_of(chosen).reshape(len(places), -1, export.manifest.dim))
    return Users(np.concatenate(ids), np.concatenate(vectors))


def search_all(store: Store, record: Record, queries: Float32, k: int, effort: int = 0) -> tuple[Int64, Float32, float]:
    """The store's lists of some queries, `QUERIES` at a time.

    Returns:
        ids [queries, k] int64, scores [queries, k] float32 and the seconds that it took.
    """
    ids, scores, seconds = [], [], 0.0
    with progress_bar(len(queries), "queries") as bar:
        for first in range(0, len(queries), QUERIES):
            started = time.perf_counter()
            found = store.search(queries[first : first + QUERIES], k, record, effort)
            seconds += time.perf_counter() - started
            ids.append(found.ids)
            scores.append(found.scores)
            bar.update(len(found.ids))
    return np.concatenate(ids), np.concatenate(scores), seconds


def compare_exactly(export: Export, queries: Float32, ids: Int64, scores: Float32, seconds: float = 0.0) -> Comparison:
    """Compare a store's lists with the exact ones, by scoring every item of the export.

    Args:
        export: which the store holds.
        queries: [queries, dim] float32.
        ids: [queries, k] int64 that the store found; -1: fewer.
        scores: [queries, k] float32 that it gave them.
        seconds: time of its searches.

    Raises:
        InputError: the store gave an item twice in a list, an item that the export has not, or a wrong score.
    """
    k = ids.shape[1]
    best = np.full((len(queries), k), -np.inf, np.float32)
    own = np.full(ids.shape, np.nan, np.float32)
    """The exact scores of the items that the store found."""
    longest = 0.0
    rows = max(1, SCORES // max(len(queries), export.manifest.dim))
    found = ids.reshape(-1)
    with progress_bar(export.manifest.items, "items scored") as bar:
        for batch in export.items(("item_id", "vector"), rows=rows):
            items, vectors = batch["item_id"].to_numpy(), vectors_of(batch)
            all_scores = queries @ vectors.T
            longest = max(longest, float(np.linalg.norm(vectors, axis=1).max()))
            best = -np.partition(-np.concatenate([best, all_scores], axis=1), k - 1, axis=1)[:, :k]
            by_id = np.argsort(items)
            nearest = by_id[np.minimum(np.searchsorted(items[by_id], found), len(items) - 1)]
            (places,) = np.nonzero(items[nearest] == found)
            own.reshape(-1)[places] = all_scores[places // k, nearest[places]]
            bar.update(len(items))
    best = -np.sort(-best, axis=1)
    is_found = ids >= 0
    if np.isnan(own[is_found]).any():
        raise InputError(f"the store found item {ids[is_found & np.isnan(own)][0]}, which {export.path} does not have")
    tolerance = ROUNDING * longest * np.linalg.norm(queries, axis=1, keepdims=True)
    if (np.abs(own - scores)[is_found] > np.broadcast_to(tolerance, ids.shape)[is_found]).any():
        raise InputError("the store's scores are not inner products; check its metric and the vectors it holds")
    for row in ids:
        if len(np.unique(row[row >= 0])) != (row >= 0).sum():
            raise InputError("the store found an item twice for one query; load the export again with --replace")
    own = np.where(is_found, own, -np.inf)
    expected = min(k, export.manifest.items)
    hits = own >= best[:, [expected - 1]] - tolerance
    return Comparison(
        lists=len(ids),
        equal=float(is_equal(own[:, :expected], best[:, :expected], tolerance).mean()),
        recall=float(hits.sum(axis=1).mean() / expected),
        seconds=seconds,
    )


def is_equal(scores: Float32, others: Float32, tolerance: Float32) -> npt.NDArray[np.bool_]:
    """[lists] whether scores [lists, k] agree place by place; the same place may be empty (-inf) in both."""
    with np.errstate(invalid="ignore"):
        near = np.abs(scores - others) <= tolerance
    return (near | ((scores == -np.inf) & (others == -np.inf))).all(axis=1)


def compare_with_lists(
    store: Store, record: Record, export: Export, lists: str, data: str | None, count: int, effort: int = 0
) -> Comparison:
    """Compare a store's lists, merged by the rule of `retrieve`, with those in a folder that `retrieve` wrote.

    Args:
        store: holds `export`.
        record: of the store.
        export: that `retrieve` searched.
        lists: folder of the lists.
        data: folder of the dataset whose histories `retrieve` left out; None where it left none out.
        count: maximum number of users.
        effort: see `Store.search`.

    Raises:
        InputError: the lists are of another export, or were made with other histories than `data`.
    """
    # Merging is written for tensors; loading needs no torch.
    import torch

    from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
    from recgpt_torchrec.retrieval.list_folder import open_lists
    from recgpt_torchrec.retrieval.merging import Lists, merge_rule
    from recgpt_torchrec.retrieval.user_histories import UserHistories

    manifest = open_lists(lists)
    if manifest.export_fingerprint != export.fingerprint:
        raise InputError(f"{lists} was retrieved from another export than {export.path}; give that one")
    dataset = Dataset.open(data) if data is not None else None
    if manifest.dataset_fingerprint != ("" if dataset is None else histories_fingerprint(dataset)):
        asked = manifest.settings.get("data")
        raise InputError(
            f"{lists} leaves out {'the histories of ' + asked if asked else 'no histories'}; give --data as to retrieve"
        )
    if filters := [name for name in FILTERS if manifest.settings.get(name)]:
        raise InputError(f"{lists} was retrieved with --{filters[0]}; compare with lists of all items and users")
    if (manifest.settings.get("neighbours") or {}).get("path") is not None:
        raise InputError(f"{lists} was retrieved with --neighbours.path; compare with lists of the model alone")
    name, interests = manifest.settings.get("merge", "auto"), manifest.settings.get("interests") or 0
    if name == "auto":
        name = "two_step" if export.manifest.interests > 1 else "score"
    rule = merge_rule(name, manifest.settings.get("m", 0))
    interests = rule.interests or interests or export.manifest.interests
    users, k = read_users(export, count), manifest.k
    vectors = users.vectors[:, :interests]
    expected = read_lists(lists, manifest.parts, users.ids, k)
    split = export.manifest.settings.get("history", "all")
    seen = None
    if dataset is not None:
        histories = UserHistories(dataset, split).of(users.ids)
        assert histories.seen is not None
        seen = histories.seen.to_lists()
    depth = min(export.manifest.items, k + (0 if seen is None else max(len(set(row)) for row in seen)))
    queries = vectors.reshape(-1, export.manifest.dim)
    ids, scores, seconds = search_all(store, record, queries, depth, effort)
    if seen is not None:
        ids, scores = leave_out(ids, scores, [row for row in seen for _ in range(interests)], k)
    shape = (len(users.ids), interests, k)
    merged = rule.merge(Lists(torch.from_numpy(ids.reshape(shape)), torch.from_numpy(scores.reshape(shape))), k)
    found_ids, found_scores = merged.items.numpy(), merged.scores.numpy()
    both = (found_ids[:, :, None] == expected[0][:, None, :]).any(axis=2) & (found_ids >= 0)
    tolerance = ROUNDING * np.linalg.norm(vectors, axis=2).max(axis=1, keepdims=True) * norm_of_items(export)
    return Comparison(
        lists=len(users.ids),
        equal=float(is_equal(found_scores, expected[1], tolerance).mean()),
        recall=float((both.sum(axis=1) / np.maximum(1, (expected[0] >= 0).sum(axis=1))).mean()),
        seconds=seconds,
        index=manifest.settings.get("index", "exact"),
        index_recall=(manifest.measured.get("recall") or {}).get(f"recall@{k}"),
    )


def leave_out(ids: Int64, scores: Float32, seen: list[Any], k: int) -> tuple[Int64, Float32]:
    """The first `k` items of each list without those `seen` [lists] of its user, filled up with -1 and -inf."""
    kept_ids, kept_scores = np.full((len(ids), k), -1, np.int64), np.full((len(ids), k), -np.inf, np.float32)
    for row, items in enumerate(seen):
        (places,) = np.nonzero((ids[row] >= 0) & ~np.isin(ids[row], items))
        places = places[:k]
        kept_ids[row, : len(places)], kept_scores[row, : len(places)] = ids[row, places], scores[row, places]
    return kept_ids, kept_scores


def norm_of_items(export: Export) -> float:
    """The largest norm of an item's vector."""
    return max(float(np.linalg.norm(vectors_of(batch), axis=1).max()) for batch in export.items(("item_id", "vector")))


def read_lists(path: str, parts: list[Any], users: Int64, k: int) -> tuple[Int64, Float32]:
    """The lists of `users` [n] in a folder of `retrieve`: ids [n, k] and scores [n, k], -1 and -inf where shorter.

    Raises:
        InputError: a user has no list.
    """
    ids, scores = np.full((len(users), k), -1, np.int64), np.full((len(users), k), -np.inf, np.float32)
    place_of = {user: place for place, user in enumerate(users.tolist())}
    missing = set(place_of)
    for batch in _read_parts(path, parts):
        is_wanted = np.isin(batch["user_id"].to_numpy(), users)
        for row in batch.filter(pa.array(is_wanted)).to_pylist():
            place, length = place_of[row["user_id"]], len(row["item_ids"])
            ids[place, :length], scores[place, :length] = row["item_ids"], row["scores"]
            missing.discard(row["user_id"])
    if missing:
        raise InputError(f"{path} has no list of user {min(missing)}; run retrieve again")
    return ids, scores


def _read_parts(path: str, parts: list[Any]) -> Iterator[pa.RecordBatch]:
    from recgpt_torchrec.storage import filesystem
    from recgpt_torchrec.storage.parts import open_part

    fs, root = filesystem(path)
    for part in parts:
        with open_part(fs, root, part) as file:
            yield from file.iter_batches(columns=["user_id", "item_ids", "scores"])
