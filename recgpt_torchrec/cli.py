"""From a command line to a configuration object, and from a user's mistake to one readable message.

Every stage program is `cli.run(ConfigClass, function)`. Options are the fields of the dataclass, nested fields dotted
(`--model.dim 64`); all of them can also stand in the YAML file of `--config`, and later ones win.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from recgpt_torchrec.config.command_line import Mistake, Words
from recgpt_torchrec.config.fields import options
from recgpt_torchrec.errors import REFUSED, InputError

Config = TypeVar("Config")
RANK_0_SECONDS = 3.0
"""How long another rank waits for rank 0 to say what is wrong with the options."""

# Read by OpenMP when torch is imported, later: how often a thread looks whether the others are done before it sleeps.
# By default it spins for milliseconds, and where other work wants the cores, too, each short operation of a decoder
# may take the scheduler's whole time slices: beside two other busy processes on two cores an epoch took 2 to 18 s, and
# 1.1 s so; on idle cores 0.6 s either way.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """A parser that leaves it to `parse` to say what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the options."""
        if not self.exit_on_error:  # one of jsonargparse's own, for a group
            super().error(message, ex)
        raise Mistake(message)


def parser_for(config_class: type, prog: str) -> ArgumentParser:
    """The parser of one stage: one option a field, explained by the docstring under the field."""
    parser = _Parser(prog=prog, description=config_class.__doc__, exit_on_error=True, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below; options after it override it."
    )
    parser.add_class_arguments(config_class, as_group=False)
    known = {option.name: option for option in options(config_class)}
    resumes = any(name.startswith("saving.") for name in known)
    for action in parser._actions:
        option = known.get(action.dest)
        if option is not None and option.is_list:
            action.option_strings = [f"--{option.name}"]  # without jsonargparse's own --ks+, which appends
            action.metavar = f"{action.dest.rpartition('.')[2].upper()} ..."
        if option is not None and option.may_change and resumes:
            action.help = f"{(action.help or '').rstrip('.')}. A resumed run may change it."
    return parser


def parse(config_class: type[Config], prog: str, arguments: list[str] | None = None) -> Config:
    """Parse `arguments` (default: the process's own) into a `config_class`.

    A list takes one word or several (`--ks 20 50`, `--ks [20,50]`). A mistake ends the process with status 2 and one
    line on standard error; of the ranks of a job, which all have the same options, rank 0 says it.

    Args:
        prog: what the line begins with: `recgpt_torchrec.pretrain`.
    """
    line = Words()
    try:
        line = Words.of(config_class, sys.argv[1:] if arguments is None else arguments)
        parser = parser_for(config_class, f"python -m {prog}" if prog.startswith("recgpt_torchrec.") else prog)
        values = parser.parse_args(line.words)
        values.pop("config", None)
        built: Any = parser.instantiate_classes(values)
        return config_class(**(vars(built) if isinstance(built, Namespace) else built))
    except ValueError as error:  # a Mistake, or what a group's own checks say
        refuse(prog, line.explain(str(error)))


def refuse(prog: str, message: str) -> NoReturn:
    """End with status 2 and, on rank 0, one line; the others wait a moment, as a launcher ends all once one has ended
    and rank 0 may not have said it yet."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(RANK_0_SECONDS)
    else:
        print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(REFUSED)


def run(config_class: type[Config], function: Callable[[Config], None], prog: str) -> None:
    """Run a stage: parse, call, and end with exit status 0 only when the whole result is there.

    An `InputError` becomes one message on standard error and exit status 2 (from the ranks of a distributed job, only
    the first rank that meets it prints it in full).
    """
    config = parse(config_class, prog)
    try:
        function(config)
    except InputError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{prog}: error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(REFUSED) from None
    except OSError as error:  # a disk, a network, a store: what the operating system says is the reason
        where = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{prog}: error{where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on from what is whole", file=sys.stderr)
        raise SystemExit(130) from None
