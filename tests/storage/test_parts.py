"""Parquet parts: a changed byte of a page or footer is an error, files without checksums are read, nothing is run."""

import io
import json
import pickle
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.storage.parts import Part, open_parquet, open_part, without_footers, write_parts
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


def test_a_changed_byte_of_a_footer_is_noticed_before_arrow_parses_it(tmp_path: Path, monkeypatch: Any) -> None:
    """Arrow ends the process on some of them: a size of a histogram that no longer fits, for example."""
    (part,) = write_parts(LOCAL, str(tmp_path), "x", [TABLE], 1)
    path = tmp_path / part.path
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little") + 8
    assert part.footer == f"{zlib.crc32(whole[-length:]):08x}"
    with open_part(LOCAL, str(tmp_path), part) as file:
        assert file.read().equals(TABLE)

    def parse(*_: Any, **__: Any) -> None:
        raise AssertionError("a damaged footer was parsed")

    monkeypatch.setattr(pq, "ParquetFile", parse)
    monkeypatch.setattr(pq, "read_metadata", parse)
    for place in [*range(len(whole) - length, len(whole), 23), len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(OSError, match=f"checksum of its footer is .{{8}}, the manifest promises {part.footer}"):
            open_part(LOCAL, str(tmp_path), part)
    for short in (b"", b"PAR1", whole[-8:]):
        path.write_bytes(short)
        with pytest.raises(OSError, match="checksum of its footer"):
            open_part(LOCAL, str(tmp_path), part)


class CountedFiles:
    """Local files that note how many bytes each read asks for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def open_input_file(self, path: str) -> pa.PythonFile:
        asked = self.asked

        class File(io.FileIO):
            def read(self, size: int | None = -1) -> bytes:
                asked.append(-1 if size is None else size)
                return super().read(size)

        return pa.PythonFile(File(path), mode="r")


@pytest.mark.parametrize(("columns", "requests"), [(3, 1), (700, 2)])
def test_opening_a_part_asks_as_often_as_arrow_does(columns: int, requests: int, tmp_path: Path) -> None:
    """One request, and another where the footer has more than 64 KiB."""
    table = pa.table({f"a column with a name of some length {n}": [n] for n in range(columns)})
    (part,) = write_parts(LOCAL, str(tmp_path), "x", [table], 1)
    counted, plain = CountedFiles(), CountedFiles()
    with open_part(counted, str(tmp_path), part) as file:
        assert file.metadata.num_columns == columns
        asked = [*counted.asked]
        assert file.read().equals(table)
    open_parquet(plain, str(tmp_path / part.path))
    assert len(asked) == len(plain.asked) == requests and sum(asked) <= sum(plain.asked)


def test_a_part_of_an_earlier_version_is_read_and_fingerprints_are_what_they_were(tmp_path: Path) -> None:
    (part,) = write_parts(LOCAL, str(tmp_path), "x", [TABLE], 1)
    earlier = replace(part, footer=None)
    values: dict[str, Any] = {
        "path": part.path,
        "rows": 500,
        "items": 1000,
        "bytes": part.bytes,
        "checksum": part.checksum,
    }
    assert Part(**values) == earlier
    with open_part(LOCAL, str(tmp_path), earlier) as file:
        assert file.read().equals(TABLE)
    for each in (part, earlier):
        assert json.dumps(asdict(each, dict_factory=without_footers)) == json.dumps(values)


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
