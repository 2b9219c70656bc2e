"""What a model of users and items is made of: the shapes of its tables, the dense part, and what is looked up.

Needs torch alone. `model.recgpt` builds the tables with torchrec, to be sharded; `whole` with torch, for one process.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recgpt_torchrec.config import Loss, Model, Tuning
from recgpt_torchrec.data.bags import ITEM, OUTPUT, USER, names_of_attribute, names_of_keys
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.inputs.spec import Inputs
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
    user_attributes: Tensor | None = None
    """[user bags, dim] weighted sum of the attributes' vectors; None: there are none."""
    item_attributes: Tensor | None = None
    """[item bags, dim], likewise."""


class Pooled(NamedTuple):
    """How an attribute's vectors are added to those of the other attributes."""

    entity: str
    table: str
    weight: float
    averages: bool
    """Whether those of several values are averaged, not summed."""


class TableShape(NamedTuple):
    """The name and the rows of a table, and the keys of the bags that are looked up in it."""

    name: str
    rows: int
    keys: list[str]


class TabledModel(nn.Module, ABC):
    """Tables, which a subclass builds as `tables`, and the dense part (paper, section 4.2)."""

    tables: Any

    def __init__(
        self,
        model: Model,
        loss: Loss,
        users: int,
        items: int,
        tuning: Tuning | None = None,
        item_keys: int = 1,
        inputs: Inputs | None = None,
        attributes: Attributes | None = None,
    ) -> None:
        """
        Args:
            model, loss: configuration of the dense part.
            users, items: rows of the tables.
            tuning: what prompt-tuning adds; None: pre-training.
            item_keys: number of keys that item bags are dealt to (see `data.bags`); no parameter depends on it.
            inputs: what it reads beside ids; None: nothing.
            attributes: the values of all users and items, for `look_up`; None: there are none.
        """
        super().__init__()
        self.item_keys, self.inputs, self.attributes = item_keys, inputs or Inputs(), attributes
        # torchrec's own mean is wrong where a table is sharded as a grid, so its tables sum.
        several = set() if attributes is None else attributes.tables_of_several
        self.pooled = [
            Pooled(each.entity, each.table, each.weight, averages=each.pooling == "mean" and each.table in several)
            for each in self.inputs.attributes
        ]
        item_names = names_of_keys(item_keys)
        self.shapes = [TableShape(USER, users, [USER]), TableShape(ITEM, items, item_names)]
        if tuning is not None and tuning.output_table:
            self.shapes.append(TableShape(OUTPUT, items, item_names))
        self.shapes += [
            TableShape(each.table, each.values, names_of_attribute(each, item_keys)) for each in self.inputs.attributes
        ]
        self.dense = Dense(model, loss, segments=tuning is not None and tuning.prompts, inputs=self.inputs)

    @abstractmethod
    def look_up(
        self, device: torch.device, users: Int64 = NONE, items: Int64 = NONE, room: tuple[int, int] = (0, 0)
    ) -> Vectors:
        """Vectors, float32, of `users` [n] int64 and `items` [m] int64 from the tables, with their attributes
        (collective, where tables are sharded).

        Args:
            device: of this rank.
            users, items: ids.
            room: number of users and of items for which there are bags, where other ranks may look up more than n or m.
        """


def unwrapped(model: nn.Module) -> TabledModel:
    """The model inside DistributedModelParallel and DDP; where tables are sharded, calling them is collective."""
    while not isinstance(model, TabledModel):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def unwrapped_dense(model: TabledModel) -> Dense:
    """The dense part of a model, without DDP around it."""
    dense = getattr(model.dense, "module", model.dense)
    assert isinstance(dense, Dense)
    return dense
