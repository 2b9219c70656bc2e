"""A process of the GPU check: measures, and writes a JSON line per event to a file descriptor.

`tools.check_gpu` starts it, and ends it at the time limit. A fault on the device ends this process and no other.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tools.gpu import smoke


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["ladder", "smoke"])
    parser.add_argument("--device", required=True)
    parser.add_argument("--events", type=int, required=True, help="file descriptor to write to")
    parser.add_argument("--preset", help="of the ladder")
    parser.add_argument("--skip", type=int, default=0, help="rungs of the ladder that are done already")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()

    def say(event: dict[str, Any]) -> None:
        os.write(options.events, json.dumps(event).encode() + b"\n")

    if options.part == "smoke":
        reason = smoke.missing(options.device)
        if reason is not None:
            say({"reason": reason})
            return
        with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
            for check in smoke.smoke(options.device, Path(folder)):
                say(check)
                if not check["ok"]:
                    output = (Path(folder) / "output.log").read_text(errors="replace")
                    say({"output": output[-2000:]})
                    return
        return
    import torch

    from tools.gpu.ladder import climb
    from tools.gpu.presets import Preset

    if options.device == "cpu":
        torch.set_num_threads(1)
    preset = Preset.load(options.preset)
    seconds = 0.1 if options.toy else 1.5
    for event in climb(
        preset.toy() if options.toy else preset, torch.device(options.device), skip=options.skip, seconds=seconds
    ):
        say(event)


if __name__ == "__main__":
    main()
