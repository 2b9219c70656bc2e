"""The attribute values of all users and items, by id, for the bags of a batch.

All of them are in one buffer, whose layout follows from the dataset's footers: small ones are in memory, large ones in
a file that the system maps. So a process holds what it looks up, whatever the number of users and items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.records import DatasetAttribute
from recgpt_torchrec.data.inputs.spec import Attribute, Entity, Inputs
from recgpt_torchrec.data.ragged import Int64, Ragged, read_nullable, to_numpy
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.buffers import Buffer, Fill, fill_in_memory
from recgpt_torchrec.storage.parts import VALUES_PER_BYTE, Part

Int32 = npt.NDArray[np.int32]
Read = Callable[[str, int, Fill, float, str], Buffer]
"""Makes a buffer and has it filled: see `distributed.shared_folder.read_on_node`."""
ROWS = 65_536
"""Rows that are read at once."""
NO_VALUE = -1
MOST_VALUES = 2**31 - 1


class Values(NamedTuple):
    """The values of one attribute of some users or items, or their own ids."""

    lengths: npt.NDArray[Any]
    """[n] number of values of each; bool where none has several."""
    ids: npt.NDArray[np.integer]
    """[entries], those of each user or item end to end."""


@dataclass(frozen=True)
class Column:
    """The value ids of one attribute by user or item."""

    ids: Int32
    """[rows] int32, `NO_VALUE` where there is none; or [entries] int32, where one may have several."""
    offsets: Int64 | None = None
    """[rows + 1] int64, where one may have several: those of row i are `ids[offsets[i]:offsets[i + 1]]`."""

    def of(self, rows: Int64) -> Values:
        """The values of `rows` [n] int64."""
        if self.offsets is not None:
            found = Ragged(self.ids, self.offsets).take(rows)
            return Values(found.lengths, found.values)
        ids = self.ids.take(rows)
        return _present(ids != NO_VALUE, ids)


@dataclass(frozen=True)
class EntityAttributes:
    """The attribute values of all users, or of all items."""

    attributes: list[Attribute] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    """Per attribute, in the same order."""
    trained: npt.NDArray[np.bool_] | None = None
    """[users or items] bool: whether the row of its id is trained; None: all are."""

    def own_ids(self, ids: Int64) -> Values:
        """`ids` [n] int64 themselves: none where its row is not trained, whose initial values mean nothing."""
        return Values(np.ones(ids.size, bool), ids) if self.trained is None else _present(self.trained.take(ids), ids)


def _present(has_value: npt.NDArray[np.bool_], ids: npt.NDArray[Any]) -> Values:
    return Values(has_value, ids if has_value.all() else ids[has_value])


@dataclass(frozen=True)
class Attributes:
    """The attribute values that a model reads. Pickled for another process, it travels as its buffer does."""

    users: EntityAttributes = field(default_factory=EntityAttributes)
    items: EntityAttributes = field(default_factory=EntityAttributes)
    source: "tuple[Sequence[Layout], Buffer] | None" = None
    """What they are views of."""

    @classmethod
    def open(cls, dataset: Dataset, inputs: Inputs, read: Read = fill_in_memory) -> "Attributes | None":
        """Those of a dataset; None: the model reads none.

        Args:
            dataset: to read.
            inputs: what the model reads, all of which the dataset has.
            read: makes the buffer that holds them, and has it filled; by default in this process's memory.

        Raises:
            InputError: a part is damaged; names the part, and what is wrong with it.
        """
        if not inputs.attributes:
            return None
        layouts = [Layout.of(dataset, inputs, "user"), Layout.of(dataset, inputs, "item")]

        def fill(content: npt.NDArray[np.uint8], advance: Callable[[float], None]) -> None:
            for layout, own in zip(layouts, _split(layouts, content), strict=True):
                layout.fill(dataset, own, advance)

        rows, size = sum(each.rows for each in layouts), sum(each.size for each in layouts)
        return cls.view(layouts, read("attributes", size, fill, rows, "rows"))

    @classmethod
    def view(cls, layouts: "Sequence[Layout]", buffer: Buffer) -> "Attributes":
        """Those in a filled buffer, whose layouts of users and items lie end to end."""
        users, items = (each.view(own) for each, own in zip(layouts, _split(layouts, buffer.bytes), strict=True))
        return cls(users, items, (layouts, buffer))

    @property
    def tables_of_several(self) -> set[str]:
        """Names of the attributes' tables of which a user or item may have several values."""
        columns = [
            pair for each in (self.users, self.items) for pair in zip(each.attributes, each.columns, strict=True)
        ]
        return {attribute.table for attribute, column in columns if column.offsets is not None}

    def __reduce__(self) -> Any:
        if self.source is None:
            return Attributes, (self.users, self.items)
        return Attributes.view, self.source


