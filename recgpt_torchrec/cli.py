"""From a command line to a configuration object, and from a user's mistake to one readable message.

Every stage program is `cli.run(ConfigClass, function)`. Options are the fields of the dataclass, nested fields dotted
(`--model.dim 64`); all of them can also stand in the YAML file of `--config`, and later ones win.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from recgpt_torchrec.config.fields import options
from recgpt_torchrec.errors import InputError

Config = TypeVar("Config")

# Read by OpenMP when torch is imported, later: how often a thread looks whether the others are done before it sleeps.
# By default it spins for milliseconds, and where other work wants the cores, too, each short operation of a decoder
# may take the scheduler's whole time slices: beside two other busy processes on two cores an epoch took 2 to 18 s, and
# 1.1 s so; on idle cores 0.6 s either way.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parser_for(config_class: type, prog: str) -> ArgumentParser:
    """The parser of one stage: one option a field, explained by the docstring under the field.

    A field whose metadata holds `nargs` takes several values after one option name (`--input a.csv b.csv`); in YAML it
    is a list, or one value.
    """
    parser = ArgumentParser(prog=prog, description=config_class.__doc__, exit_on_error=True, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below; options after it override it."
    )
    several = _several(config_class)
    for name, field in several.items():
        help_text = field.metadata.get("help", "")
        parser.add_argument(f"--{name}", nargs=field.metadata["nargs"], required=True, help=help_text)
    parser.add_class_arguments(config_class, skip=set(several), as_group=False)
    if any(field.name == "saving" for field in dataclasses.fields(config_class)):  # of a stage that resumes a run
        changeable = {option.name for option in options(config_class) if option.may_change}
        for action in parser._actions:
            if action.dest in changeable:
                action.help = f"{(action.help or '').rstrip('.')}. A resumed run may change it."
    return parser


def _several(config_class: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields that take several values."""
    return {field.name: field for field in dataclasses.fields(config_class) if "nargs" in field.metadata}


def parse(config_class: type[Config], prog: str, arguments: list[str] | None = None) -> Config:
    """Parse `arguments` (default: the process's own) into a `config_class`; usage errors exit with status 2."""
    parser = parser_for(config_class, prog)
    values = parser.parse_args(arguments)
    values.pop("config", None)
    for name in _several(config_class):
        given = [values[name]] if isinstance(values[name], str) else values[name]
        if not isinstance(given, list) or not given or not all(isinstance(value, str) for value in given):
            parser.error(f'Parser key "{name}": expected one or more strings, got {values[name]!r}')
        values[name] = given
    try:
        built: Any = parser.instantiate_classes(values)
        return config_class(**(vars(built) if isinstance(built, Namespace) else built))
    except ValueError as error:
        parser.error(str(error))


def run(config_class: type[Config], function: Callable[[Config], None], prog: str) -> None:
    """Run a stage: parse, call, and end with exit status 0 only when the whole result is there.

    An `InputError` becomes one message on standard error and exit status 2 (from the ranks of a distributed job, only
    the first rank that meets it prints it in full).
    """
    config = parse(config_class, f"python -m {prog}")
    try:
        function(config)
    except InputError as error:
        rank = os.environ.get("RANK", "0")
        print(f"{prog}: error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except OSError as error:  # a disk, a network, a store: what the operating system says is the reason
        where = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{prog}: error{where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on from what is whole", file=sys.stderr)
        raise SystemExit(130) from None
