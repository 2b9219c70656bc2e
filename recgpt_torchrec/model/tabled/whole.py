"""A trained model with whole tables in one process, for requests. Needs torch alone, whose import takes 1.4 s of a
core; torchrec's takes 1.9 s more."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recgpt_torchrec.data.bags import ITEM, OUTPUT, USER
from recgpt_torchrec.data.inputs.attributes import EntityAttributes, Values
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.model.tabled.base import NONE, TabledModel, Vectors


class WholeModel(TabledModel):
    """The model of a checkpoint; its parameters have the names and shapes of those of `RecGPT`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """The arguments are those of `TabledModel`; the tables are on the meta device."""
        super().__init__(*args, **options)
        dim = self.dense.model.dim
        self.tables = nn.Module()
        # Weights are given, so that nothing is drawn: on the meta device that imports torch._dynamo, 0.6 s.
        self.tables.embedding_bags = nn.ModuleDict(
            {
                name: nn.EmbeddingBag(rows, dim, mode="sum", _weight=torch.empty(rows, dim, device="meta"))
                for name, rows, _ in self.shapes
            }
        )

    def rows_of(self, table: str, ids: Int64) -> Tensor:
        """[n, dim] rows of a table."""
        weight = self.tables.embedding_bags[table].weight
        return F.embedding(torch.from_numpy(ids).to(weight.device), weight)

    @torch.no_grad()
    def look_up(
        self, device: torch.device, users: Int64 = NONE, items: Int64 = NONE, room: tuple[int, int] = (0, 0)
    ) -> Vectors:
        """See `TabledModel.look_up`; rows of the tables alone where the model reads no attributes, which takes a tenth
        of the time of bags for a short history."""
        output = OUTPUT if OUTPUT in self.tables.embedding_bags else ITEM
        if self.attributes is None:
            found = [self.rows_of(USER, users), self.rows_of(ITEM, items), self.rows_of(output, items)]
            return Vectors(*(each.float() for each in found))
        of_users, added_to_users = self._look_up_entity(self.attributes.users, USER, users, [USER], device)
        of_items, added_to_items = self._look_up_entity(self.attributes.items, ITEM, items, [ITEM, output], device)
        rows = [of_users[0] + added_to_users, *(each + added_to_items for each in of_items)]
        return Vectors(*(each.float() for each in rows))

    def _look_up_entity(
        self, attributes: EntityAttributes, entity: str, ids: Int64, tables: list[str], device: torch.device
    ) -> tuple[list[Tensor], Tensor | float]:
        """The rows of `ids` [n] in each of `tables`, [n, dim], and the weighted sum of their attributes' vectors."""
        own = _bags(attributes.own_ids(ids), device)
        rows = [self._pool(table, own) for table in tables]
        values = {
            attribute.table: column.of(ids)
            for attribute, column in zip(attributes.attributes, attributes.columns, strict=True)
        }
        total: Tensor | float = 0.0
        for each in self.pooled:
            if each.entity == entity:
                bags = _bags(values[each.table], device)
                numbers = bags[2].clamp(min=1)[:, None] if each.averages else 1
                total = total + self._pool(each.table, bags) * (each.weight / numbers)
        return rows, total

    def _pool(self, table: str, bags: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """[n, dim] sums of a table's rows, one for each bag."""
        return F.embedding_bag(bags[0], self.tables.embedding_bags[table].weight, bags[1], mode="sum")


def _bags(values: Values, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [entries] int64, where the ids of each bag begin [n] int64, and how many they are [n] int64."""
    lengths = torch.from_numpy(values.lengths).to(device, torch.int64)
    return torch.from_numpy(values.ids).to(device, torch.int64), lengths.cumsum(0) - lengths, lengths
