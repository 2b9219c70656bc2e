"""Nodes that see different states of the shared disk: rank 0 decides, others wait, nothing half is committed."""

import socket
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.checkpoints import direct_io, folder
from recgpt_torchrec.checkpoints.folder import Checkpoints, find_checkpoint
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.config import Saving
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import visibility
from recgpt_torchrec.storage.visibility import await_files
from tools.ranks import run_ranks


def write_checkpoint(output: Path, step: int) -> str:
    """A committed checkpoint without tensors."""
    path = Path(Checkpoints(str(output), 1).path(step))
    path.mkdir(parents=True)
    (path / folder.METADATA).write_text("{}")
    return str(path)


def find_with_a_stale_listing(rank: int, world_size: int, output: str, looks: int) -> tuple[str, int]:
    """Which checkpoint a rank takes; rank 1 sees none of the files in its first `looks` looks."""
    visibility.WAIT_SECONDS, visibility.AGAIN_SECONDS = 1.0, 0.01
    seen = 0
    is_complete = folder.is_complete

    def stale(checkpoint: str) -> bool:
        nonlocal seen
        seen += 1
        return seen > looks and is_complete(checkpoint)

    if rank == 1:
        folder.is_complete = stale
    try:
        return find_checkpoint(output), seen
    except InputError as error:
        return str(error), seen


def test_a_rank_that_does_not_see_the_checkpoint_yet_waits_for_the_one_that_rank_0_has_found(tmp_path):
    write_checkpoint(tmp_path, 3)
    newest = write_checkpoint(tmp_path, 7)
    found = run_ranks(find_with_a_stale_listing, 2, str(tmp_path), 5)
    assert found == [(newest, 0), (newest, 6)]


def test_a_rank_that_never_sees_it_ends_all_ranks_and_is_named_by_its_host(tmp_path):
    newest = write_checkpoint(tmp_path, 7)
    texts = [text for text, _ in run_ranks(find_with_a_stale_listing, 2, str(tmp_path), 10**9)]
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"{socket.gethostname()} does not see checkpoint.json in {newest}, ")


def save_with_a_lost_mount(rank: int, world_size: int, output: str, elsewhere: str) -> tuple[str, list[str]]:
    """Two checkpoints; of the second rank 1 writes its part to another disk, as where a mount has gone."""
    visibility.WAIT_SECONDS = 1.0
    checkpoints = Checkpoints(output, keep=2)
    saver = Saver(checkpoints, Saving())
    state = {f"own{rank}": torch.full((1000,), float(rank))}
    saver.save(1, state, {})
    saver.finish()
    dist.barrier()
    if rank == 1:
        create, make = direct_io.DirectFiles.create_stream, direct_io.DirectFiles.mkdir

        def moved(path: Any) -> str:
            return str(path).replace(output, elsewhere)

        files: Any = direct_io.DirectFiles
        files.mkdir = lambda self, path: make(self, moved(path))
        files.create_stream = lambda self, path, mode: create(self, moved(path), mode)
        files.rename = lambda self, path, new: Path(moved(path)).rename(moved(new))
    saver.save(2, state, {})
    with pytest.raises(InputError) as failure:
        saver.finish()
    return str(failure.value), checkpoints.list_committed()


def test_a_checkpoint_of_which_one_rank_wrote_to_another_disk_is_not_committed(tmp_path):
    shared, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    for text, committed in run_ranks(save_with_a_lost_mount, 2, str(shared), str(elsewhere)):
        assert committed == [str(shared / "checkpoints" / "step-00000001")]
        assert "does not see __1_0.distcp in" in text and "mounted there on every node" in text
    assert list(elsewhere.rglob("__1_0.distcp"))


def test_files_are_waited_for_until_they_have_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(visibility, "AGAIN_SECONDS", 0.0)
    (tmp_path / "a").write_bytes(b"12345")
    sizes, looks = [("a", 5), ("b", 3)], list[int]()

    def advance() -> None:
        looks.append(len(looks))
        (tmp_path / "b").write_bytes(bytes(len(looks)))

    await_files(pyarrow.fs.LocalFileSystem(), str(tmp_path), sizes, advance)
    assert looks == [0, 1, 2]
    monkeypatch.setattr(visibility, "WAIT_SECONDS", 0.0)
    with pytest.raises(InputError, match="does not see c in "):
        await_files(pyarrow.fs.LocalFileSystem(), str(tmp_path), [("a", 5), ("c", 0)], advance)
