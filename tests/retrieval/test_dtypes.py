"""Vectors in float16 and int8: what they are read as, how far that is from the numbers, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import STORED, encode_vectors, vector_columns, vectors_of
from recgpt_torchrec.retrieval.exports.writing import write_export
from tests.support import stage, walks, write_dataset

ITEMS, USERS, DIM = 30, 50, 4
SHAPES = st.sampled_from([(1, 1), (7, 5), (3, 2, 4)])


def numbers(largest: float) -> st.SearchStrategy[np.ndarray]:
    finite = st.floats(-largest, largest, width=32, allow_subnormal=True)
    return SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=finite))


def read_back(vectors: np.ndarray, dtype: str) -> tuple[np.ndarray, pa.RecordBatch]:
    """Vectors as they are read after being stored, and how they are stored."""
    columns = encode_vectors(vectors, dtype, "item", np.arange(len(vectors)))
    batch = pa.record_batch(list(columns.values()), list(columns))
    interests = vectors.shape[1] if vectors.ndim == 3 else 1
    assert dict(zip(batch.schema.names, batch.schema.types, strict=True)) == vector_columns(
        dtype, vectors.shape[-1], interests
    )
    found = vectors_of(batch)
    assert found.dtype == np.float32 and found.shape == vectors.shape
    return found, batch


@settings(max_examples=60, deadline=None)
@given(numbers(2.0**127))
def test_int8_is_at_most_half_a_scale_off_and_the_scale_is_the_largest_number_over_127(vectors):
    found, batch = read_back(vectors, "int8")
    for row in range(len(vectors)):
        stored = batch.slice(row, 1).to_pylist()[0]
        several = "scales" in stored
        scales, lists = (stored["scales"], stored["vectors"]) if several else ([stored["scale"]], [stored["vector"]])
        for scale, stored_numbers, vector, own in zip(
            scales, lists, np.atleast_2d(vectors[row]), np.atleast_2d(found[row]), strict=True
        ):
            largest = max(abs(float(number)) for number in vector)
            if largest > 127 * 1.2e-38:
                assert scale == pytest.approx(largest / 127, rel=1e-6)
                assert max(map(abs, stored_numbers)) == 127
            for number, stored_number, decoded in zip(vector, stored_numbers, own, strict=True):
                assert abs(float(number) - stored_number * scale) <= scale / 2 * (1 + 1e-4)
                assert float(decoded) == pytest.approx(stored_number * scale, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(numbers(65504))
def test_float16_is_rounded_to_nearest_and_float32_is_kept(vectors):
    found, _ = read_back(vectors, "float16")
    np.testing.assert_array_equal(found, vectors.astype(np.float16).astype(np.float32))
    assert np.all(np.abs(found - vectors) <= np.maximum(np.abs(vectors) * 2.0**-11, 2.0**-25))
    np.testing.assert_array_equal(read_back(vectors, "float32")[0], vectors)


def test_a_number_that_float16_cannot_hold_names_its_item_and_the_remedy():
    vectors = np.zeros((3, 2), np.float32)
    vectors[2, 1] = -65519
    assert read_back(vectors, "float16")[0][2, 1] == -65504  # the nearest
    vectors[2, 1] = -65520
    with pytest.raises(InputError, match="vector of user 9 has a number beyond 65,504.*--dtype int8 or float32"):
        encode_vectors(vectors, "float16", "user", np.array([5, 7, 9]))
    for dtype in STORED:
        vectors[1, 0] = np.nan
        with pytest.raises(InputError, match="vector of item 7 is not finite: the checkpoint has diverged"):
            encode_vectors(vectors, dtype, "item", np.array([5, 7, 9]))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("interests", [1, 3])
def test_lists_of_an_export_are_those_of_the_numbers_it_holds(tmp_path: Path, dtype: str, interests: int) -> None:
    rng = np.random.default_rng(0)
    dataset = write_dataset(tmp_path / "data", walks(users=USERS, items=ITEMS), items=ITEMS)
    items = rng.normal(size=(ITEMS, DIM)).astype(np.float32)
    shape = (DIM,) if interests == 1 else (interests, DIM)
    users = rng.normal(size=(USERS, *shape)).astype(np.float32)
    write_export(
        str(tmp_path / "export"),
        dataset,
        items=[(np.arange(ITEMS), items)],
        users=[(np.arange(USERS), users)],
        dim=DIM,
        interests=interests,
        dtype=dtype,
        everyone=True,
        checkpoint="",
        checkpoint_fingerprint="",
        settings={},
    )
    export = open_export(str(tmp_path / "export"))
    assert export.manifest.dtype == dtype and export.manifest.metric == "inner_product"
    _, held = export.item_vectors()
    np.testing.assert_array_equal(held, read_back(items, dtype)[0])
    np.testing.assert_allclose(held, items, atol=0.02)
    (batch,) = export.users()
    np.testing.assert_array_equal(vectors_of(batch), read_back(users, dtype)[0])

    given_options = {"--export": export.path, "--output": tmp_path / "lists", "--k": 5, "--merge": "score"}
    assert stage("retrieve", given_options | {"--interests": 1}) == 0
    lists = pq.read_table(tmp_path / "lists" / "lists").to_pylist()
    first = vectors_of(batch).reshape(USERS, -1, DIM)[:, 0].astype(np.float64)
    for row in lists:
        expected = np.argsort(-(first[row["user_id"]] @ held.astype(np.float64).T), kind="stable")[:5]
        assert row["item_ids"] == expected.tolist()


def test_bytes_of_an_export_follow_the_type(tmp_path: Path) -> None:
    items, dim = 3000, 32
    dataset = write_dataset(tmp_path / "data", walks(users=5, items=items), items=items)
    rng = np.random.default_rng(0)
    sizes = {}
    for dtype in STORED:
        shares = {"items": (items, dim), "users": (5, dim)}
        given_vectors: dict[str, Any] = {
            kind: [(np.arange(shape[0]), rng.normal(size=shape).astype(np.float32))] for kind, shape in shares.items()
        }
        manifest = write_export(
            str(tmp_path / dtype),
            dataset,
            **given_vectors,
            dim=dim,
            interests=1,
            dtype=dtype,
            everyone=True,
            checkpoint="",
            checkpoint_fingerprint="",
            settings={},
        )
        sizes[dtype] = sum(part.bytes for part in manifest.item_parts) / (items * dim)
    assert sizes["float32"] == pytest.approx(4.2, abs=0.3)
    assert sizes["float16"] == pytest.approx(2.2, abs=0.3)
    assert sizes["int8"] == pytest.approx(1.2, abs=0.4)  # Parquet has no type of one byte: a dictionary
