"""The program of a rank: a stage, which stops itself (SIGSTOP) at a moment, until the tool lets it go on."""

import ctypes
import glob
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

WRITING = "writing a checkpoint"
JOINING = "joining"
PR_SET_PDEATHSIG = 1


def stop_at(watchdog: Any, moment: dict[str, Any], output: str) -> None:
    """Stop this process at the moment; runs in a thread."""
    pattern, phase = os.path.join(output, "checkpoints", "step-*.tmp"), moment["phase"]
    left, previous = moment.get("occurrence", 1), None
    while left:
        status = watchdog.current_status()
        reached = bool(glob.glob(pattern)) if phase == WRITING else status.phase == phase
        current = (reached, status.since if phase != WRITING else 0.0)
        left -= reached and current != previous
        previous = current
        time.sleep(0.0005)
    pause(moment["mark"], f"{status.phase}, after step {status.step}")


def pause(mark: str, place: str) -> None:
    """Write down where this process is, and stop it."""
    with open(f"{mark}.tmp", "w") as file:
        json.dump({"pid": os.getpid(), "place": place}, file)
    os.rename(f"{mark}.tmp", mark)
    os.kill(os.getpid(), signal.SIGSTOP)


def run_stage(moment: str, stage: str, *words: str) -> None:
    """Run a stage as one rank.

    Args:
        moment: JSON values of when this process stops itself; empty: never.
        stage: its name.
        words: its options.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # where this process is a fork, those of the launcher
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
    from recgpt_torchrec import cli
    from recgpt_torchrec.config.stages import STAGES, module_of
    from recgpt_torchrec.distributed import watchdog

    stops = json.loads(moment)
    if stops.get("rank") == int(os.environ["RANK"]):
        if stops["phase"] == JOINING:
            pause(stops["mark"], JOINING)
        else:
            output = words[words.index("--output") + 1] if "--output" in words else ""
            threading.Thread(target=stop_at, args=(watchdog, stops, output), daemon=True).start()
    sys.argv = [stage, *words]
    try:
        cli.run(STAGES[stage].config, importlib.import_module(module_of(stage)).main, module_of(stage))
    except Exception:
        traceback.print_exc()  # torch would not
        sys.exit(1)


if __name__ == "__main__":
    run_stage(*sys.argv[1:])
