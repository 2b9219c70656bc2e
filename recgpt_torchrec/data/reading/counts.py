"""Reads how often items were interacted with, from the dataset's `items/` parts."""

from typing import Literal

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64, to_numpy
from recgpt_torchrec.data.reading.footers import column_bounds
from recgpt_torchrec.data.reading.reader import find_outside
from recgpt_torchrec.errors import InputError


def read_counts(
    dataset: Dataset, first: int, stop: int, column: Literal["train_count", "count"] = "train_count"
) -> Int64:
    """[stop - first] int64: number of interactions of the items `first` to `stop` - 1, in the training part or, with
    `count`, in all of the log.

    Row groups without any of these items are not read, where their statistics tell.

    Raises:
        InputError: a part cannot be read, or an item has no count or an id that is none.
    """
    items = dataset.manifest.items
    counts = np.zeros(stop - first, dtype=np.int64)
    for part in dataset.manifest.item_parts:
        with dataset.read_part(part) as file:
            wanted = []
            for group in range(file.num_row_groups):
                bounds = column_bounds(file.metadata, group, "item_id")
                if bounds is None or (bounds[0] < stop and bounds[1] >= first):
                    wanted.append(group)
            for batch in file.iter_batches(columns=["item_id", column], row_groups=wanted):
                ids, values = (batch[name].cast(pa.int64()) for name in ("item_id", column))
                if ids.null_count or values.null_count or find_outside(to_numpy(ids), 0, items).size:
                    raise InputError(
                        f"{dataset.path}: {part.path}: an item has no count, or an id outside 0 to {items - 1}; "
                        + dataset.remedy
                    )
                own = (to_numpy(ids) >= first) & (to_numpy(ids) < stop)
                counts[to_numpy(ids)[own] - first] = np.maximum(to_numpy(values)[own], 0)
    return counts
