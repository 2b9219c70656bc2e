"""The attributes of users and items as a dataset's manifest describes them."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.data.inputs.spec import Entity, column_of, full_name_of, table_of_attribute
from recgpt_torchrec.storage.parts import Part


@dataclass(kw_only=True)
class ValueVocabulary:
    """Fingerprint and size of the vocabulary of an attribute's values."""

    fingerprint: str
    """Hash of the values, in the order of the ids."""
    values: int


@dataclass(kw_only=True)
class DatasetAttribute:
    """An attribute as a dataset's manifest describes it.

    The value ids of each entity are in the list column `column` of users/ or items/; an entity without a value has an
    empty list. Ids are dense from 0.
    """

    entity: Entity
    name: str
    """Of the column in the table that was given."""
    kind: Literal["category", "number"]
    """category: each distinct value has an id. number: each bucket has one."""
    multiple: bool = False
    """Whether an entity may have several values."""
    values: int
    """Number of distinct values."""
    fingerprint: str
    """Hash of the values, in the order of the ids."""
    edges: list[float] = field(default_factory=list)
    """Of a number: upper edges of its buckets, but for the last; bucket b holds the numbers from edge b - 1 up to, and
    without, edge b."""
    missing: int = 0
    """Number of users or items without a value."""
    lineage: list[ValueVocabulary] = field(default_factory=list)
    """The vocabularies that this one extends, oldest first."""
    parts: list[Part] = field(default_factory=list)
    """Of the vocabulary, where values are categories: value_id int64 (dense, from 0), key, count."""

    @property
    def column(self) -> str:
        """The column of users/ or items/ with the value ids."""
        return column_of(self.name)

    @property
    def table(self) -> str:
        """Name of the model's table."""
        return table_of_attribute(self.entity, self.name)

    @property
    def full_name(self) -> str:
        """How options and messages name it."""
        return full_name_of(self.entity, self.name)
