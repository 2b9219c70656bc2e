"""Reads from a dataset's parts which slots were given to another key, and what their policy knows of them."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ids.records import Entity
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError


def read_slots(dataset: Dataset, entity: Entity, columns: Sequence[str]) -> Iterator[list[Int64]]:
    """Columns of the users' or items' parts, in order of their ids, a block of rows at a time.

    Yields:
        Per column, [rows of the block] int64.

    Raises:
        InputError: a part cannot be read, or its ids are not dense, or a value is missing.
    """
    next_id = 0
    for part in dataset.manifest.user_parts if entity == "user" else dataset.manifest.item_parts:
        with dataset.read_part(part) as file:
            for batch in file.iter_batches(columns=[f"{entity}_id", *columns]):
                ids, *values = (batch[name].cast(pa.int64()) for name in (f"{entity}_id", *columns))
                expected = np.arange(next_id, next_id + len(ids))
                if any(each.null_count for each in (ids, *values)) or not np.array_equal(ids.to_numpy(), expected):
                    raise InputError(
                        f"{dataset.path}: {part.path} does not hold the {entity} ids from {next_id} on in order, with "
                        f"{' and '.join(columns)} of each; restore the file or run prepare again"
                    )
                next_id += len(ids)
                yield [each.to_numpy() for each in values]


def reassigned_ids(dataset: Dataset, entity: Entity, version: int) -> Iterator[Int64]:
    """The slots that were given to another key after a version of the vocabulary, a block of rows at a time.

    Args:
        dataset: whose `id_table` of the entity is a managed one.
        entity: `user` or `item`.
        version: see `Manifest.reassigned_since`.

    Yields:
        [n] int64 ids, ascending; blocks may be empty.
    """
    first = 0
    for (since,) in read_slots(dataset, entity, ["since"]):
        yield first + np.flatnonzero(since > version)
        first += len(since)
