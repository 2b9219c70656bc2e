"""The catalogue on several ranks: equal to a dense plain computation, held or streamed, with any pattern of calls."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recgpt_torchrec.catalogue import best, counting, odds
from recgpt_torchrec.catalogue import catalogue as catalogue_module
from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.catalogue.vectors import HeldVectors, StreamedVectors
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Ragged
from tools.ranks import run_ranks

CASES = 16
"""Random cases of each test, in one process group."""


class Case:
    """Vectors of small whole numbers, and each rank's queries: none for some ranks."""

    def __init__(self, seed: int, world_size: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.world_size, self.items = world_size, int(rng.choice([1, 2, 3, 5, 17, 60, 200]))
        dim = int(rng.integers(1, 4))
        self.vectors = rng.integers(-1, 2, (self.items, dim)).astype(np.float32)
        self.k = int(rng.choice([1, 2, 10, 11, 40, 300]))
        self.rows = [int(rng.choice([0, 1, 4, 13])) for _ in range(world_size)]
        self.queries = [rng.integers(-1, 2, (rows, dim)).astype(np.float32) for rows in self.rows]
        self.seen = [[self.draw_items(2 * self.items) for _ in range(rows)] for rows in self.rows]
        width = int(rng.integers(0, 4))
        self.forbidden = [rng.integers(0, self.items, (rows, width)) for rows in self.rows]
        self.targets = [rng.integers(0, self.items, rows) for rows in self.rows]
        self.bias = float(rng.choice([-30, -2, -1, 0, 1, 2, 30]))
        self.masks = bool(rng.integers(2)), bool(rng.integers(2))
        self.limits = {
            "held": int(rng.choice([1, 30, 2000])),
            "rows": int(rng.choice([1, 3, 256])),
            "bytes": int(rng.choice([1, 400, 2000, 2**26])),
            "block": max(int(rng.choice([1, 7, 100])), self.items // 8),
        }
        self.raised = [
            [rng.permutation(self.items)[: rng.integers(0, 6)].tolist() for _ in range(n)] for n in self.rows
        ]
        self.values = [rng.integers(-30, 31, sum(map(len, raised))).astype(np.float32) for raised in self.raised]

    def draw_items(self, most: int) -> list[int]:
        return self.rng.integers(0, self.items, self.rng.integers(0, most + 1)).tolist()

    def catalogues(self, rank: int) -> list[Catalogue]:
        """The same vectors, held and looked up anew."""
        first, stop = id_range(self.items, rank, self.world_size)
        vectors = torch.from_numpy(self.vectors)
        ranges = [id_range(self.items, each, self.world_size) for each in range(self.world_size)]

        def look_up(ids: np.ndarray, room: int) -> torch.Tensor:
            rooms = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            dist.all_gather(rooms, torch.tensor([room]))  # every rank is here, and with the same room
            assert len(set(torch.cat(rooms).tolist())) == 1 and len(ids) <= room
            return vectors[torch.from_numpy(ids)]

        held = Catalogue.of_vectors(vectors[first:stop].clone(), self.items, first)
        source = StreamedVectors(look_up, ranges, rank, self.limits["block"], vectors.device)
        return [held, Catalogue(source, self.items, vectors.shape[1])]

    def patches(self) -> Any:
        """Limits so small that all is cut into several tiles and passes."""
        limits = self.limits
        stack = mock.patch.multiple(best, SCORES={"cpu": limits["held"]}, ROWS=limits["rows"])
        counts = mock.patch.multiple(counting, SCORES={"cpu": limits["held"]}, NARROWEST={"cpu": 1})
        passes = mock.patch.object(catalogue_module, "PASS_BYTES", limits["bytes"])
        return stack, counts, passes

    def seen_of(self, rank: int) -> Ragged:
        return Ragged.from_lists(self.seen[rank])

    def top_k(self, catalogue: Catalogue, rank: int) -> tuple[list[Any], list[Any]]:
        found = catalogue.top_k(
            torch.from_numpy(self.queries[rank]),
            self.k,
            self.seen_of(rank) if self.masks[0] else None,
            torch.from_numpy(self.forbidden[rank]) if self.masks[1] else None,
            weighed=None if self.masks[0] else self.seen_of(rank),
            bias=self.bias,
        )
        assert found.items.shape == found.scores.shape == (self.rows[rank], self.k)
        return found.items.tolist(), found.scores.tolist()

    def plain_top_k(self, rank: int) -> tuple[list[Any], list[Any]]:
        items, values = [], []
        for row, query in enumerate(self.queries[rank]):
            out = set(self.seen[rank][row]) if self.masks[0] else set()
            out |= set(self.forbidden[rank][row].tolist()) if self.masks[1] else set()
            scores = self.vectors @ query
            if not self.masks[0]:
                scores[list(set(self.seen[rank][row]))] += self.bias
            order = sorted((-scores[item], item) for item in range(self.items) if item not in out)[: self.k]
            short = self.k - len(order)
            items.append([item for _, item in order] + [-1] * short)
            values.append([-float(score) for score, _ in order] + [-np.inf] * short)
        return items, values

    def top_k_raised(self, catalogue: Catalogue, rank: int) -> tuple[list[Any], list[Any]]:
        """Each of some items with a value of its own; some of them are left out."""
        found = catalogue.top_k(
            torch.from_numpy(self.queries[rank]),
            self.k,
            forbidden=torch.from_numpy(self.forbidden[rank]),
            weighed=Ragged.from_lists(self.raised[rank]),
            bias=self.values[rank],
        )
        return found.items.tolist(), found.scores.tolist()

    def plain_top_k_raised(self, rank: int) -> tuple[list[Any], list[Any]]:
        items, best, values = [], [], iter(self.values[rank].tolist())
        for row, query in enumerate(self.queries[rank]):
            scores = self.vectors @ query
            for item in self.raised[rank][row]:
                scores[item] += next(values)
            out = self.forbidden[rank][row].tolist()
            order = sorted((-scores[item], item) for item in range(self.items) if item not in out)[: self.k]
            short = self.k - len(order)
            items.append([item for _, item in order] + [-1] * short)
            best.append([-float(score) for score, _ in order] + [-np.inf] * short)
        return items, best

    def ranks(self, catalogue: Catalogue, rank: int) -> list[list[float]]:
        targets = torch.from_numpy(self.targets[rank])
        return [
            ranks.tolist()
            for ranks in catalogue.ranks(torch.from_numpy(self.queries[rank]), targets, self.seen_of(rank), self.bias)
        ]

    def plain_ranks(self, rank: int) -> list[list[float]]:
        both: list[list[float]] = [[], []]
        for query, target, seen in zip(self.queries[rank], self.targets[rank], self.seen[rank], strict=True):
            raw = self.vectors @ query
            biased = raw.copy()
            biased[list(set(seen))] += self.bias
            for ranks, hidden, scores in zip(both, (set(seen), set()), (raw, biased), strict=True):
                others = [item for item in range(self.items) if item not in hidden and item != target]
                higher = sum(scores[item] > scores[target] for item in others)
                equal = sum(scores[item] == scores[target] for item in others)
                ranks.append(np.inf if target in hidden else float(higher + equal / 2))
        return both

    def log_odds(self, catalogue: Catalogue, rank: int) -> list[float]:
        width = max(1, self.items // 3)
        with mock.patch.multiple(odds, SCORES={"cpu": 4 * width}, WIDTH=width):
            found = catalogue.log_odds(torch.from_numpy(self.queries[rank]), self.seen_of(rank))
        assert found.dtype == torch.float64
        return found.tolist()

    def plain_log_odds(self, rank: int) -> Any:
        found = []
        for query, seen in zip(self.queries[rank], self.seen[rank], strict=True):
            masses = np.exp((self.vectors @ query).astype(np.float64))
            is_seen = np.isin(np.arange(self.items), seen)
            with np.errstate(divide="ignore"):
                found.append(np.log(masses[is_seen].sum()) - np.log(masses[~is_seen].sum()))
        return pytest.approx(found, abs=1e-4)

    def vectors_of(self, catalogue: Catalogue, rank: int) -> list[Any]:
        return catalogue.vectors_of(torch.from_numpy(self.forbidden[rank])).tolist()

    def plain_vectors_of(self, rank: int) -> list[Any]:
        return self.vectors[self.forbidden[rank]].tolist()


OPERATIONS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (Case.top_k, Case.plain_top_k),
    (Case.top_k_raised, Case.plain_top_k_raised),
    (Case.ranks, Case.plain_ranks),
    (Case.log_odds, Case.plain_log_odds),
    (Case.vectors_of, Case.plain_vectors_of),
]


def compare_with_plain(rank: int, world_size: int, seeds: range) -> int:
    compared = 0
    for seed in seeds:
        case = Case(seed, world_size)
        with case.patches()[0], case.patches()[1], case.patches()[2]:
            for catalogue in case.catalogues(rank):
                for ours, plain in OPERATIONS:
                    assert ours(case, catalogue, rank) == plain(case, rank), (seed, ours.__name__, catalogue.vectors)
                    compared += 1
    return compared


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_gets_the_plain_answer_held_and_streamed(world_size):
    assert run_ranks(compare_with_plain, world_size, range(CASES)) == [2 * len(OPERATIONS) * CASES] * world_size


def ask_as_often_as_one_likes(rank: int, world_size: int, seeds: range) -> int:
    """Each rank asks for different operations, a different number of times."""
    compared = 0
    for seed in seeds:
        case, own = Case(seed, world_size), np.random.default_rng((seed, rank))
        for catalogue in case.catalogues(rank):
            with case.patches()[0], case.patches()[1], case.patches()[2]:
                for number in own.integers(0, len(OPERATIONS), own.integers(0, 6)).tolist():
                    ours, plain = OPERATIONS[number]
                    assert ours(case, catalogue, rank) == plain(case, rank), (seed, ours.__name__)
                    compared += 1
                catalogue.finish()
                catalogue.finish()  # nobody else is left, so this must not wait
    return compared


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_may_ask_for_different_things_different_numbers_of_times(world_size):
    compared = run_ranks(ask_as_often_as_one_likes, world_size, range(CASES // 2))
    assert min(compared) > CASES and len(set(compared)) > 1  # or the test proves nothing


def ask_with_a_nan(rank: int, world_size: int) -> tuple[bool, str]:
    vectors = torch.eye(4)
    vectors[3, 0] = torch.nan  # an item of the last rank
    first, stop = id_range(4, rank, world_size)
    catalogue = Catalogue.of_vectors(vectors[first:stop], 4, first)
    try:
        rows = 2 if rank == 0 else 0
        with mock.patch.object(counting, "SCORES", {"cpu": 1}):  # the first row's block fails, the second is not begun
            catalogue.ranks(torch.ones(rows, 4), torch.zeros(rows, dtype=torch.int64), Ragged.from_lists([[]] * rows))
    except ValueError as error:
        return catalogue.is_finite(), str(error)
    return catalogue.is_finite(), "no error"


def test_a_nan_of_one_ranks_items_is_an_error_on_all():
    for finite, message in run_ranks(ask_with_a_nan, 2):
        assert not finite and "NaN" in message and "has diverged" in message


def serve_a_model(rank: int, world_size: int) -> list[str]:
    """Vectors of a sharded model, held and streamed, are the rows of its table."""
    from recgpt_torchrec.config import Loss, Model, Pretrain, Tables
    from recgpt_torchrec.data.bags import tables_of
    from recgpt_torchrec.data.dataset import Dataset, Manifest
    from recgpt_torchrec.data.packed import Capacity
    from recgpt_torchrec.model.tabled.base import unwrapped
    from recgpt_torchrec.training.building import build

    items, device, sources = 23, torch.device("cpu"), []
    for sharding in ("row_wise", "data_parallel", "table_wise"):
        config = Pretrain(
            data="", output="", model=Model(dim=8, heads=2), loss=Loss(), tables=Tables(sharding=sharding)
        )
        dataset = Dataset(path="", manifest=Manifest(users=9, items=items))
        model, _ = build(config, config.model, dataset, capacity=Capacity(9, items, item_keys=3), device=device)
        weight: Any = next(value for name, value in tables_of(model).items() if "item" in name)
        table = torch.empty(items, 8)
        if isinstance(weight, ShardedTensor):
            weight.gather(0, table if rank == 0 else None)
            dist.broadcast(table, 0)
        else:
            table = weight.detach()
        queries = torch.randn(5, 8, generator=torch.Generator().manual_seed(rank))
        for left in (2**30, 40):
            with (
                mock.patch.object(catalogue_module, "available_bytes", lambda device, left=left: left),
                mock.patch.object(catalogue_module, "BLOCK_BYTES", 4 * 8 * 5),
            ):
                catalogue = Catalogue.of_model(unwrapped(model), items, device)
            sources.append(type(catalogue.vectors).__name__)
            assert (catalogue.rows_per_pass is None) == isinstance(catalogue.vectors, HeldVectors)
            assert torch.equal(catalogue.vectors_of(torch.arange(items)), table) and catalogue.is_finite()
            own = [(ids, vectors) for ids, vectors in catalogue.share()]
            ids = np.concatenate([ids for ids, _ in own])
            assert ids.tolist() == list(range(*id_range(items, rank, world_size)))
            assert np.array_equal(np.concatenate([vectors for _, vectors in own]), table[ids].numpy())
            found = catalogue.top_k(queries, 4)
            expected = (queries @ table.t()).topk(4, dim=1)
            assert torch.equal(found.items, expected.indices)
            torch.testing.assert_close(found.scores, expected.values)
    return sources


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_vectors_of_a_sharded_model_are_its_tables_rows(world_size):
    for sources in run_ranks(serve_a_model, world_size):
        assert sources == ["HeldVectors", "StreamedVectors"] * 3
