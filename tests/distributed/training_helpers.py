"""Batches and loops of a small model that is trained on given ranks, and the plain loop that it must equal.

The plain loop is independent: one process over two dense matrices, with Adagrad written out.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.state import table_tensors
from recgpt_torchrec.config import Loss, Model, Optimizer, Pretrain, Saving, Tables, Train, Tuning
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.batch import SequenceBatch, make_batch
from recgpt_torchrec.data.candidates import AllItems, Candidates, CandidateSource, InBatch, Place
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.inputs.places import PLACE_VALUES
from recgpt_torchrec.data.inputs.spec import TIMES, Feature, Inputs
from recgpt_torchrec.data.inputs.times import VALUES
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.segments import DISLIKED, EXPOSED, INTERACTED, SEGMENTS
from recgpt_torchrec.data.windows import Cursor, Position, Queue
from recgpt_torchrec.distributed.lockstep import Lockstep
from recgpt_torchrec.distributed.processes import gather_objects
from recgpt_torchrec.distributed.replicas import Replicas
from recgpt_torchrec.distributed.sharding import ranks_per_group
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.training.building import build
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.schedule import Schedule
from recgpt_torchrec.training.trainer import Trainer
from tests.support import SmallAttribute, ids_by_bag, walks
from tools.small_run import opened

USERS, ITEMS, DIM, STEPS = 11, 23, 8, 6
CAPACITY = Capacity(USERS, ITEMS, item_keys=3)
TOKENS = 12
"""Of a global batch, as far as logQ is concerned."""
TABLE_LR, LR, BETA2 = 0.05, 2e-3, 0.98
ATTRIBUTES = [
    SmallAttribute.draw("item", "brand", ITEMS, 6),
    SmallAttribute.draw("user", "groups", USERS, 5, multiple=True),
    SmallAttribute.draw("item", "tags", ITEMS, 7, multiple=True),
    SmallAttribute.draw("user", "country", USERS, 4),
]
WEIGHTS = {"item-brand": 2.0, "user-country": 0.5}
"""By table; the others have 1."""
UNTRAINED = (3, 11, 12)
"""Items that have no vector of their own."""
EVENTS = ["view", "buy"]


@dataclass(frozen=True)
class Case:
    sharding: Any
    optimizer: Any
    candidates: Any
    idle: bool = False
    """Rank 0 has all the data; the other ranks have none."""
    few: bool = False
    """Fewer targets in a step than ranks."""
    weighted: bool = False
    """Targets have weights of 0, 1 or 5 by their item."""
    pooling: Any = None
    """Of several values of an attribute, `mean` or `sum`; None: there are no attributes."""
    timed: bool = False
    """The model reads the times of interactions and requests."""
    refused: bool = False
    """It is tuned on feedback, which enters apart, and reads event types and places."""

    def __str__(self) -> str:
        ways = ["idle" * self.idle, "few" * self.few, "weighted" * self.weighted, self.pooling, "timed" * self.timed]
        words = [self.sharding, self.optimizer, self.candidates, *ways, "refused" * self.refused]
        return "-".join(word for word in words if word)

    @property
    def opened(self) -> dict[str, Any]:
        """What the model reads beside ids, and the values, by the names of `build`."""
        inputs, attributes = Inputs(), None
        if self.pooling is not None:
            weights = [f"{table.replace('-', '.')}={weight}" for table, weight in WEIGHTS.items()]
            inputs, attributes = opened(ATTRIBUTES, UNTRAINED, weights=weights, pooling=self.pooling)
        features = [Feature(name=name, values=VALUES[name]) for name in TIMES] if self.timed else []
        if self.refused:
            features += [Feature(name=name, values=len(EVENTS) + 1) for name in ("event", "asked_event")]
            features.append(Feature(name="place", values=PLACE_VALUES))
            inputs = replace(inputs, events=EVENTS, segments=SEGMENTS, feedback=True)
        return {"inputs": replace(inputs, features=features), "attributes": attributes}

    @property
    def tuning(self) -> Tuning | None:
        """Options of the tuning; None: it is pre-training."""
        return Tuning(predict_from="last", output_table=False) if self.refused else None

    @property
    def config(self) -> Pretrain:
        return Pretrain(
            data="",
            output="",
            seed=7,
            model=Model(dim=DIM, heads=2, layers=1, max_len=8, dropout=0, attention_dropout=0, user_dropout=0),
            loss=Loss(candidates=self.candidates),
            tables=Tables(sharding=self.sharding, optimizer=self.optimizer, lr=TABLE_LR, user_lr=TABLE_LR),
            optimizer=Optimizer(lr=LR, beta2=BETA2, warmup_steps=3, final_lr=0.1),
        )

    def learning_rate_share(self, step: int) -> float:
        """Learning rate as a share of its peak, independent of the package: warm-up over three steps or a tenth of all,
        then cosine down to 0.1."""
        return min(1.0, max((step + 1) / 3, step / STEPS / 0.1)) * (
            0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2
        )


def make_batches(case: Case, rank: int, world_size: int) -> list[SequenceBatch]:
    """Make one rank's part of each global batch, which is the same for every number of ranks."""
    rng = np.random.default_rng(5)
    rank_batches = []
    for step in range(STEPS):
        count, longest = (1, 2) if case.few else (7, 9)
        drawn = walks(count, ITEMS, seed=step, shortest=2 if case.few else 1, longest=longest)
        users = rng.integers(0, USERS, count)
        negatives = Candidates(rng.permutation(ITEMS)[:9], np.log(rng.uniform(0.2, 1, 9)).astype(np.float32))
        owner = np.array([0, 2, 1, 0, 3, 1, 0])[:count] % world_size  # unequal numbers of targets
        if step == 2 or case.idle:
            owner[:] = 0  # and one rank without any, now and then
        mine = [n for n in range(count) if owner[n] == rank]
        if mine:
            histories = Histories(
                users=users[mine],
                items=np.concatenate([drawn[n] for n in mine]),
                offsets=np.concatenate([[0], np.cumsum([len(drawn[n]) for n in mine])]),
            )
            if case.weighted:
                histories = replace(histories, weights=np.array([0, 1, 5], np.float32)[histories.items % 3])
            if case.timed:  # of each history by itself, so that they do not depend on the ranks
                gaps = [np.random.default_rng((step, n)).integers(0, 10**6, len(drawn[n])) for n in mine]
                times = np.concatenate([10**9 + each.cumsum() for each in gaps])
                histories = replace(histories, times=times)
            if case.refused:
                columns = [draw_feedback((step, n), len(drawn[n])) for n in mine]
                joined: Any = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
                histories = replace(histories, **joined)
            rank_batches.append(pack_batch(case, histories, negatives, Place(rank, world_size)))
        elif not case.idle:
            rank_batches.append(
                pack_batch(case, no_histories(case.opened["inputs"]), negatives, Place(rank, world_size))
            )
    return rank_batches


