"""Phases that take far longer than the stall limit: a run goes on while one of its ranks makes progress, no longer."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from recgpt_torchrec.checkpoints import records, safe_reading
from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of
from recgpt_torchrec.config import Saving
from recgpt_torchrec.distributed import initial_values, watchdog
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.distributed.watchdog import Watchdog
from recgpt_torchrec.errors import STALLED
from tools.ranks import RankFailed, run_ranks
from tools.reshard import Layout, build_model

pytestmark = pytest.mark.alone

LIMIT = 2.0
"""Stall limit, in seconds."""
PAUSE = 0.06
"""Seconds that each record takes, and each block of initial values."""


def slow_down(owner: Any, name: str, stall_after: int | None) -> None:
    """Let a function take `PAUSE` more at every call; far longer, at call `stall_after`."""
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def slow(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(60 if calls == stall_after else PAUSE)
        return function(*arguments, **more)

    setattr(owner, name, slow)


def initialise(layout: Layout, folder: str, stall_after: int | None) -> None:
    initial_values.BLOCK_ROWS = 2
    slow_down(initial_values, "_draw", stall_after)
    with Watchdog(folder, LIMIT):
        build_model(layout)
        dist.barrier()


def restore_state(layout: Layout, folder: str, stall_after: int | None) -> None:
    model, optimizer = build_model(layout)
    checkpoints = Checkpoints(folder, keep=1)
    with Saver(checkpoints, Saving(asynchronous=False)) as saver:
        saver.save(1, state_of(model, optimizer), {})
    slow_down(safe_reading._RecordVerifier, "transform_load_stream", stall_after)
    with Watchdog(folder, LIMIT):
        restore(model, optimizer, checkpoints.path(1), 1)
        dist.barrier()


def save_state(layout: Layout, folder: str, stall_after: int | None, asynchronous: bool) -> None:
    model, optimizer = build_model(layout)
    slow_down(records.RecordPlanner, "resolve_data", stall_after)
    with Watchdog(folder, LIMIT), Saver(Checkpoints(folder, keep=1), Saving(asynchronous=asynchronous)) as saver:
        saver.save(1, state_of(model, optimizer), {})
        with watchdog.phase("waiting"):
            saver.finish()
        dist.barrier()


def save_state_asynchronously(layout: Layout, folder: str, stall_after: int | None) -> None:
    save_state(layout, folder, stall_after, asynchronous=True)


def save_state_synchronously(layout: Layout, folder: str, stall_after: int | None) -> None:
    save_state(layout, folder, stall_after, asynchronous=False)


def run(rank: int, world_size: int, do: Callable[..., None], folder: str, stall_after: int | None) -> float:
    """Seconds that the phase takes; the tables are on one rank each, so that the others wait."""
    silence_libraries()
    records.RECORD_BYTES = 2000
    since = time.monotonic()
    do(Layout(world_size, "table_wise", "sgd"), folder, stall_after)
    return time.monotonic() - since


PHASES = [initialise, restore_state, save_state_synchronously, save_state_asynchronously]


@pytest.mark.parametrize("do", PHASES)
def test_a_slow_phase_goes_on_while_it_makes_progress(tmp_path, do):
    for seconds in run_ranks(run, 2, do, str(tmp_path), None):
        assert seconds > 2 * LIMIT


@pytest.mark.parametrize("do", PHASES)
def test_a_phase_that_stalls_ends_the_run(tmp_path, do):
    since = time.monotonic()
    with pytest.raises(RankFailed, match=f"it died with exit code {STALLED}"):
        run_ranks(run, 1, do, str(tmp_path), 4)
    assert time.monotonic() - since < 40  # not the 60 s of the stall
    assert not list(Path(tmp_path).glob("**/checkpoint.json")) or do is restore_state
