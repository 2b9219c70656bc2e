"""The folder kit: manifests read back, parts compared with them, and results compared with what is asked for."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.finished import check_same, differences, find_finished, flatten
from recgpt_torchrec.storage.folders import stage_folder, write_manifest
from recgpt_torchrec.storage.manifests import FolderManifest, Kind
from recgpt_torchrec.storage.parts import Part, write_parts
from recgpt_torchrec.storage.typed import parse_object

PART = "rows/part-00000.parquet"


@dataclass(kw_only=True)
class Boxes(FolderManifest):
    KIND = Kind(name="archive", stage="export", version_field="archive_version", version=3, parts=("rows",))
    archive_version: int = KIND.version
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Part] = field(default_factory=list)


def part_with(**values: Any) -> dict[str, Any]:
    return {"path": PART, "rows": 3, "items": 3, "bytes": 100, "checksum": "0" * 8, **values}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with stage_folder(str(tmp_path / "boxes")) as (fs, root):
        parts = write_parts(fs, root, "rows", [pa.table({"n": [1, 2, 3]})], 1)
        write_manifest(fs, root, Boxes(settings={"k": 1}, rows=parts).to_json())
    return tmp_path / "boxes"


def change(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    kept = {**json.loads(path.read_text()), "checksum": ..., **values}
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not ...}))


def test_a_manifest_is_read_back_as_it_was_written(folder: Path) -> None:
    manifest = Boxes.read(str(folder))
    assert [(part.path, part.rows) for part in manifest.all_parts] == [(PART, 3)]
    assert manifest.size == (folder / PART).stat().st_size
    assert parse_object((folder / "manifest.json").read_text()) == json.loads(manifest.to_json())
    assert Boxes.from_json(manifest.to_json()) == manifest
    manifest.check_parts(str(folder), checksums=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not an archive: it has no manifest.json. Make one with the stage export: .*export --help"),
        (b"{", "manifest.json is not valid JSON .*; run export again"),
        (b"\xff", "manifest.json is not valid JSON .*; run export again"),
        (b"[]", r"manifest.json is not valid JSON \(not an object\); run export again"),
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes | None, message: str) -> None:
    (folder / "manifest.json").unlink() if text is None else (folder / "manifest.json").write_bytes(text)
    with pytest.raises(InputError, match=f"{folder}.*{message}"):
        Boxes.read(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"archive_version": ..., "format_version": 3}, "holds something other than an archive; name another folder"),
        ({"archive_version": 4}, "has archive format version 4, .* version 3; update the program, or run export again"),
        ({"archive_version": 2}, "has archive format version 2, this program reads version 3; run export again"),
        ({"archive_version": "new"}, "has archive format version new, this program reads version 3; run export again"),
        ({"rows": ...}, "manifest.json is damaged: it has no 'rows'; restore it or run export again"),
        ({"rows": 3}, "manifest.json is damaged: .*; restore it or run export again"),
        ({"rows": [{"path": PART}]}, "manifest.json is damaged: .*'checksum'"),
        ({"rows": [part_with(path="../x")]}, "damaged: it lists a part '../x', which is not a path below the folder"),
        ({"rows": [part_with(path="/etc/passwd")]}, "'/etc/passwd', which is not a path below the folder"),
        ({"rows": [part_with(path="rows/../../x")]}, "'rows/../../x', which is not a path below the folder"),
        ({"rows": [part_with(path="rows\\\\x")]}, "which is not a path below the folder"),
        ({"rows": [part_with(path="s3://bucket/x")]}, "'s3://bucket/x', which is not a path below the folder"),
        ({"rows": [part_with(path="")]}, "'', which is not a path below the folder"),
        ({"rows": [part_with(path="rows/x\0")]}, "a text in it has a character that is none"),
        ({"rows": [part_with(rows=2**60)]}, r"rows\[0\].rows is 1152921504606846976, it must be a whole number"),
        ({"rows": [part_with(rows=-1)]}, "rows of rows/part-00000.parquet is -1, it must be a number of at least 0"),
        ({"rows": [part_with(rows=True)]}, r"rows\[0\].rows is True, it must be a whole number"),
        ({"rows": [part_with(rows=3.0)]}, r"rows\[0\].rows is 3.0, it must be a whole number"),
        ({"rows": [part_with(bytes=float("nan"))]}, r"rows\[0\].bytes is nan, it must be a whole number"),
        ({"rows": [part_with(rows=1601)]}, "it promises 1,601 rows in the 100 bytes of rows/part-00000.parquet"),
        ({"rows": [part_with(items=102_401)]}, "it promises 102,401 items in the 100 bytes of rows/part-00000.parquet"),
        ({"rows": [part_with(), part_with()]}, "it lists rows/part-00000.parquet more than once"),
        ({"checksum": "00000000"}, "damaged: its checksum is [0-9a-f]{8}, it promises '00000000'"),
        ({"colour": "red"}, "manifest.json is damaged: .*'colour'"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_with_a_remedy(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    change(folder, **values)
    with pytest.raises(InputError, match=f"{folder}.*{message}"):
        Boxes.read(str(folder))


def test_parts_that_are_missing_or_differ_are_named_or_reported(folder: Path) -> None:
    path, manifest = folder / PART, Boxes.read(str(folder))
    size, whole = manifest.size, path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    manifest.check_parts(str(folder))  # its size is right
    found: list[tuple[str, str]] = []
    reason = rf"is damaged: its checksum is .*, the manifest promises {manifest.rows[0].checksum}"
    with pytest.raises(InputError, match=f"{folder}: the part {PART} {reason}; restore the file or run export again"):
        manifest.check_parts(str(folder), checksums=True)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"is damaged: it has {size - 1} bytes, the manifest promises {size}; restore"):
        manifest.check_parts(str(folder))
    path.unlink()
    with pytest.raises(InputError, match=rf"{PART} is missing \(the manifest promises 3 rows in {size} bytes\); rest"):
        manifest.check_parts(str(folder))
    manifest.check_parts(str(folder), report=lambda part, reason: found.append((part.path, reason)))
    assert found == [(PART, f"is missing (the manifest promises 3 rows in {size} bytes)")]


# ---------------------------------------------------------------------------------------- the very result asked for


def test_nested_values_get_dotted_names() -> None:
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": [3]}, "f": {}}}) == {"a": 1, "b.c": 2, "b.d.e": [3]}


def test_differences_are_those_of_the_values_not_of_their_order_or_nesting() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"b.c": 2, "a": 1}) == []
    found, wanted = {"a": 1, "b": {"c": 2}, "gone": 4}, {"a": 1, "b": {"c": 3}, "new": 5}
    assert differences(found, wanted) == ["b.c: 2 there, 3 now", "new: None there, 5 now", "gone: 4 there, None now"]
    assert differences(found, wanted, ignored=("b.c", "gone")) == ["new: None there, 5 now"]
    assert differences({"a": 1}, {"a": 1, "unset": None}) == []  # an older result does not know the option


def test_a_difference_is_refused_with_every_line_and_the_remedy() -> None:
    check_same("--output x", "archive", [])
    with pytest.raises(InputError) as raised:
        check_same("--output x", "archive", ["k: 1 there, 2 now", "m: 3 there, 4 now"])
    assert str(raised.value) == (
        "--output x holds another archive, made with other options or inputs:\n"
        "  k: 1 there, 2 now\n  m: 3 there, 4 now\n"
        "Nothing was touched; choose another --output"
    )


def find(folder: Path, k: int) -> Boxes | None:
    return find_finished(str(folder), "archive", Boxes.read, lambda boxes: differences(boxes.settings, {"k": k}))


def test_a_finished_folder_is_found_and_a_free_one_is_none(folder: Path, tmp_path: Path) -> None:
    assert find(folder, 1) == Boxes.read(str(folder))
    assert find(tmp_path / "nowhere", 1) is None
    (tmp_path / "empty").mkdir()
    assert find(tmp_path / "empty", 1) is None


def test_a_folder_of_something_else_is_refused_and_not_touched(folder: Path) -> None:
    with pytest.raises(InputError, match="another archive, made with other options or inputs:\n  k: 1 there, 2 now\n"):
        find(folder, 2)
    change(folder, archive_version=..., format_version=1)
    with pytest.raises(InputError, match="holds something other than an archive; name another folder"):
        find(folder, 1)
    (folder / "manifest.json").rename(folder / "thesis.tex")
    with pytest.raises(InputError, match=r"is not a finished archive \(rows, thesis.tex\); nothing was touched"):
        find(folder, 1)
    assert (folder / "thesis.tex").exists() and (folder / PART).exists()