def draw_feedback(seed: tuple[int, int], length: int) -> dict[str, Any]:
    """What was shown, the event types and the places of a history: by itself, so that it does not depend on ranks."""
    rng = np.random.default_rng((*seed, 1))
    segments = rng.choice(np.array([INTERACTED, EXPOSED, DISLIKED], np.int8), length)
    segments[[0, -1]] = INTERACTED
    return {
        "segments": segments,
        "known": (segments == INTERACTED) | (rng.random(length) < 0.7),
        "events": rng.integers(0, len(EVENTS) + 1, length).astype(np.int16),
        "places": rng.integers(0, 20, length).astype(np.int16),
    }


def pack_batch(case: Case, histories: Histories, negatives: Candidates, place: Place) -> SequenceBatch:
    sources: dict[str, CandidateSource] = {
        "all": AllItems(ITEMS, place),
        "in_batch": InBatch(np.arange(ITEMS), TOKENS // place.ranks, place.ranks),
    }
    source, rng = sources.get(case.candidates), np.random.default_rng(0)
    return make_batch(
        histories,
        row_length=8,
        capacity=CAPACITY,
        predict=True,
        predict_from="every" if case.tuning is None else "last",
        draw=lambda targets: negatives if source is None else source.draw(targets, rng),
        **case.opened,
    )


def gather_table(value: Any) -> torch.Tensor:
    """Gather a table from all its shards; where several ranks have the same one, they must be equal; collective."""
    if not isinstance(value, ShardedTensor):
        return value.detach().clone()
    shards = [(each.metadata.shard_offsets, each.tensor.detach().float()) for each in value.local_shards()]
    out = torch.full(value.size(), torch.nan)
    for (row, column), part in (each for of_rank in gather_objects(shards) for each in of_rank):
        place = out[row : row + part.shape[0], column : column + part.shape[1]]
        assert place.isnan().all() or torch.equal(place, part)
        place.copy_(part)
    assert not out.isnan().any()
    return out


@dataclass
class Trained:
    tables_before: dict[str, Any]
    dense_before: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    tables: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)


