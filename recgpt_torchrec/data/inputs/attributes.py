"""The attribute values of all users and items, by id, for the bags of a batch."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import Attribute, Entity, Inputs, column_of
from recgpt_torchrec.data.ragged import Int64, Ragged, offsets_of


class EntityBag(NamedTuple):
    """What the bags of some users or items hold."""

    ids: Ragged
    """Each one's id; none where its row is not trained."""
    values: list[Ragged]
    """Per attribute, in the order of `Inputs`, the ids of its values."""


@dataclass(frozen=True)
class EntityAttributes:
    """The attribute values of all users, or of all items."""

    attributes: list[Attribute] = field(default_factory=list)
    columns: list[Ragged] = field(default_factory=list)
    """Per attribute the value ids by user or item."""
    trained: npt.NDArray[np.bool_] | None = None
    """[users or items] bool: whether the row of its id is trained; None: all are."""

    def of(self, ids: Int64) -> EntityBag:
        """The bags of `ids` [n] int64."""
        has_row = np.ones(ids.size, dtype=bool) if self.trained is None else self.trained[ids]
        own = Ragged(ids[has_row], offsets_of(has_row))
        return EntityBag(own, [column.take(ids) for column in self.columns])


@dataclass(frozen=True)
class Attributes:
    """The attribute values that a model reads."""

    users: EntityAttributes = field(default_factory=EntityAttributes)
    items: EntityAttributes = field(default_factory=EntityAttributes)

    @classmethod
    def open(cls, dataset: Dataset, inputs: Inputs) -> "Attributes | None":
        """Those of a dataset; None: the model reads none."""
        if not inputs.attributes:
            return None
        return cls(read_entity(dataset, inputs, "user"), read_entity(dataset, inputs, "item"))


def read_entity(dataset: Dataset, inputs: Inputs, entity: Entity) -> EntityAttributes:
    """Read the attribute values of all users or items."""
    attributes = inputs.of_entity(entity)
    if not attributes:
        return EntityAttributes()
    names = [column_of(each.name) for each in attributes]
    parts = dataset.manifest.user_parts if entity == "user" else dataset.manifest.item_parts
    counted = [] if entity == "user" else ["train_count"]
    tables = []
    for part in parts:
        with dataset.read_part(part) as file:
            tables.append(file.read(columns=[f"{entity}_id", *names, *counted]))
    table = pa.concat_tables(tables)
    columns = [Ragged.from_arrow(table[name].cast(pa.list_(pa.int64()))) for name in names]
    trained = table["train_count"].to_numpy() > 0 if counted else None
    return EntityAttributes(attributes, columns, trained)
