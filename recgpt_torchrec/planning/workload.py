"""What one rank works on in one training step: tokens, targets, candidates, bags, operations. Sizes in, sizes out."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from recgpt_torchrec.config.defaults import MOST, tokens_of_rank, tokens_of_step
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.config.tables import is_of_users
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.days.opening import find_manifest
from recgpt_torchrec.data.inputs.choosing import choose_inputs
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.neighbours.folder import NeighboursManifest, open_neighbours
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.flops import Flops, step_flops
from recgpt_torchrec.model.recgpt import RecGPT

VALUES = 2
"""Values per user or item of an attribute of which there may be several (assumed)."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a run, and of one step of one rank."""

    plan: Plan
    """With items, users and history filled in."""
    tokens: int
    """Maximum number of tokens of a batch, per rank; batches are taken to be full."""
    inputs: Inputs = field(default_factory=Inputs)
    """What the model reads beside ids: with `--data`, the attributes that a run would read."""
    several: frozenset[str] = frozenset()
    """Tables of attributes of which a user or item may have several values."""
    neighbours: int = 0
    """Maximum number of neighbours per item that are held in memory; 0: none are."""

    @classmethod
    def of(cls, plan: Plan) -> "Workload":
        """The workload of the options; with `--data` the dataset's manifest is read, and so is that of neighbours.

        Raises:
            InputError: the dataset is missing or damaged, or a batch does not hold the longest history; or so are the
                neighbours, or they do not fit the dataset.
        """
        inputs, several, dataset = Inputs(), frozenset[str](), None
        if plan.data is not None:
            manifest, files, newest = find_manifest(plan.data)
            dataset = Dataset(path=plan.data, manifest=manifest, files=files, newest=newest)
            plan, inputs = with_sizes_of(plan, manifest), choose_inputs(plan, dataset)
            several = frozenset(each.table for each in manifest.attributes if each.multiple)
        neighbours = 0
        if (path := plan.neighbours.path) is not None:
            found = NeighboursManifest.read(path) if dataset is None else open_neighbours(path, dataset)
            neighbours = found.count
        assert plan.users is not None
        tokens, device = plan.batch.given_tokens(plan.model.max_len), "cpu" if plan.gpu == "cpu" else "cuda"
        if tokens is not None and plan.batch.users:
            tokens = min(tokens, max(1, round(plan.batch.users * cls(plan, 0).history)))
        elif tokens is None:
            epoch = cls(plan, 0).epoch_tokens or MOST[device] * plan.ranks * 10**6
            step = tokens_of_step(epoch, plan.ranks, device, plan.batch.step_tokens)
            tokens = tokens_of_rank(step, plan.ranks, plan.model.max_len)
        return cls(plan, tokens, inputs, several, neighbours)

    def on(self, nodes: int, gpus: int) -> "Workload":
        """The same batch per rank on another cluster."""
        return replace(self, plan=replace(self.plan, nodes=nodes, gpus=gpus))

    @property
    def items(self) -> int:
        """Number of items."""
        assert self.plan.items is not None
        return self.plan.items

    @property
    def users(self) -> int:
        """Number of users."""
        assert self.plan.users is not None
        return self.plan.users

    @property
    def history(self) -> float:
        """Mean number of tokens per sequence, from 1 to max_len."""
        plan, max_len = self.plan, self.plan.model.max_len
        given = plan.history
        if given is None:
            given = max_len / 2 if plan.interactions is None else plan.interactions / self.users - 1
        if plan.batch.long_histories == "windows" and given > max_len:
            return given / (given / max_len + 1)  # cut at any places, into one window more than would hold it
        return min(max(given, 1.0), max_len)

    @property
    def epoch_tokens(self) -> float | None:
        """Tokens of an epoch, over all ranks; None: the number of interactions is not known."""
        if self.plan.interactions is None:
            return None
        of_newest = self.users * self.history  # of each history the newest max_len
        return max(
            1.0, of_newest if self.plan.batch.long_histories == "newest" else self.plan.interactions - self.users
        )

    @property
    def sequences(self) -> int:
        """Sequences of a batch, and so distinct users."""
        return min(self.users, max(1, min(round(self.tokens / self.history), self.capacity.users)))

    @property
    def targets(self) -> int:
        """Targets of a batch: each token predicts one."""
        return self.tokens

    @property
    def candidates(self) -> int:
        """Candidates that each target of a batch is scored against."""
        kind = self.plan.loss.candidates
        if kind == "all":
            return self.items
        own = self.targets if kind == "in_batch" else self.plan.loss.negatives
        return min(self.items, own * (self.plan.ranks if self.scores_all_ranks else 1))

    @property
    def scores_all_ranks(self) -> bool:
        """Whether targets are scored against candidates that other ranks hold."""
        return self.plan.loss.crosses_ranks(self.plan.ranks)

    @property
    def own_candidates(self) -> int:
        """Candidates whose vectors one rank looks up."""
        return -(-self.candidates // self.plan.ranks) if self.scores_all_ranks else self.candidates

    @property
    def distinct_items(self) -> int:
        """Items that a rank looks up in a step, all taken to be distinct: histories, targets, answers, candidates."""
        return min(self.items, self.tokens * (1 + self._answers) + self.sequences + self._room)

    @property
    def _answers(self) -> int:
        """Neighbours that share a target's weight."""
        return self.plan.neighbours.answers if self.plan.neighbours.path is not None else 0

    def ids_of(self, table: str) -> int:
        """Ids that a rank looks up in a table in a step: of an attribute, values of distinct users or items."""
        entities = self.sequences if is_of_users(table) else self.distinct_items
        return entities * (VALUES if table in self.several else 1)

    @property
    def _room(self) -> int:
        """Bags that a batch has room for beyond those of its histories, as `CandidateSource.room`."""
        return 0 if self.plan.loss.candidates == "in_batch" else self.own_candidates

    @cached_property
    def capacity(self) -> Capacity:
        """Number of bags per table, which is exchanged whatever a batch holds."""
        dataset = Dataset(path="", manifest=Manifest(users=self.users, items=self.items))
        model = self.plan.model
        reader = HistoryReader(dataset=dataset, split="training", max_len=model.max_len)
        source: Any = SimpleNamespace(room=self._room)
        batch, most = self.plan.batch, self.plan.batch.given_tokens(model.max_len) or self.tokens
        answering: Any = SimpleNamespace(answers=self._answers)
        maker = BatchMaker(reader=reader, batch=batch.of(most), users=batch.users, source=source, neighbours=answering)
        return maker.capacity

    @cached_property
    def meta_model(self) -> RecGPT:
        """The model on the meta device."""
        plan = self.plan
        with torch.device("meta"):
            return RecGPT(
                plan.model,
                plan.loss,
                self.users,
                self.items,
                item_keys=self.capacity.item_keys,
                precision=plan.tables.precision,
                inputs=self.inputs,
            )

    @cached_property
    def dense_parameters(self) -> int:
        """Number of the decoder's parameters."""
        return sum(parameter.numel() for parameter in self.meta_model.dense.parameters())

    @property
    def flops(self) -> Flops:
        """Operations of one step of one rank."""
        attended = self.tokens * (self.history + 1) / 2
        return step_flops(
            self.plan.model,
            self.plan.loss,
            tokens=self.tokens,
            targets=self.targets,
            candidates=self.candidates,
            attended=attended,
        )

    @property
    def steps(self) -> float | None:
        """Steps of an epoch; None: the number of interactions is not known."""
        epoch = self.epoch_tokens
        return None if epoch is None else max(1.0, epoch / (self.tokens * self.plan.ranks))


def with_sizes_of(plan: Plan, manifest: Manifest) -> Plan:
    """The options with the sizes of the dataset `--data`, where they are not given.

    Raises:
        InputError: the dataset holds nothing.
    """
    if not (manifest.users and manifest.items):
        raise InputError(f"{plan.data} has no users or no items; prepare a log with interactions in it")
    own, history = plan.items is None and plan.users is None, plan.history
    if history is None and manifest.day is None:  # a day counts the targets that it added alone
        max_len = plan.model.max_len if plan.batch.long_histories == "newest" else None
        targets = manifest.count_training_tokens(max_len, prompts=False)
        history = max(1.0, targets / max(sum(part.rows for part in manifest.sequences), 1))
    return replace(
        plan,
        items=plan.items or manifest.items,
        users=plan.users or manifest.users,
        interactions=plan.interactions or (manifest.interactions if own else None),
        history=history,
    )