def train(case: Case, rank: int, world_size: int) -> Trained:
    """Train on the case's batches with the project's own parts, as the trainer puts them together."""
    dataset = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS))
    device = torch.device("cpu")
    config, tuning = case.config, case.tuning
    model, optimizer = build(
        config, config.model, dataset, capacity=CAPACITY, device=device, tuning=tuning, **case.opened
    )

    def tables() -> dict[str, Any]:
        return {table_name(name): gather_table(value) for name, value in sorted(tables_of(model).items())}

    def dense() -> dict[str, torch.Tensor]:
        state = {name: value for name, value in model.state_dict().items() if name.startswith("dense.")}
        return {name.removeprefix("dense."): value.detach().clone() for name, value in state.items()}

    result = Trained(tables(), dense())
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    schedule = Schedule(optimizer, case.config.optimizer)
    group = ranks_per_group(case.config.tables)
    replicas = Replicas(table_tensors(model, optimizer), group, case.config.tables.sync_steps)
    candidates = Candidates(np.arange(9), np.zeros(9, np.float32))
    ahead = Lockstep(
        iter(make_batches(case, rank, world_size)),
        lambda: pack_batch(case, no_histories(case.opened["inputs"]), candidates, Place(rank, world_size)),
    )
    model.train()
    while True:
        schedule.set_rates(len(result.losses), len(result.losses) / STEPS)
        try:
            loss, _ = pipeline.progress(ahead)
        except StopIteration:
            break
        replicas.after_step(len(result.losses) + 1)
        dist.all_reduce(loss)
        result.losses.append(float(loss) / world_size)
    result.tables, result.dense = tables(), dense()
    return result


def train_cases(rank: int, world_size: int, cases: list[Case], local_world_size: int = 0) -> list[Trained]:
    os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size or world_size)
    return [train(case, rank, world_size) for case in cases]


