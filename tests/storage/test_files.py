"""Small files and temporary folders: what a full disk, a folder that cannot be written and a killed process leave."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec import storage
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.folders import INCOMPLETE, temporary_folder


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path, monkeypatch: Any) -> None:
    path = str(tmp_path / "record.json")
    storage.write(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*record.json'"):
        storage.write(path, b"new")
    assert storage.read(path) == b"old" and os.listdir(tmp_path) == ["record.json"]


def test_an_output_whose_parent_cannot_be_written_is_refused_before_any_work(tmp_path: Path, monkeypatch: Any) -> None:
    """A container's folder, of which the user owns only what is mounted into it."""
    (tmp_path / "out").mkdir()
    own = str(tmp_path / "out")
    monkeypatch.setattr(folders.os, "access", lambda path, mode: str(path) == own)  # root may write anywhere
    with pytest.raises(
        InputError, match=f"{own} is first written .* in {tmp_path}, which cannot .*; name a folder in {own}"
    ):
        folders.check_free(own, "dataset")
    with pytest.raises(InputError, match=f"data is first written .* in {tmp_path}, which cannot be written$"):
        folders.check_free(f"{tmp_path}/new/data", "dataset")
    folders.check_free(f"{own}/data", "dataset")
    folders.check_free(own, "folder of days", in_place=True)
    (tmp_path / "link").symlink_to(f"{own}/data")
    folders.check_free(str(tmp_path / "link"), "dataset")


def test_a_temporary_folder_is_gone_at_the_end_and_so_is_what_a_killed_process_left(tmp_path: Path) -> None:
    left, other = (tmp_path / f".test.parquet.incomplete-{number}" for number in ("x", "y"))
    left.mkdir()
    other.mkdir()
    (left / INCOMPLETE).touch()
    with temporary_folder(f"{tmp_path}/test.parquet") as folder:
        assert os.listdir(folder) == [INCOMPLETE] and not left.exists()
        assert other.exists(), "a folder without the file is not ours"
    assert list(tmp_path.iterdir()) == [other]
    with pytest.raises(KeyError), temporary_folder(f"{tmp_path}/test.parquet") as folder:
        raise KeyError
    assert list(tmp_path.iterdir()) == [other]


def test_temporary_folders_of_many_processes_at_once_keep_apart(tmp_path: Path) -> None:
    """Each deletes what others left, never what they hold: not before they have locked it, nor at their end."""
    code = f"""
from recgpt_torchrec.storage.folders import temporary_folder
for turn in range(200):
    with temporary_folder({str(tmp_path / "test.parquet")!r}) as folder:
        open(f"{{folder}}/own", "w").close()
        assert open(f"{{folder}}/own").read() == ""
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert not list(tmp_path.iterdir())
