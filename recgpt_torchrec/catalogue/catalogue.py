"""The catalogue: vectors of all items by id range, exact top-k, and ranks. The only place that scores all items.

Rank r of W holds, or makes anew for each pass, the vectors of the items `id_range(items, r, W)`. Queries travel to all
ranks; each scores its own range and masks the items of a history that lie in it; its k best items, or counts of better
and equal scores, return to the rank that asked, and merge. So no rank holds all vectors unless it is alone, and then
nothing is exchanged.

Operations are rounds (see `rounds`): ranks may ask different numbers of times, if all of them `finish` at the end.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recgpt_torchrec.catalogue.best import Best, BestFinder, merge_best
from recgpt_torchrec.catalogue.counting import CountFinder
from recgpt_torchrec.catalogue.exchange import gather_rows, return_rows, send, sort_by_rank
from recgpt_torchrec.catalogue.odds import OddsFinder
from recgpt_torchrec.catalogue.pairs import Pairs, pairs_of
from recgpt_torchrec.catalogue.ranks import COUNTS, check_ids, in_history, ranks_of
from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.catalogue.vectors import BLOCK_BYTES, HeldVectors, StreamedVectors
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.distributed.memory import available_bytes
from recgpt_torchrec.distributed.processes import log_message, rank, world_size

if TYPE_CHECKING:  # scoring needs no torchrec
    from recgpt_torchrec.model.tabled.base import TabledModel

HELD_SHARE = 0.5
"""Vectors are held where they take at most this share of the memory that is left."""
PASS_BYTES = 2**26
"""Bytes of the queries of all ranks, and of the answers to them, that one pass over the vectors serves."""


class _Question(NamedTuple):
    """Queries of one rank."""

    queries: Tensor
    """[rows, dim] float32."""
    pairs: Pairs
    """Items that do not compete."""
    weighed: Pairs
    """Items to whose scores values are added, each once."""
    biases: Tensor
    """[rows, 2] float32: what is added to the scores of the history, and what of it the target gets."""
    targets: Tensor | None = None
    """[rows] int64 items whose ranks are asked for."""


class Catalogue:
    """Vectors of all items by id range, with exact top-k and ranks (all methods are collective).

    Example: `Catalogue.of_model(unwrapped(model), items, device).top_k(queries, 50, seen)`
    """

    def __init__(
        self, vectors: HeldVectors | StreamedVectors, items: int, dim: int, rounds: Rounds | None = None
    ) -> None:
        """
        Args:
            vectors: of this rank's id range, `id_range(items, rank(), world_size())`.
            items: number of all items.
            dim: length of a vector.
            rounds: that its operations are added to; None: rounds of its own.
        """
        assert (vectors.first, vectors.stop) == id_range(items, rank(), world_size()), "vectors of another id range"
        self.vectors, self.items, self.dim = vectors, items, dim
        self.rounds = Rounds() if rounds is None else rounds
        """Rounds of this catalogue; other operations may be added to them."""
        self._ask_best = self.rounds.add(self._serve_best)
        self._ask_counts = self.rounds.add(self._serve_counts)
        self._ask_vectors = self.rounds.add(self._serve_vectors)
        self._ask_odds = self.rounds.add(self._serve_odds)

    @classmethod
    @torch.no_grad()
    def of_model(cls, model: "TabledModel", items: int, device: torch.device) -> "Catalogue":
        """The vectors of all `items` ids that score outputs, from a sharded model (collective).

        They are held where they fit into the memory that is left, and otherwise looked up anew for each pass.
        """
        from recgpt_torchrec.model.tabled.base import unwrapped_dense

        dim = unwrapped_dense(model).decoder.config.dim
        id_ranges = [id_range(items, each, world_size()) for each in range(world_size())]

        def look_up(ids: Int64, room: int) -> Tensor:
            return model.look_up(device, items=ids, room=(0, room)).outputs

        streamed = StreamedVectors(look_up, id_ranges, rank(), max(1, BLOCK_BYTES // (4 * dim)), device)
        needed, left = 4 * dim * (streamed.stop - streamed.first), available_bytes(device)
        if _all_ranks(needed <= HELD_SHARE * left):
            return cls(HeldVectors.read(streamed, dim), items, dim)
        log_message(
            f"Catalogue: the vectors of {items:,} items take {needed:,} bytes per rank, more than half of what some "
            f"rank has left ({left:,} bytes on rank 0): each pass over them looks them up anew"
        )
        return cls(streamed, items, dim)

    @classmethod
    def of_vectors(cls, vectors: Tensor, items: int | None = None, first: int = 0) -> "Catalogue":
        """A catalogue of given vectors.

        Args:
            vectors: [own items, dim] float32 of this rank's id range.
            items: number of all items; None: as many as there are vectors.
            first: id of the first vector.
        """
        return cls(HeldVectors(vectors, first), len(vectors) if items is None else items, vectors.shape[1])

    def __len__(self) -> int:
        return self.items

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.vectors.device

    @property
    def rows_per_pass(self) -> int | None:
        """Number of queries per rank that one pass looks all vectors up for; None: vectors are held."""
        return None if isinstance(self.vectors, HeldVectors) else self._rows_at_once(k=1)

    def finish(self) -> None:
        """Take part in the other ranks' operations until they have finished as well; a second call does nothing."""
        self.rounds.finish()

    def is_finite(self) -> bool:
        """Whether no vector has a NaN or infinity; every rank asks at the same time."""
        finite = True
        for _, block in self._small_blocks():
            finite &= bool(torch.isfinite(block).all())
        return _all_ranks(finite)

    def share(self) -> Iterator[tuple[Int64, Float32]]:
        """Yield ids [n] int64 and vectors [n, dim] float32 of this rank's id range, in order, in blocks of some MB.

        Where they are looked up, all ranks have to read all of theirs at the same time.
        """
        for first, block in self._small_blocks():
            yield np.arange(first, first + len(block)), block.cpu().numpy()

    def vectors_of(self, items: Tensor) -> Tensor:
        """[..., dim] float32 vectors of `items` [...] int64, of any rank's range."""
        if isinstance(self.vectors, HeldVectors) and world_size() == 1:
            return self.vectors.vectors[items]
        vectors: Tensor = self._ask_vectors(items.reshape(-1), items.numel())
        return vectors.view(*items.shape, self.dim)

    def top_k(
        self,
        queries: Tensor,
        k: int,
        seen: Ragged | None = None,
        forbidden: Tensor | None = None,
        weighed: Ragged | None = None,
        bias: float | Float32 = 0.0,
    ) -> Best:
        """The `k` items with the largest inner product with each query, exactly.

        Args:
            queries: [rows, dim] float32, of this rank.
            k: items per query.
            seen: items to leave out, by row.
            forbidden: [rows, any] int64 further items to leave out, by row.
            weighed: items to whose scores `bias` is added, by row.
            bias: see `weighed`: the same for all, or one for each of its values, which then are distinct in each row.
        """
        pairs, raised = pairs_of(seen, forbidden), pairs_of(weighed)
        raised = raised.with_values(bias) if isinstance(bias, np.ndarray) else raised.distinct().with_values(bias)
        question = _Question(queries, pairs, raised, _biases(queries, 0.0))
        best: Best = self._ask_best(question, len(queries), k, pairs.rows.size, raised.rows.size)
        return best

    def ranks(self, queries: Tensor, targets: Tensor, seen: Ragged, bias: float = 0.0) -> tuple[Tensor, Tensor]:
        """The masked and the unmasked rank of each row's target among all items (see `catalogue.ranks`).

        Args:
            queries: [rows, dim] float32, of this rank.
            targets: [rows] int64 item ids.
            seen: items of each row's history.
            bias: added to their scores when unmasked.

        Returns:
            [rows] float32 each; inf where the target is in the history (masked).

        Raises:
            ValueError: a score of any rank is NaN, on every rank.
        """
        check_ids(targets, self.items, "targets")
        biases = _biases(queries, bias, in_history(targets.cpu(), seen))
        question = _Question(queries, pairs_of(seen), pairs_of(None), biases, targets.to(queries.device))
        return ranks_of(self._ask_counts(question, len(queries), 0, question.pairs.rows.size))

    def log_odds(self, queries: Tensor, seen: Ragged) -> Tensor:
        """[rows] float64 log of the odds that the next item is one of those `seen`, by the softmax over all items.

        -inf where nothing is seen, inf where all items are.

        Args:
            queries: [rows, dim] float32, of this rank.
            seen: items of each row's history.
        """
        question = _Question(queries, pairs_of(seen).distinct(), pairs_of(None), _biases(queries, 0.0))
        of_seen, of_others = self._ask_odds(question, len(queries))
        odds: Tensor = of_seen - of_others
        return odds

    # ------------------------------------------------------------------------------------------- what rounds serve

    def _serve_best(self, sizes: Int64, question: _Question | None) -> Best:
        question = question or self._no_question()
        rows, k = sizes[:, 0], int(sizes[:, 1].max())
        own_k = int(sizes[rank(), 1])
        answers = []
        for part, counts in self._parts(question, rows, k):
            queries = gather_rows(part.queries, counts)
            pairs = self._send_pairs(part.pairs, counts) if sizes[:, 2].any() else None
            weighed = self._send_pairs(part.weighed, counts) if sizes[:, 3].any() else None
            finder = BestFinder(queries, k, pairs, self.vectors.stop - self.vectors.first, weighed)
            for first, block in self.vectors.blocks():
                finder.update(block, first)
            items, scores = (return_rows(values, counts)[..., :own_k] for values in finder.best)
            if world_size() == 1:
                answers.append(Best(items[0], scores[0]))
            else:
                # By row, in order of rank: of equal scores the smaller id comes first.
                items, scores = (values.transpose(0, 1).flatten(1) for values in (items, scores))
                answers.append(merge_best(items, scores, own_k))
        if not answers:
            none = question.queries
            return Best(none.new_zeros((0, own_k), dtype=torch.int64), none.new_zeros((0, own_k)))
        return Best(*(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*answers, strict=True)))

    def _serve_counts(self, sizes: Int64, question: _Question | None) -> Tensor:
        question = question or self._no_question()
        answers = [torch.zeros(COUNTS, 0, dtype=torch.int64, device=self.device)]
        for part, counts in self._parts(question, sizes[:, 0], k=0):
            assert part.targets is not None
            target_vectors = gather_rows(self._vectors_of(part.targets, counts), counts)
            queries, targets = gather_rows(part.queries, counts), gather_rows(part.targets, counts)
            pairs = self._send_pairs(part.pairs, counts)
            found = self._count(queries, targets, target_vectors, pairs, gather_rows(part.biases, counts))
            first = int(counts[: rank()].sum())
            answers.append(found[:, first : first + int(counts[rank()])])
        return torch.cat(answers, dim=1)

    def _count(
        self, queries: Tensor, targets: Tensor, target_vectors: Tensor, history: Pairs, biases: Tensor
    ) -> Tensor:
        """[8, rows] int64 counts over the items of all ranks, for the same queries on every rank."""
        failure = None
        counts = torch.zeros(COUNTS, len(targets) + 1, dtype=torch.int64, device=self.device)
        finder = CountFinder(queries, targets, target_vectors, history, self.vectors.stop - self.vectors.first, biases)
        for first, block in self.vectors.blocks():  # to the end, even after a failure: it may be collective
            try:
                if failure is None:
                    finder.update(block, first)
            except ValueError as error:
                failure = error
        if failure is None:
            counts[:, :-1] = finder.counts
        counts[0, -1] = failure is not None
        if world_size() > 1:
            dist.all_reduce(counts)
        if failure is not None:
            raise failure
        if counts[0, -1]:
            raise ValueError("scores of another rank's items are NaN; the model has diverged")
        return counts[:, :-1]

    def _serve_odds(self, sizes: Int64, question: _Question | None) -> Tensor:
        """[2, rows] float64, see `OddsFinder.log_sums`, over the items of all ranks."""
        question = question or self._no_question()
        answers = [torch.zeros(2, 0, dtype=torch.float64, device=self.device)]
        for part, counts in self._parts(question, sizes[:, 0], k=0):
            queries, pairs = gather_rows(part.queries, counts), self._send_pairs(part.pairs, counts)
            finder = OddsFinder(queries, pairs, self.vectors.stop - self.vectors.first)
            for first, block in self.vectors.blocks():
                finder.update(block, first)
            answers.append(return_rows(finder.log_sums.t().contiguous(), counts).logsumexp(0).t())
        return torch.cat(answers, dim=1)

    def _serve_vectors(self, sizes: Int64, items: Tensor | None) -> Tensor:
        if items is None:
            items = torch.zeros(0, dtype=torch.int64, device=self.device)
        return self._vectors_of(items, sizes[:, 0])

    def _vectors_of(self, items: Tensor, counts: Int64) -> Tensor:
        """[n, dim] vectors of `items` [n] int64 of any rank's range; `counts` [ranks] says how many each rank asks."""
        vectors = self.vectors
        if isinstance(vectors, StreamedVectors):
            parts = list(vectors.of(items.cpu().numpy(), int(counts.max())))
            return torch.cat(parts) if parts else torch.zeros(0, self.dim, device=self.device)
        if world_size() == 1:
            return vectors.vectors[items.to(self.device)]
        ids = items.cpu().numpy()
        order, to_each = sort_by_rank(self._owners_of(ids))
        asked, from_each = send(torch.from_numpy(ids[order]), to_each)
        answers = vectors.vectors[(asked - vectors.first).to(self.device)]
        received = answers.new_empty(len(ids), self.dim)
        dist.all_to_all_single(received, answers, to_each.tolist(), from_each.tolist())
        result = torch.empty_like(received)
        result[torch.from_numpy(order).to(self.device)] = received
        return result

    # ------------------------------------------------------------------------------------------- helpers

    def _no_question(self) -> _Question:
        no_items = torch.zeros(0, dtype=torch.int64, device=self.device)
        queries = torch.zeros(0, self.dim, device=self.device)
        weighed = pairs_of(None).with_values(0.0)
        return _Question(queries, pairs_of(None), weighed, _biases(queries, 0.0), no_items)

    def _rows_at_once(self, k: int) -> int:
        """Number of queries of each rank that one pass serves; an answer of k items is there about twice."""
        return max(1, PASS_BYTES // (world_size() * (4 * self.dim + 24 * k)))

    def _parts(self, question: _Question, rows: Int64, k: int) -> Iterator[tuple[_Question, Int64]]:
        """Yield the question in parts for one pass each, equally many on every rank, and each rank's rows of a part."""
        at_once = self._rows_at_once(k)
        for start in range(0, int(rows.max()), at_once):
            queries, pairs, weighed, biases, targets = question
            stop = start + at_once
            own = _Question(
                queries[start:stop],
                pairs.part(start, stop),
                weighed.part(start, stop),
                biases[start:stop],
                None if targets is None else targets[start:stop],
            )
            yield own, (rows - start).clip(0, at_once)

    def _send_pairs(self, pairs: Pairs, counts: Int64) -> Pairs:
        """The pairs of all ranks' rows whose items lie in this rank's range; rows count over all ranks."""
        if world_size() == 1:
            return pairs
        own_first = int(counts[: rank()].sum())
        order, to_each = sort_by_rank(self._owners_of(pairs.items))
        columns = [pairs.rows + own_first, pairs.items]
        if pairs.values is not None:
            columns.append(pairs.values.view(np.int32).astype(np.int64))  # their bits
        received, _ = send(torch.from_numpy(np.stack(columns, axis=1)[order]), to_each)
        rows, items, *bits = received.numpy().T.copy()
        return Pairs(rows, items, bits[0].astype(np.int32).view(np.float32) if bits else None)

    def _owners_of(self, items: Int64) -> Int64:
        """The rank whose range each of `items` lies in."""
        starts = np.array([id_range(self.items, each, world_size())[0] for each in range(world_size())])
        return np.searchsorted(starts, items, side="right") - 1

    def _small_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The blocks of this rank's vectors, at most `BLOCK_BYTES` each."""
        rows = max(1, BLOCK_BYTES // (4 * self.dim))
        for first, block in self.vectors.blocks():
            for start in range(0, len(block), rows):
                yield first + start, block[start : start + rows]


def _biases(queries: Tensor, bias: float, is_seen: Tensor | None = None) -> Tensor:
    """[rows, 2] float32, see `_Question.biases`, on the device of `queries`; `is_seen` [rows] bool of the targets."""
    of_target = torch.zeros(len(queries)) if is_seen is None else bias * is_seen.float()
    return torch.stack([torch.full((len(queries),), bias), of_target], dim=1).to(queries.device)


def _all_ranks(value: bool) -> bool:
    """Whether a value is true on every rank (collective)."""
    if world_size() == 1:
        return value
    votes = torch.tensor([int(value)])
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())
