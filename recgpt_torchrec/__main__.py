"""The command `recgpt STAGE OPTIONS`, also `python -m recgpt_torchrec STAGE OPTIONS`: runs a stage by its name."""

import importlib
import sys

from recgpt_torchrec import __version__, cli
from recgpt_torchrec.config.command_line import did_you_mean
from recgpt_torchrec.config.stages import STAGES, module_of


def main() -> None:
    """Run the stage that the first argument names; the other arguments are its options."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"recgpt_torchrec {__version__}")
    elif name not in STAGES:
        cli.refuse("recgpt", f"unknown stage {name}{did_you_mean(name, STAGES)}")
    else:
        sys.argv = [f"recgpt {name}", *arguments]
        cli.run(STAGES[name].config, importlib.import_module(module_of(name)).main, f"recgpt {name}")


def usage() -> str:
    """The text of `recgpt --help`: the stages and their purposes."""
    width = max(map(len, STAGES))
    lines = [f"  {name:{width}}  {stage.purpose}" for name, stage in STAGES.items()]
    return "\n".join(
        [
            "usage: recgpt STAGE [OPTION VALUE ...]",
            "",
            "RecGPT (arXiv 2404.08675) on TorchRec: from an interaction log to lists of items. Stages:",
            "",
            *lines,
            "",
            "recgpt STAGE --help explains each option. python -m recgpt_torchrec.STAGE does the same, and so does",
            "torchx run recgpt_torchrec.STAGE -- OPTIONS, which can also start several processes (-j 1x2).",
        ]
    )


if __name__ == "__main__":
    main()
