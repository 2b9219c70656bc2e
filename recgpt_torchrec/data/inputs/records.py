"""The attributes of users and items as a dataset's manifest describes them."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from recgpt_torchrec.data.inputs.spec import Entity, column_of, full_name_of, table_of_attribute
from recgpt_torchrec.storage.parts import Part
from recgpt_torchrec.storage.typed import check_counts


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

    def check(self) -> None:
        """Check what a manifest says of the attribute.

        Raises:
            ValueError: numbers are impossible, or do not fit each other.
        """
        where = f"of the {self.entity} attribute {self.name[:60]}"
        check_counts({f"values {where}": self.values, f"missing {where}": self.missing})
        rising = all(map(math.isfinite, self.edges)) and all(a < b for a, b in pairwise(self.edges))
        if not rising or (self.edges and len(self.edges) != self.values - 1):
            raise ValueError(f"the edges {where} are not those of {self.values:,} buckets")
        rows = sum(part.rows for part in self.parts)
        if self.parts and rows != self.values:
            raise ValueError(f"it promises {self.values:,} values {where}, but {rows:,} rows in its parts")
        if not self.values:
            raise ValueError(f"it promises no values {where}")

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
