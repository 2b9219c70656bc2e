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

from recgpt_torchrec.errors import InputError

Config = TypeVar("Config")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parser_for(config_class: type, prog: str) -> ArgumentParser:
    """The parser of one stage: one option a field, explained by the docstring under the field.

    A field whose metadata holds `nargs` takes several values after one option name (`--input a.csv b.csv`).
    """
    parser = ArgumentParser(prog=prog, description=config_class.__doc__, exit_on_error=True)
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the options below; options after it override it."
    )
    several = {f.name: f for f in dataclasses.fields(config_class) if "nargs" in f.metadata}
    parser.add_class_arguments(config_class, skip=set(several))
    for name, field in several.items():
        parser.add_argument(
            f"--{name}", type=str, nargs=field.metadata["nargs"], required=True, help=field.metadata.get("help", "")
        )
    return parser


def parse(config_class: type[Config], prog: str, arguments: list[str] | None = None) -> Config:
    """Parse `arguments` (default: the process's own) into a `config_class`; usage errors exit with status 2."""
    parser = parser_for(config_class, prog)
    values = parser.parse_args(arguments)
    values.pop("config", None)
    built: Any = parser.instantiate_classes(values)
    try:
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
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
