"""RecGPT: user and item tables around the dense part, from a `SequenceBatch` to a loss and interest vectors."""

from itertools import groupby
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recgpt_torchrec.config import Loss, Model, Tuning
from recgpt_torchrec.data.bags import ITEM, OUTPUT, USER, bags_of, table_of
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.model.tabled.base import NONE, Pooled, TabledModel, Vectors


@torch.fx.wrap
def vectors_of(lookup: KeyedTensor, bags: KeyedJaggedTensor, attributes: list[Pooled]) -> Vectors:
    """The vectors of users and items, from what the collection returns: [stride, dim] per key, tables in any order.

    `bags` are what was looked up.
    """
    keys = zip(lookup.keys(), lookup.length_per_key(), strict=True)
    widths = {table: sum(dim for _, dim in some) for table, some in groupby(keys, lambda key: table_of(key[0]))}
    dim = widths[USER]
    parts = lookup.values().split(list(widths.values()), dim=1)
    by_table = {table: part.unflatten(1, (-1, dim)) for table, part in zip(widths, parts, strict=True)}

    def add_up(entity: str) -> Tensor | None:
        total: Tensor | None = None
        for each in attributes:
            if each.entity == entity:
                # In the layout of the exchange, [stride, keys, dim], so that only the sum is brought into that of bags.
                part = by_table[each.table]
                factor = each.weight / numbers_of_values(bags, each.table, part.shape[1]) if each.averages else None
                if total is None:
                    total = part * (each.weight if factor is None else factor)
                elif factor is None:
                    total = total.add(part, alpha=each.weight)
                else:
                    total = total.addcmul(part, factor)
        return None if total is None else total.view(-1, dim)

    users, items = by_table[USER].reshape(-1, dim), by_table[ITEM].reshape(-1, dim)
    outputs = by_table[OUTPUT].reshape(-1, dim) if OUTPUT in by_table else items
    return Vectors(users, items, outputs, add_up(USER), add_up(ITEM))


def numbers_of_values(bags: KeyedJaggedTensor, table: str, keys: int) -> Tensor:
    """Number of values in each bag of an attribute's table, at least 1, [stride, keys, 1]."""
    first = bags.keys().index(f"{table}_0")
    return bags.lengths().view(len(bags.keys()), -1)[first : first + keys].T.clamp(min=1)[:, :, None]


class RecGPT(TabledModel):
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
        inputs: Inputs | None = None,
        attributes: Attributes | None = None,
    ) -> None:
        """See `TabledModel`; the tables are on the meta device until they are sharded.

        Args:
            precision: of the tables' weights, `fp32` or `fp16`; looked-up vectors are float32.
        """
        super().__init__(model, loss, users, items, tuning, item_keys, inputs, attributes)
        configs = [
            EmbeddingBagConfig(
                name=table,
                embedding_dim=model.dim,
                num_embeddings=rows,
                feature_names=names,
                data_type=DataType[precision.upper()],
            )
            for table, rows, names in self.shapes
        ]
        self.tables = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Dense.forward`."""
        vectors = vectors_of(self.tables(batch.bags), batch.bags, self.pooled)
        return self.dense(vectors[0], vectors[1], vectors[2], batch, vectors[3], vectors[4])

    @torch.no_grad()
    def look_up(
        self, device: torch.device, users: Int64 = NONE, items: Int64 = NONE, room: tuple[int, int] = (0, 0)
    ) -> Vectors:
        """See `TabledModel.look_up`."""
        sizes = users.size, items.size
        capacity = Capacity(max(room[0], sizes[0]), max(room[1], sizes[1]), self.item_keys)
        bags: Any = bags_of(users, items, capacity, self.attributes).to(device)
        found = self.tables(bags)
        vectors = vectors_of(found if isinstance(found, KeyedTensor) else found.wait(), bags, self.pooled)
        of_users, of_items, outputs = (
            rows if added is None else rows + added
            for rows, added in zip(vectors[:3], (vectors[3], vectors[4], vectors[4]), strict=True)
        )
        return Vectors(of_users[: sizes[0]].float(), of_items[: sizes[1]].float(), outputs[: sizes[1]].float())
