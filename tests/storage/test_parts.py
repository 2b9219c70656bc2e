"""Parquet parts: a changed byte of a page is an error, files without page checksums are read, and nothing is run."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.storage.parts import open_parquet, write_parts
from tools.mutations import hostile_pickles

LOCAL = pyarrow.fs.LocalFileSystem()
TABLE = pa.table(
    {"user_id": range(500), "item_ids": [[n, n + 1] for n in range(500)], "key": [f"k{n}" for n in range(500)]}
)


def test_any_changed_byte_of_a_page_is_noticed(tmp_path: Path) -> None:
    (part,) = write_parts(LOCAL, str(tmp_path), "x", [TABLE], 1)
    path = tmp_path / part.path
    whole = path.read_bytes()
    with open_parquet(LOCAL, str(path)) as file:
        assert file.read().equals(TABLE)
        metadata = file.metadata.row_group(0)
        chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    for chunk in chunks:
        end = chunk.data_page_offset + chunk.total_compressed_size
        if chunk.has_dictionary_page:
            end = chunk.dictionary_page_offset + chunk.total_compressed_size
        for place in range(end - 40, end, 7):  # the end of the page: behind its header
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with (
                pytest.raises(OSError, match="CRC checksum verification failed"),
                open_parquet(LOCAL, str(path)) as file,
            ):
                file.read(use_threads=False)


def test_a_file_without_page_checksums_is_read(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "old.parquet", compression="zstd")
    with open_parquet(LOCAL, str(tmp_path / "old.parquet")) as file:
        assert file.read().equals(TABLE)


def test_a_name_that_is_not_utf_8_is_an_error_like_any_other(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1], "nnn": [2]}), tmp_path / "x.parquet", store_schema=False)
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes().replace(b"nnn", b"n\xffn"))
    with pytest.raises(OSError, match="a name in its footer is not UTF-8"):
        open_parquet(LOCAL, str(tmp_path / "x.parquet"))


def test_a_type_that_is_named_in_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    """Before version 14 Arrow unpickled such types; it must stay switched off."""
    hostile = hostile_pickles(f"{tmp_path}/canary")["global"]
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": hostile}
    schema = pa.schema([pa.field("user_id", pa.int64(), metadata=extension)])
    pq.write_table(pa.table({"user_id": [1, 2]}, schema=schema), tmp_path / "x.parquet")
    with open_parquet(LOCAL, str(tmp_path / "x.parquet")) as file:
        assert file.read().column(0).to_pylist() == [1, 2]
    assert not (tmp_path / "canary").exists()
    pickle.loads(hostile)
    assert (tmp_path / "canary").exists()
