"""Keys of an export's items by id, from files mapped into memory."""

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.item_keys import ItemKeys


def export_of(ids: list[int], keys: list[str], rows: int) -> Any:
    """What `ItemKeys` needs of an export, whose rows come `rows` per batch."""
    table = pa.table({"item_id": pa.array(ids, pa.int64()), "key": pa.array(keys, pa.string())})
    return SimpleNamespace(
        path="vectors",
        manifest=SimpleNamespace(items=len(ids)),
        items=lambda columns: iter(table.select(columns).to_batches(max_chunksize=rows)),  # slices of longer arrays
        error=lambda part, reason: InputError(f"{part} {reason}"),
    )


@given(
    keys=st.lists(st.text(min_size=1, max_size=5).filter(lambda key: key.isprintable()), min_size=1, max_size=40),
    rows=st.integers(1, 50),
    data=st.data(),
)
def test_keys_are_those_of_the_ids_in_any_order_of_rows(tmp_path_factory, keys, rows, data):
    folder = tmp_path_factory.mktemp("keys")
    ids = data.draw(st.permutations(range(len(keys))))
    asked = data.draw(st.lists(st.sampled_from(ids), max_size=20))
    by_id = dict(zip(ids, keys, strict=True))
    with ItemKeys(export_of(ids, keys, rows), str(folder / "lists")) as found:
        answer = found.of(np.array(asked, np.int64))
        assert answer.type == pa.string() and answer.to_pylist() == [by_id[each] for each in asked]
    assert os.listdir(folder) == []


def test_an_item_that_is_missing_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(InputError, match="item 1 is missing"):
        ItemKeys(export_of([0, 2, 2], ["a", "b", "c"], 2), str(tmp_path / "lists"))
    assert os.listdir(tmp_path) == []
