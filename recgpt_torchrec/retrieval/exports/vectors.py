"""Columns of vectors in the three types of `--dtype`: encodes float32 into them, and decodes them.

    float32   vector fixed_size_list<float>[dim]
    float16   vector fixed_size_list<halffloat>[dim]
    int8      vector fixed_size_list<int8>[dim] and scale float; a number is its int8 times the scale of its vector

With several interests `vectors` has a list of each kind of list, and `scales` fixed_size_list<float>[interests].
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.errors import InputError

STORED: dict[str, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
"""Arrow type of the stored numbers, by dtype."""
LARGEST_INT8 = 127


def vector_columns(dtype: str, dim: int, interests: int) -> dict[str, pa.DataType]:
    """Names and types of the columns that hold vectors.

    Args:
        dtype: a key of `STORED`.
        dim: length of a vector.
        interests: number of vectors per row.
    """
    vector = pa.list_(STORED[dtype], dim)
    columns = {"vector": vector} if interests == 1 else {"vectors": pa.list_(vector, interests)}
    if dtype == "int8":
        scale = pa.float32()
        columns |= {"scale": scale} if interests == 1 else {"scales": pa.list_(scale, interests)}
    return columns


def parquet_options(dtype: str, id_column: str, interests: int) -> dict[str, Any]:
    """Options of `ParquetWriter` for rows with an id, a key and vectors.

    Random numbers do not get smaller for what compression costs: 500,000 rows of dim 64 took with zstd and without
    .76 and .55 s in float32 (119 and 131 MB), .86 and .75 s in float16 (60 and 67 MB). Byte streams split were no
    faster, and fewer programs read them. Parquet has no type of one byte: int8 takes 4 bytes a number without a
    dictionary (1.35 s, 131 MB), 1 with it (.8 s, 31 MB). A dictionary of keys, which do not repeat, cost a tenth.
    Statistics are for the ids alone: a row group is found by them.
    """
    vector = "vector.list.element" if interests == 1 else "vectors.list.element.list.element"
    small = dtype == "int8"
    scales = {"scale" if interests == 1 else "scales.list.element": "none"} if small else {}
    return {
        "compression": {id_column: "zstd", "key": "zstd", vector: "zstd" if small else "none", **scales},
        "use_dictionary": [vector] if small else False,
        "write_statistics": [id_column],
    }


def vectors_of(batch: pa.RecordBatch | pa.Table) -> Float32:
    """The vectors of a batch's rows as float32, whatever type they are stored in.

    Returns:
        [rows, dim] of a column `vector`, [rows, interests, dim] of a column `vectors`.
    """
    several = "vectors" in batch.schema.names
    numbers = _to_numpy(batch["vectors" if several else "vector"])
    if numbers.dtype == np.int8:
        return numbers * _to_numpy(batch["scales" if several else "scale"])[..., None]
    return numbers.astype(np.float32, copy=False)


def encode_vectors(vectors: Float32, dtype: str, name_row: str, ids: Int64) -> dict[str, pa.Array]:
    """The columns of `vector_columns` for some vectors.

    Args:
        vectors: [rows, dim], or [rows, interests, dim], float32.
        dtype: a key of `STORED`.
        name_row: what a row is, for messages: `item` or `user`.
        ids: [rows] int64, for messages.

    Raises:
        InputError: a number is not finite, or too large for float16; names the first row.
    """
    _refuse(
        ~np.isfinite(vectors),
        ids,
        f"the vector of {name_row} {{}} is not finite: the checkpoint has diverged; export an earlier one, or train "
        "again with a smaller learning rate",
    )
    end = "s" if vectors.ndim == 3 else ""
    if dtype == "int8":
        # Rounded to nearest: the error is at most half a scale. The least normal number as a scale of zero vectors and
        # of those whose scale would be subnormal, so that nothing is divided by 0.
        largest = np.maximum(vectors.max(axis=-1), -vectors.min(axis=-1))
        scales = np.maximum(largest / np.float32(LARGEST_INT8), np.finfo(np.float32).tiny)
        quotients = vectors / scales[..., None]
        numbers = np.rint(quotients, out=quotients).astype(np.int8)
        return {f"vector{end}": _to_lists(numbers), f"scale{end}": _to_lists(scales)}
    if dtype == "float16":
        with np.errstate(over="ignore"):
            numbers = vectors.astype(np.float16)
        _refuse(
            np.isinf(numbers),
            ids,
            f"the vector of {name_row} {{}} has a number beyond 65,504, the largest of float16; export with --dtype "
            "int8 or float32",
        )
        return {f"vector{end}": _to_lists(numbers)}
    return {f"vector{end}": _to_lists(vectors)}


def _refuse(wrong: npt.NDArray[np.bool_], ids: Int64, message: str) -> None:
    """Raise an `InputError` that names the first row with a wrong number, if there is one."""
    if wrong.any():
        row = int(np.argmax(wrong.reshape(len(ids), -1).any(axis=1)))
        raise InputError(message.format(ids[row]))


def _to_lists(values: npt.NDArray[Any]) -> pa.Array:
    """[rows, ...] as a column of nested lists of fixed sizes; [rows] as a plain column."""
    column: pa.Array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for length in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, length)
    return column


def _to_numpy(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of nested lists of fixed sizes as [rows, ...] numbers."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    shape = [len(column)]
    while pa.types.is_fixed_size_list(column.type):
        shape.append(column.type.list_size)
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(shape)
