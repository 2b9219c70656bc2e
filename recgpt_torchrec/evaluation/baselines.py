"""Two baselines without gradient training: popularity and item co-occurrence.

Both are fitted on training items only (`data.split`), one row group at a time, and score batches of histories
against the whole catalogue. Where a dataset holds generated or shown items (`segment_ids`), only items that were
interacted with (segment 0) count.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from recgpt_torchrec.catalogue.ranks import both_ranks
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.neighbours.pairs import (
    BACKWARD,
    DISTANCE_POWER,
    ITEM_POWER,
    RECENCY,
    SOURCE_POWER,
    WINDOW,
    forward_pairs,
)
from recgpt_torchrec.data.packed import IDS_ALONE
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.stream import ANY
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.distributed.memory import available_bytes
from recgpt_torchrec.distributed.processes import gather_objects, log_message
from recgpt_torchrec.evaluation.groups import PROTOCOLS, GroupedMetrics
from recgpt_torchrec.evaluation.list_sample import ListSample, best_unseen
from recgpt_torchrec.evaluation.metrics import RankingMetrics
from recgpt_torchrec.evaluation.per_user.recording import UserRecorder

WHOLE = 2**40
"""Longer than any history: baselines read all of each."""
SCORE_BYTES = 2**27
"""Bytes of one dense [users, items] matrix of scores in `evaluate_baselines`."""
LIMIT = 2**34
"""Maximum number of bytes that a baseline may be estimated to need per rank: 16 GiB, about 35 million interactions."""
ITEM_BYTES = {"popularity": 24, "cooccurrence": 120}
"""Bytes per item of each baseline: an int64 count, and a row of float32 scores with its comparisons; of co-occurrence
also the row starts of its matrices. At 10 million items both together took 1.2 GB beyond the pairs of 2 million
interactions."""
LEFT_SHARE = 0.5
"""Share of the memory left that baselines may need together."""
ROWS = 4096
"""Rows of a matrix of pairs that are scaled at once."""
PAIR_BYTES = 24
"""Bytes per pair of items that there may be, at the peak of fitting. A pair that is there takes 12 in a matrix and
about 55 at the peak, but pairs repeat and histories are short: 10 bytes per possible pair were measured on Beauty, and
21 with items drawn at random in histories of 15."""


class Baseline(Protocol):
    """A baseline: `add` all training items, then `scores`."""

    def add(self, lists: Ragged) -> None:
        """Count the training items of some users; each user is added once."""
        ...

    def scores(self, history: Ragged) -> torch.Tensor:
        """[users, items] float32 for the histories of some users, oldest item first."""
        ...


class Popularity:
    """Scores an item by how often it was interacted with in training, the same for every user.

    Example: `baseline = Popularity(items=12101); baseline.add(lists); baseline.scores(history)`.
    """

    def __init__(self, items: int) -> None:
        self.counts = np.zeros(items, np.int64)
        """[items] int64 training interactions."""

    def add(self, lists: Ragged) -> None:
        """Count the items of some users."""
        self.counts += np.bincount(lists.values, minlength=len(self.counts))

    def scores(self, history: Ragged) -> torch.Tensor:
        """[users, items] float32: one row, expanded to all users without a copy."""
        return torch.from_numpy(self.counts.astype(np.float32)).expand(history.rows, -1)


class Cooccurrence:
    """Item-item co-occurrence: scores what followed the items of a history; the newest count most.

        score(history, j) = sum over i in the history of 0.7^age(i) score(i -> j)

    `data.neighbours.pairs` says what score(i -> j) is, and how its constants were chosen. Age counts items from the
    newest, 0; an item of age `MEMORY` or more does not count. An item that co-occurs with none of the history scores 0.

    On test, masked, HR@5/NDCG@5/HR@10/NDCG@10: Beauty .0651/.0475/.0867/.0544, Toys .0802/.0598/.1036/.0674.

    Example: `baseline = Cooccurrence(items=12101); baseline.add(lists); baseline.scores(history)`.
    """

    WINDOW = WINDOW
    MEMORY = 50

    def __init__(self, items: int) -> None:
        self.items = items
        self.counts = np.zeros(items, np.int64)
        self._forward: list[sp.csr_array] = []  # their sum counts forward pairs; sizes decrease along the list
        self._weights: sp.csr_array | None = None

    def add(self, lists: Ragged) -> None:
        """Count the pairs of some users."""
        self._weights = None
        self.counts += np.bincount(lists.values, minlength=self.items)
        rows, columns, weights = [], [], []
        for distance, earlier, later in forward_pairs(lists, self.WINDOW):
            rows.append(earlier)
            columns.append(later)
            weights.append(np.full(earlier.size, distance**-DISTANCE_POWER))
        if not rows:
            return
        self._forward.append(self._matrix(np.concatenate(weights), np.concatenate(rows), np.concatenate(columns)))
        # Adding each batch to one matrix would copy it each time; merging similar sizes copies it a logarithmic number.
        while len(self._forward) > 1 and self._forward[-2].nnz <= 2 * self._forward[-1].nnz:
            self._forward[-2:] = [self._forward[-2] + self._forward[-1]]

    @property
    def weights(self) -> sp.csr_array:
        """[items, items] float64 sparse: what an item of the history (row) adds to the score of each item (column)."""
        if self._weights is None:
            forward = reduce(add, self._forward) if self._forward else sp.csr_array((self.items, self.items))
            self._forward = [forward]
            backward = forward.T.tocsr()
            backward.data *= BACKWARD
            weights = forward + backward
            del backward
            counts = np.maximum(self.counts, 1.0)
            of_row, of_column = counts**-SOURCE_POWER, counts**-ITEM_POWER
            # In blocks of rows and in place: there are many more pairs than items.
            for first in range(0, self.items, ROWS):
                last = min(first + ROWS, self.items)
                places = slice(weights.indptr[first], weights.indptr[last])
                rows = np.repeat(np.arange(first, last), np.diff(weights.indptr[first : last + 1]))
                columns = weights.indices[places]
                scale = of_row[rows] * of_column[columns]
                scale[rows == columns] = 0  # an item does not predict itself
                weights.data[places] *= scale
            self._weights = weights
        return self._weights

    def scores(self, history: Ragged) -> torch.Tensor:
        """[users, items] float32."""
        lengths = np.diff(history.offsets)
        user = np.repeat(np.arange(history.rows), lengths)
        age = np.repeat(history.offsets[1:], lengths) - 1 - np.arange(len(history.values))
        counted = age < self.MEMORY
        recency = sp.csr_array(
            (RECENCY ** age[counted], (user[counted], history.values[counted])),
            shape=(history.rows, self.items),
        )
        # Summed in float64, then rounded, so that scores that differ only by the order of summation are ties.
        return torch.from_numpy((recency @ self.weights).astype(np.float32).toarray())

    def _matrix(
        self, weights: npt.NDArray[np.floating], rows: npt.NDArray[np.integer], columns: npt.NDArray[np.integer]
    ) -> sp.csr_array:
        if self.items < 2**31:  # scipy keeps the type of the places
            rows, columns = rows.astype(np.int32), columns.astype(np.int32)
        matrix = sp.coo_array((weights, (rows, columns)), shape=(self.items, self.items))
        return matrix.tocsr()  # sums repeated pairs


NAMES: dict[str, Callable[[int], Baseline]] = {"popularity": Popularity, "cooccurrence": Cooccurrence}
"""What makes a baseline for a number of items, by its name."""


def estimate_bytes(manifest: Manifest) -> dict[str, tuple[int, str]]:
    """About how many bytes each baseline needs per rank, and what of, by name.

    An interaction has a pair with each later one of the same user within the window.
    """
    items, interactions = manifest.items, manifest.interactions
    longest = int(manifest.preparation.get("lengths", {}).get("max", WHOLE))
    window = max(0, min(Cooccurrence.WINDOW, longest - 1))
    pairs = min(interactions * window, items**2)
    return {
        "popularity": (ITEM_BYTES["popularity"] * items, f"{items:,} items"),
        "cooccurrence": (
            ITEM_BYTES["cooccurrence"] * items + PAIR_BYTES * pairs,
            f"{items:,} items, {interactions:,} interactions with up to {window} pairs each",
        ),
    }


def choose_baselines(manifest: Manifest) -> list[str]:
    """Names of the baselines that fit into memory; a line is logged for each that does not (collective)."""
    free: list[int] = gather_objects(available_bytes(torch.device("cpu")))
    left = int(LEFT_SHARE * min(free))
    chosen = []
    for name, (needed, why) in estimate_bytes(manifest).items():
        if needed <= min(LIMIT, left):
            chosen.append(name)
            left -= needed
            continue
        limit = (
            f"the limit is {LIMIT / 2**30:,.1f} GiB" if needed > LIMIT else f"a rank can spare {left / 2**30:,.1f} GiB"
        )
        log_message(f"Baseline {name} is left out: it may need {needed / 2**30:,.1f} GiB ({why}), and {limit}")
    return chosen


def fit_baselines(dataset: Dataset, names: Sequence[str] = tuple(NAMES)) -> dict[str, Baseline]:
    """Fit baselines on the training items of a dataset, in one pass over its row groups.

    Popularity alone is read from the counts in `items/`, which are the same.
    """
    count = dataset.manifest.items
    if list(names) == ["popularity"]:
        popularity = Popularity(count)
        popularity.counts = read_counts(dataset, 0, count)
        return {"popularity": popularity}
    baselines = {name: NAMES[name](count) for name in names}
    reader = HistoryReader(dataset=dataset, split="training", max_len=WHOLE)
    for group in row_groups(dataset) if baselines else ():
        histories = reader.read([group])
        for baseline in baselines.values():
            baseline.add(Ragged(histories.items, histories.offsets))
    return baselines


def evaluate_baselines(
    dataset: Dataset,
    split: SplitName,
    *,
    ks: Sequence[int] = (5, 10),
    rank: int = 0,
    world_size: int = 1,
    names: Sequence[str] = tuple(NAMES),
    sample: UserSample | None = None,
    grouped: Mapping[str, GroupedMetrics] | None = None,
    inputs: Inputs = IDS_ALONE,
    request: Request = ANY,
    recorder: UserRecorder | None = None,
    lists: ListSample | None = None,
) -> dict[str, dict[str, RankingMetrics]]:
    """Rank the held-out items of a split by each baseline, masked and unmasked (collective with `grouped`).

    Args:
        dataset: its training part is fitted, its `split` evaluated.
        split: `validation` or `test`.
        ks: list lengths.
        rank: this process reads every `world_size`-th row group; sum the metrics' states over processes afterwards.
        world_size: number of processes.
        names: of the baselines.
        sample: users to rank for; None: all.
        grouped: where the ranks are also added by groups of users, by name of the baseline.
        inputs: of the model beside them: users of whom it reads no history are left out.
        request: which users are ranked. Baselines count events of all types.
        recorder: takes the ranks of every user by path.
        lists: a settled sample; takes the lists of its users.

    Returns:
        {"popularity": {"masked": metrics, "unmasked": metrics}, "cooccurrence": ...}.
    """
    baselines = fit_baselines(dataset, names)
    results = {name: {how: RankingMetrics(ks) for how in PROTOCOLS} for name in baselines}
    find_groups = next(iter(grouped.values())).grouping.gather() if grouped else None
    users_at_once = max(1, SCORE_BYTES // (4 * dataset.manifest.items))
    inputs = Inputs(events=inputs.events, history_events=inputs.history_events)
    reader = HistoryReader(dataset=dataset, split=split, max_len=WHOLE, sample=sample, inputs=inputs, request=request)
    groups = row_groups(dataset) if sample is None else sample.groups
    for group in groups[rank::world_size] if baselines else ():
        whole = reader.read([group])
        assert whole.held_out is not None and whole.seen is not None, split
        for first in range(0, len(whole.held_out), users_at_once):
            last = min(first + users_at_once, len(whole.held_out))
            history, held_out = whole.seen.part(first, last), whole.held_out[first:last]
            users = whole.users[first:last]
            for name, baseline in baselines.items():
                scores = baseline.scores(history)
                both = both_ranks(scores, torch.from_numpy(held_out), history)
                if recorder is not None:
                    recorder.add_ranks(name, users, dict(zip(PROTOCOLS, both, strict=True)))
                if lists is not None and (chosen := lists.find_chosen(users)).size:
                    best = best_unseen(scores[torch.from_numpy(chosen)], history.take(chosen), max(ks))
                    lists.add_chosen(name, users[chosen], best)
                for how, ranks in zip(PROTOCOLS, both, strict=True):
                    results[name][how].update(ranks)
                    if grouped and find_groups is not None:
                        grouped[name].update(find_groups(held_out, history.lengths), how, ranks)
    return results
