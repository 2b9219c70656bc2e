"""Measures the trainer and the stages against plain ways of doing the same, and against this machine's limits.

    OMP_NUM_THREADS=1 python -m tools.benchmark --data runs/beauty/data --output benchmark.json
    OMP_NUM_THREADS=1 python -m tools.benchmark --data runs/beauty/data --output steps.json --only padded packed floor

Everything runs in one process tree, in turn (a b c, then b c a), and only ratios within a round are compared. A table
shows the median of the rounds with the smallest and the largest; the JSON file has every value, and is there from the
first round on. Run it on an idle machine: about a quarter of an hour with the default sizes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from recgpt_torchrec.distributed.processes import process_group
from tools.benchmarks import attributes, growth, prompts, ranks, reading, stages, steps
from tools.benchmarks.measuring import Kind, Measured, table, take_turns, write
from tools.benchmarks.settings import Settings

KINDS: dict[str, Callable[[Settings], Kind]] = {
    "padded": steps.against_padded,
    "packed": steps.against_packed,
    "floor": steps.floor,
    "stream": reading.stream,
    "ranks": ranks.ranks,
    "attributes": attributes.attributes,
    "candidates": growth.candidates,
    "length": growth.length,
    "catalogue": growth.catalogue,
    "prompts": prompts.prompts,
    "evaluate": stages.evaluate,
    "export": stages.export,
    "epoch": steps.epoch,
}
"""What can be measured; each function says what it compares."""


def main(arguments: list[str] | None = None) -> None:
    """Measure the kinds that were asked for, print the table and write the JSON file."""
    listed = "\n".join(f"  {name:<12}{(make.__doc__ or '').strip().splitlines()[0]}" for name, make in KINDS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nkinds:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of a dataset")
    parser.add_argument("--output", required=True, help="JSON file for the figures")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--quick", action="store_true", help="toy sizes: to see that everything runs")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    torch.set_num_threads(options.threads)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    with process_group(), tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        settings = Settings(options.data, Path(folder), options.quick)
        measured = {}
        for name in options.only:
            say(f"preparing {name}")
            measured[name] = Measured(KINDS[name](settings))
        for number in range(options.rounds):
            take_turns(measured, number, say)
            write(options.output, measured, vars(options))
        print(table(measured), flush=True)
        say(f"written: {options.output}")


if __name__ == "__main__":
    main()