def _split(layouts: "Sequence[Layout]", content: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
    return np.split(content, np.cumsum([each.size for each in layouts])[:-1])


@dataclass(frozen=True)
class Layout:
    """Where the attribute values of an entity are in a buffer, end to end in pieces of a multiple of 8 bytes.

    Per attribute the offsets [rows + 1] int64, where one may have several values, and the value ids int32; then, of
    items, whether each is trained.
    """

    entity: Entity
    rows: int
    """Number of users or items; 0: the model reads no attributes of theirs."""
    attributes: list[Attribute]
    entries: list[int | None]
    """Per attribute the room for value ids, where one may have several; None: one per row."""

    @classmethod
    def of(cls, dataset: Dataset, inputs: Inputs, entity: Entity) -> "Layout":
        """The layout for a dataset, from the footers of its parts.

        Raises:
            InputError: a part cannot be read, or lacks a column.
        """
        attributes = inputs.of_entity(entity)
        if not attributes:
            return cls(entity, 0, [], [])
        recorded = {each.table: each for each in dataset.manifest.attributes}
        described = [recorded[each.table] for each in attributes]
        entries = [0 if each.multiple else None for each in described]
        for part in _parts_of(dataset, entity):
            with dataset.read_part(part) as file:
                for number, each in enumerate(described):
                    if each.values > MOST_VALUES:
                        raise _error(dataset, part, f"{each.values:,} values of {each.full_name} are too many")
                    room = _count_values(dataset, part, file, each)
                    if (so_far := entries[number]) is not None:
                        entries[number] = so_far + room
        rows = dataset.manifest.users if entity == "user" else dataset.manifest.items
        return cls(entity, rows, attributes, entries)

    @property
    def _pieces(self) -> list[tuple[int, type[np.generic]]]:
        """Length and type of each array of the buffer, in order."""
        pieces: list[tuple[int, type[np.generic]]] = []
        for entries in self.entries:
            pieces += [(self.rows, np.int32)] if entries is None else [(self.rows + 1, np.int64), (entries, np.int32)]
        return [*pieces, (self.rows, np.bool_)] if self.entity == "item" and self.rows else pieces

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return sum(_padded(length, kind) for length, kind in self._pieces)

    def _arrays(self, content: npt.NDArray[np.uint8]) -> list[npt.NDArray[Any]]:
        """The pieces of a buffer [size] uint8."""
        arrays, start = [], 0
        for length, kind in self._pieces:
            arrays.append(content[start : start + length * np.dtype(kind).itemsize].view(kind))
            start += _padded(length, kind)
        return arrays

    def view(self, content: npt.NDArray[np.uint8]) -> EntityAttributes:
        """The attribute values in a filled buffer [size] uint8."""
        arrays, columns = self._arrays(content), []
        for entries in self.entries:
            offsets = None if entries is None else arrays.pop(0)
            columns.append(Column(arrays.pop(0), offsets))
        return EntityAttributes(self.attributes, columns, arrays.pop() if arrays else None)

    def fill(self, dataset: Dataset, content: npt.NDArray[np.uint8], advance: Callable[[float], None]) -> None:
        """Read the parts of a dataset into a buffer [size] uint8 of zeros, a bounded number of rows at a time.

        Args:
            dataset: that the layout was made for.
            content: filled in place.
            advance: called with the number of rows that were read since the call before.

        Raises:
            InputError: an id is missing or not in order, a list or value is null, a value id is outside its vocabulary,
                or there are several where an attribute has one; names the part.
        """
        if not self.rows:
            return
        entity = self.view(content)
        names = [each.column for each in self.attributes]
        counts = ["train_count"] if entity.trained is not None else []
        row = 0
        for part in _parts_of(dataset, self.entity):
            with dataset.read_part(part) as file:
                for batch in file.iter_batches(ROWS, columns=[f"{self.entity}_id", *names, *counts]):
                    stop = row + batch.num_rows
                    ids = to_numpy(batch[f"{self.entity}_id"].cast(pa.int64()).fill_null(-1))
                    if stop > self.rows or not np.array_equal(ids, np.arange(row, stop)):
                        raise _error(dataset, part, f"its {self.entity} ids are not in order from {row:,} on")
                    for attribute, column, name in zip(self.attributes, entity.columns, names, strict=True):
                        fault = _fill_column(column, row, batch[name].cast(pa.list_(pa.int64())), attribute.values)
                        if fault:
                            raise _error(dataset, part, f"the attribute {attribute.full_name} {fault}")
                    if entity.trained is not None:
                        entity.trained[row:stop] = to_numpy(batch["train_count"].cast(pa.int64()).fill_null(0)) > 0
                    advance(batch.num_rows)
                    row = stop


def _fill_column(column: Column, row: int, lists: pa.ListArray, values: int) -> str | None:
    """Fill a column from a row on; returns what is wrong with the lists, or None.

    Args:
        column: filled in place.
        row: number of the lists' first row.
        lists: of int64.
        values: size of the vocabulary.
    """
    found, null_rows, null_values = read_nullable(lists)
    if null_rows.size or null_values.size:
        what = f"list of row {null_rows[0]}" if null_rows.size else f"value in row {found.rows_of(null_values[:1])[0]}"
        return f"has a null: the {what} of {found.rows:,} read at once; where there is no value the list is empty"
    if found.values.size and (found.values.min() < 0 or found.values.max() >= values):
        outside = found.values[(found.values < 0) | (found.values >= values)][0]
        return f"has the value id {outside}, which is not from 0 to {values - 1}"
    stop = row + found.rows
    if column.offsets is None:
        if found.rows and found.lengths.max() > 1:
            return f"has {found.lengths.max()} values in one list, and the manifest promises one at most"
        column.ids[row:stop] = NO_VALUE
        column.ids[row:stop][found.lengths > 0] = found.values
        return None
    first = column.offsets[row]
    if first + found.values.size > column.ids.size:
        return "has more values than its footer says"
    column.ids[first : first + found.values.size] = found.values
    column.offsets[row + 1 : stop + 1] = first + found.offsets[1:]
    return None


def _parts_of(dataset: Dataset, entity: Entity) -> list[Part]:
    return dataset.manifest.user_parts if entity == "user" else dataset.manifest.item_parts


def _count_values(dataset: Dataset, part: Part, file: pq.ParquetFile, attribute: DatasetAttribute) -> int:
    """Number of values of an attribute in a part by its footer, empty lists included.

    Raises:
        InputError: the part has no such column, or the number is impossible.
    """
    kind = file.schema_arrow.field(attribute.column).type if attribute.column in file.schema_arrow.names else pa.null()
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise _error(dataset, part, f"it has no column {attribute.column} of lists of whole numbers")
    metadata = file.metadata
    chunks = [
        metadata.row_group(group).column(n)
        for group in range(metadata.num_row_groups)
        for n in range(metadata.num_columns)
    ]
    found = sum(each.num_values for each in chunks if each.path_in_schema.startswith(f"{attribute.column}."))
    if not 0 <= found <= VALUES_PER_BYTE * part.bytes:
        raise _error(dataset, part, f"its footer promises {found:,} values of {attribute.full_name}")
    return found


def _padded(length: int, kind: type[np.generic]) -> int:
    """Bytes of an array, up to a multiple of 8."""
    return -(-length * np.dtype(kind).itemsize // 8) * 8


def _error(dataset: Dataset, part: Part, reason: str) -> InputError:
    return InputError(f"{dataset.path}: {part.path}: {reason}; {dataset.remedy}")
