"""RecGPT: user and item tables around the dense part, from a `SequenceBatch` to a loss and interest vectors."""

from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor
from torchrec.modules.embedding_configs import DataType

from recgpt_torchrec.config import Loss, Model, Tuning
from recgpt_torchrec.data.bags import ITEM, OUTPUT, USER, bags_of, names_of_keys, table_of
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.model.dense import Dense

NONE = np.zeros(0, dtype=np.int64)


class Vectors(NamedTuple):
    """Looked-up vectors, one row per bag; empty bags have zeros."""

    users: Tensor
    """[user bags, dim]."""
    items: Tensor
    """[item bags, dim]."""
    outputs: Tensor
    """[item bags, dim] that score outputs: of W_l (paper, section 4.3) where there is one, else the same as `items`."""


@torch.fx.wrap
def vectors_of(lookup: KeyedTensor) -> Vectors:
    """The vectors of each table, from what the collection returns: [stride, dim] per key, tables in any order."""
    keys = zip(lookup.keys(), lookup.length_per_key(), strict=True)
    widths = {table: sum(dim for _, dim in some) for table, some in groupby(keys, lambda key: table_of(key[0]))}
    dim = widths[USER]
    parts = lookup.values().split(list(widths.values()), dim=1)
    by_table = {table: part.reshape(-1, dim) for table, part in zip(widths, parts, strict=True)}
    return Vectors(by_table[USER], by_table[ITEM], by_table.get(OUTPUT, by_table[ITEM]))


class RecGPT(nn.Module):
    """The whole model, from a batch of distinct ids to a loss (paper, section 4.2).

    `forward` itself calls the sharded tables, with the jagged tensor straight from the batch, so that the train
    pipeline can start their all-to-all one step ahead. The tables are one collection, whose exchanges and Python code
    run once per step: a step with 768 tokens per rank on two ranks takes 5 to 10% less than with one per table.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        users: int,
        items: int,
        tuning: Tuning | None = None,
        item_keys: int = 1,
        precision: str = "fp32",
    ) -> None:
        """
        Args:
            model, loss: configuration of the dense part.
            users, items: rows of the tables, on the meta device until they are sharded.
            tuning: what prompt-tuning adds; None: pre-training.
            item_keys: number of keys that item bags are dealt to (see `data.bags`); no parameter depends on it.
            precision: of the tables' weights, `fp32` or `fp16`; looked-up vectors are float32.
        """
        super().__init__()
        self.item_keys = item_keys
        rows = {USER: users, ITEM: items}
        if tuning is not None and tuning.output_table:
            rows[OUTPUT] = items
        configs = [
            EmbeddingBagConfig(
                name=table,
                embedding_dim=model.dim,
                num_embeddings=number,
                feature_names=[USER] if table == USER else names_of_keys(item_keys),
                data_type=DataType[precision.upper()],
            )
            for table, number in rows.items()
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        self.dense = Dense(model, loss, segments=tuning is not None and tuning.prompts)

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Dense.forward`."""
        vectors = vectors_of(self.tables(batch.bags))
        return self.dense(vectors[0], vectors[1], vectors[2], batch)

    @torch.no_grad()
    def look_up(
        self, device: torch.device, users: Int64 = NONE, items: Int64 = NONE, room: tuple[int, int] = (0, 0)
    ) -> Vectors:
        """Vectors, float32, of `users` [n] int64 and `items` [m] int64 from the sharded tables (collective).

        Args:
            device: of this rank.
            users, items: ids.
            room: number of users and of items for which there are bags, where other ranks may look up more than n or m.
        """
        sizes = users.size, items.size
        capacity = Capacity(max(room[0], sizes[0]), max(room[1], sizes[1]), self.item_keys)
        bags: Any = bags_of(users, items, capacity)
        vectors = vectors_of(self.tables(bags.to(device)).wait())
        return Vectors(*(rows[:size].float() for rows, size in zip(vectors, (*sizes, sizes[1]), strict=True)))


def unwrapped(model: nn.Module) -> RecGPT:
    """The RecGPT inside DistributedModelParallel and DDP; its tables are sharded, and calling them is collective."""
    while not isinstance(model, RecGPT):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def unwrapped_dense(model: RecGPT) -> Dense:
    """The dense part of a model, without DDP around it."""
    dense = getattr(model.dense, "module", model.dense)
    assert isinstance(dense, Dense)
    return dense
