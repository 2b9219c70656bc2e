"""Files written past the page cache hold what plain files would."""

import errno
import fcntl
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt_torchrec.checkpoints import direct_io
from recgpt_torchrec.checkpoints.direct_io import DirectFile

SECTOR = 4096
BLOCK = 2 * SECTOR


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "BLOCK", BLOCK)


def write(path: Path, sizes: list[int]) -> bytes:
    """Write pieces of these sizes to a direct file; returns them one after the other."""
    written = b""
    with DirectFile(path) as file:
        for number, size in enumerate(sizes):
            piece = os.urandom(size)
            assert file.write(memoryview(piece) if number % 2 else piece) == size
            written += piece
            assert file.tell() == len(written)
    return written


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 3 * BLOCK) | st.sampled_from([SECTOR, BLOCK, 2 * BLOCK]), max_size=8))
def test_a_file_holds_the_written_bytes_and_no_rest_of_a_longer_earlier_file(tmp_path: Path, sizes: list[int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100 * SECTOR))
    assert write(path, sizes) == path.read_bytes()


def test_writes_the_buffers_that_pickle_passes(tmp_path: Path) -> None:
    value = {"many": list(range(10_000)), "long": os.urandom(3 * BLOCK)}
    with DirectFile(tmp_path / "file") as file:
        pickle.dump(value, file)
    assert pickle.loads((tmp_path / "file").read_bytes()) == value


def test_writes_are_direct_on_this_disk(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder takes no direct writes")
    with DirectFile(tmp_path / "file") as file:
        file.write(bytes(BLOCK))
        assert fcntl.fcntl(file._handle, fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize("refused", ["open", "write"])
def test_where_direct_writes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    original, refusals = getattr(os, refused), []

    def refuse(what: Any, *rest: Any) -> Any:
        flags = rest[0] if refused == "open" else fcntl.fcntl(what, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            refusals.append(what)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(what, *rest)

    monkeypatch.setattr(os, refused, refuse)
    written = write(tmp_path / "file", [3 * SECTOR, 17, BLOCK])
    monkeypatch.undo()
    assert written == (tmp_path / "file").read_bytes()
    assert len(refusals) == 1


def test_write_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "nowhere" / "file")
    with pytest.raises(ZeroDivisionError), DirectFile(tmp_path / "file") as file:
        file.write(bytes(SECTOR))
        raise ZeroDivisionError
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"), DirectFile(tmp_path / "file") as file:
        file.write(bytes(BLOCK))
    with pytest.raises(OSError, match="No space left"), DirectFile(tmp_path / "file") as file:
        file.write(b"the last piece")