def train_plainly(case: Case, start: Trained) -> Trained:
    """The reference: dense matrices, autograd, Adagrad by its formula, torch's AdamW."""
    config = case.config
    weights = {name: table.clone().requires_grad_() for name, table in start.tables_before.items()}
    moments = {name: torch.zeros_like(table) for name, table in start.tables_before.items()}
    dense = Dense(config.model, config.loss, segments=case.refused, inputs=case.opened["inputs"])
    dense.load_state_dict(start.dense_before)
    adamw = torch.optim.AdamW(dense.parameters(), lr=LR, betas=(0.9, BETA2), weight_decay=0)
    result = Trained(start.tables_before, start.dense_before)

    def rows(entity: str, ids: list[int | None]) -> torch.Tensor:
        return torch.stack([torch.zeros(DIM) if id is None else vector(entity, id) for id in ids])

    def vector(entity: str, id: int) -> torch.Tensor:
        if case.pooling is None:
            return weights[entity][id]
        total = torch.zeros(DIM) if entity == "item" and id in UNTRAINED else weights[entity][id]
        for each in ATTRIBUTES:
            values = each.lists[id] if each.described.entity == entity else []
            if values:
                summed = sum((weights[each.described.table][value] for value in values), torch.zeros(DIM))
                pooled = summed / len(values) if case.pooling == "mean" else summed
                total = total + WEIGHTS.get(each.described.table, 1.0) * pooled
        return total

    for step, batch in enumerate(make_batches(replace(case, pooling=None), 0, 1)):
        user_ids, item_ids = ids_by_bag(batch.bags)
        items = rows("item", item_ids)
        loss, _ = dense(rows("user", user_ids), items, items, batch)
        adamw.zero_grad()
        loss.backward()
        adamw.param_groups[0]["lr"] = LR * case.learning_rate_share(step)
        adamw.step()
        for name, weight in weights.items():
            assert weight.grad is not None
            squared = weight.grad**2
            if case.optimizer == "rowwise_adagrad":
                squared = squared.mean(1, keepdim=True).expand_as(squared)
            moments[name] += squared
            scale = 1.0 if case.optimizer == "sgd" else moments[name].sqrt() + 1e-8
            with torch.no_grad():
                weight -= TABLE_LR * case.learning_rate_share(step) * weight.grad / scale
            weight.grad = None
        result.losses.append(float(loss.detach()))
    result.tables = {name: weight.detach() for name, weight in weights.items()}
    result.dense = {name: value.detach().clone() for name, value in dense.state_dict().items()}
    return result


def check_equal(case: Case, ours: Trained) -> None:
    reference = train_plainly(case, ours)
    assert len(ours.losses) == len(reference.losses) == STEPS
    np.testing.assert_allclose(ours.losses, reference.losses, rtol=2e-5)
    assert case.few or reference.losses[-1] < reference.losses[0]
    for name, table in reference.tables.items():
        moved = 0.002 if case.optimizer == "sgd" else 0.02
        assert (table - ours.tables_before[name]).abs().max() > moved, (
            "no parameter changed: the comparison proves nothing"
        )
        torch.testing.assert_close(ours.tables[name], table, rtol=1e-3, atol=2e-4, msg=name)
    assert ours.dense.keys() == reference.dense.keys()
    for name in [name for name in ours.dense if "features." in name or "refused.at_" in name]:
        assert (ours.dense[name] - ours.dense_before[name]).abs().max() > 2e-3, f"{name} was not read"
    for name, value in reference.dense.items():
        torch.testing.assert_close(ours.dense[name], value, rtol=1e-3, atol=2e-4, msg=name)


@dataclass
class FixedShare:
    """Yields given batches; its queue is always empty."""

    given: list[SequenceBatch]
    left: list[Queue] = field(default_factory=lambda: [Queue(())])

    def __iter__(self) -> Iterator[SequenceBatch]:
        return iter(self.given)

    def done(self, cursor: Cursor) -> None:
        pass


@dataclass
class FixedStream:
    """A stream of given batches, one epoch for ever."""

    given: list[SequenceBatch]
    case: Case

    @property
    def maker(self) -> Any:
        candidates = Candidates(np.arange(9), np.zeros(9, np.float32))
        return SimpleNamespace(
            empty=lambda *_: pack_batch(self.case, no_histories(self.case.opened["inputs"]), candidates, here())
        )

    def batches(self, epoch: int, position: Position, rank: int, world_size: int) -> "FixedShare":
        return FixedShare(self.given)


def here() -> Place:
    return Place(dist.get_rank(), dist.get_world_size())


def make_trainer(
    model: Any,
    optimizer: Any,
    stream: Any,
    output: str,
    *,
    entries: int = 100,
    train: Train | None = None,
    warmup_steps: int = 1,
    minutes: float = 0,
) -> Trainer:
    return Trainer(
        model=model,
        optimizer=optimizer,
        device=torch.device("cpu"),
        execution=Execution("cpu"),
        stream=stream,
        entries=entries,
        train=train or Train(epochs=2),
        schedule=Optimizer(warmup_steps=warmup_steps),
        saving=Saving(every_minutes=minutes),
        checkpoints=Checkpoints(output, keep=1),
        metadata={},
        seed=0,
    )
