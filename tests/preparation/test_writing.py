"""Parts of a dataset written one by one are those that are written all at once; numbering is that of one sort."""

import hashlib
import random
from functools import partial

import pyarrow as pa
import pyarrow.fs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt_torchrec.preparation import queries
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.writing import Fingerprint, Layout, fingerprint_parts, lay_out_rows, list_groups


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    users=st.integers(1, 5),
    groups=st.integers(1, 3),
    batch=st.integers(1, 7),
)
def test_each_part_alone_has_the_bytes_that_it_has_among_all(tmp_path_factory, lengths, users, groups, batch):
    events = [(user, 10 * user + place) for user, length in enumerate(lengths) for place in range(length)]
    rows = pa.table(
        {
            "user_id": pa.array([user for user, _ in events], pa.int64()),
            "item_id": pa.array([item for _, item in events], pa.int64()),
            "before": pa.array([item % 2 == 0 for _, item in events], pa.bool_()),
        }
    )
    lists = {"item_ids": ("item_id", pa.int64())}
    layout = Layout(
        folder="sequences",
        id="user_id",
        ids=len(lengths),
        columns=["user_id", "item_id", "before"],
        ids_per_group=users,
        groups_per_part=groups,
        make_groups=partial(list_groups, ids_per_group=users, lists=lists, counts={"start": "before"}),
    )
    fs, root = pyarrow.fs.LocalFileSystem(), tmp_path_factory.mktemp("parts")
    whole = layout.write_all(fs, str(root / "whole"), rows.to_batches(max_chunksize=batch))
    alone = []
    with pytest.raises(FileNotFoundError):
        layout.write_part(fs, str(root / "gone"), [], 0, "part")
    assert not (root / "gone").exists()
    (root / "alone" / layout.folder).mkdir(parents=True)
    for number in range(layout.parts):
        inside = [user // layout.ids_per_part == number for user, _ in events]
        batches = rows.filter(pa.array(inside, pa.bool_())).to_batches(max_chunksize=batch + 1)
        alone.append(layout.write_part(fs, str(root / "alone"), batches, number, "part"))
    assert alone == whole and len(whole) == layout.parts
    read = pa.concat_tables([pa.parquet.read_table(root / "alone" / part.path) for part in alone])
    assert [len(row) for row in read["item_ids"].to_pylist()] == lengths
    odd = [sum(item % 2 == 0 for user, item in events if user == number) for number in range(len(lengths))]
    assert read["start"].to_pylist() == odd


@pytest.mark.parametrize("bucket", [1, 7, 1000])
def test_codes_and_ids_are_those_of_one_sort(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(queries, "BUCKET_CODES", bucket)
    keys = [f"key {number}" for number in range(300)]
    in_order = sorted(keys, key=lambda key: hashlib.md5(f"5:{key}".encode()).hexdigest())
    kept = sorted(random.Random(0).sample(range(300), 120))
    known = {code: number for number, code in enumerate([kept[7], 299, kept[3], 0])}
    with DuckDBEngine(str(tmp_path)) as engine:
        table = engine.fill("keys", [pa.table({"key": keys})], pa.schema([("key", pa.string())]))
        codes = engine.save("codes", queries.assign_codes(table, "item", 5))
        assert [row["key"] for row in engine.rows(codes.order_by("item"))] == in_order
        assert sorted(row["item"] for row in engine.rows(codes)) == list(range(300))
        left = codes.filter(codes.item.isin(kept)).select("item")
        ids = {row["item"]: row["item_id"] for row in engine.rows(queries.assign_ids(left, "item", "item_id"))}
        assert ids == {code: number for number, code in enumerate(kept)}
        pairs = pa.table({"item": [*known], "item_id": [*known.values()]})
        known_table = engine.fill("known", [pairs], pairs.schema)
        grown = queries.assign_ids(left, "item", "item_id", known_table)
        ids = {row["item"]: row["item_id"] for row in engine.rows(grown)}
    new = [code for code in kept if code not in known]
    assert ids == {**known, **{code: number + len(known) for number, code in enumerate(new)}}


def test_the_fingerprint_of_written_parts_is_that_of_their_keys(tmp_path):
    keys = {"items": ["a", "ß", "", "c" * 9], "users": ["u"]}
    fs, plain, parts = pyarrow.fs.LocalFileSystem(), Fingerprint(), {}
    for name, values in keys.items():
        rows = pa.table({"id": pa.array(range(len(values))), "key": values})
        layout = lay_out_rows(name, ["id", "key"], len(values), 1, 2)
        parts[name] = layout.write_all(fs, str(tmp_path), rows.to_batches())
        plain.add(pa.chunked_array([[name, *values]]))
    assert len(parts["items"]) == 2
    assert fingerprint_parts(fs, str(tmp_path), parts) == plain.hex()
