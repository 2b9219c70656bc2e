"""Runs a stage program: parses its command line into a configuration object, and prints an error as one message.

Every stage program ends in `cli.run(ConfigClass, main, name)`. Options are the fields of the dataclass, nested fields
dotted (`--model.dim 64`). All of them can also be set in a YAML file given as `--config`; later ones override earlier.
"""

import errno
import functools
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from recgpt_torchrec.config.command_line import CommandLine, OptionError
from recgpt_torchrec.config.fields import options, remember_given
from recgpt_torchrec.errors import REFUSED, InputError, OtherRanksError, StorageError
from recgpt_torchrec.launcher import find_processes, own_rank, started_processes
from recgpt_torchrec.progress import is_output_lost, open_streams
from recgpt_torchrec.texts.commands import ALONE, set_form
from recgpt_torchrec.texts.words import is_encodable

Config = TypeVar("Config")
RANK_0_SECONDS = 3.0
"""Seconds that another rank waits before it exits, so that the one that prints the message can do so."""

# OpenMP reads this when torch is imported: how often a waiting thread checks for the others before it sleeps. By
# default it spins for milliseconds. On busy cores each short operation of a decoder may then cost whole time slices of
# the scheduler: next to two other busy processes on two cores an epoch took 2 to 18 s, with this setting 1.1 s. On idle
# cores it took 0.6 s either way.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

set_parsing_settings(docstring_parse_attribute_docstrings=True)
NAMESPACE_MARK = "\u200b"


class _Parser(ArgumentParser):
    """A parser that raises its errors instead of printing them; `parse` prints them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an `OptionError` with the message."""
        if not self.exit_on_error:  # a parser that jsonargparse makes for a group
            super().error(message, ex)
        if message.endswith("expected one argument"):  # nothing follows, or what looks like another option
            option = message.removeprefix("argument ").partition(":")[0]
            message += f"; a value that begins with - is given as {option}=-..."
        raise OptionError(message)


@functools.cache  # its making reads the source of every class of options: 0.1 s, for each stage run in a process
def parser_for(config_class: type, prog: str) -> ArgumentParser:
    """The parser of one stage: one option per field, explained by the docstring under the field."""
    # An example begins like the command that was given.
    about = re.sub(r"Example: recgpt \w+", f"Example: {prog}", config_class.__doc__ or "")
    parser = _Parser(prog=prog, description=about, exit_on_error=True, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file that sets any of the options below; options given after it override it.",
    )
    parser.add_class_arguments(config_class, as_group=False)
    known = {option.name: option for option in options(config_class)}
    can_resume = "saving.keep" in known and known["output"].required  # plan takes options of a run, but makes none
    for action in parser._actions:
        option = known.get(action.dest)
        if option is not None and option.is_list:
            action.option_strings = [f"--{option.name}"]  # without jsonargparse's --ks+, which appends
            action.metavar = f"{action.dest.rpartition('.')[2].upper()} ..."
        if option is not None and option.may_change and can_resume:
            action.help = f"{(action.help or '').rstrip('.')}. A resumed run may change it."
    return parser


def parse(config_class: type[Config], prog: str, arguments: list[str] | None = None) -> Config:
    """Parse a command line into a configuration object.

    A list takes one or several arguments (`--ks 20 50`, `--ks [20,50]`). An error ends the process with status 2 and
    one line on standard error; in a job, whose ranks all have the same options, only rank 0 prints it.

    Args:
        config_class: dataclass of the stage's options.
        prog: the program's name in messages, for example `recgpt_torchrec.pretrain`.
        arguments: without the program's name; None: those of this process.
    """
    line = CommandLine()
    words = sys.argv[1:] if arguments is None else arguments
    if unreadable := [word for word in words if not is_encodable(word)]:  # bytes that Python could not decode
        encoding = sys.getfilesystemencoding()
        locale = "" if encoding == "utf-8" else "set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or "
        refuse(prog, f"{ascii(unreadable[0])} in the command cannot be decoded as {encoding}; {locale}rename the file")
    try:
        line = CommandLine.of(config_class, words)
        return _instantiate(config_class, prog, line)
    except ValueError as error:  # an OptionError, or one of a group's range checks
        refuse(prog, line.explain(str(error)))


def make_config(config_class: type[Config], prog: str, values: Mapping[str, Any]) -> Config:
    """Make a configuration object from dotted names of options and Python values, checked like a command line.

    Args:
        config_class: dataclass of the stage's options.
        prog: the stage's name in messages.
        values: for example `{"data": "data/mine", "train.epochs": 3}`.

    Raises:
        InputError: an option is unknown or missing, or a value is wrong.
    """
    line = CommandLine()
    try:
        line = CommandLine.of(config_class, [word for name, value in values.items() for word in _words(name, value)])
        return _instantiate(config_class, prog, line)
    except ValueError as error:
        raise InputError(f"{prog}: {line.explain(str(error))}") from None


def _words(name: str, value: Any) -> list[str]:
    """An option and its value as a command line has them."""
    if isinstance(value, (list, tuple)):
        return [f"--{name}", json.dumps([each if isinstance(each, (int, float)) else str(each) for each in value])]
    plain = {None: "null", True: "true", False: "false"}
    return [f"--{name}={plain[value] if value is None or isinstance(value, bool) else value}"]


def _instantiate(config_class: type[Config], prog: str, line: CommandLine) -> Config:
    """The configuration object of a checked command line."""
    name = f"python -m {prog}" if prog.startswith("recgpt_torchrec.") else prog
    parser = parser_for(config_class, name)  # type: ignore[arg-type] # mypy takes no type for hashable
    values = parser.parse_args(line.arguments)
    values.pop("config", None)
    built: Any = parser.instantiate(values)
    fields = vars(built) if isinstance(built, Namespace) else built
    # jsonargparse puts a mark before a name that is also a method of its namespaces, such as `items`.
    config = config_class(**{name.lstrip(NAMESPACE_MARK): value for name, value in fields.items()})
    return remember_given(config, {option.name for option, *_ in line.values})


def refuse(prog: str, message: str) -> NoReturn:
    """Print an error on rank 0 and end every rank with status 2.

    The other ranks wait before they end: a launcher kills all ranks once one has ended, and rank 0 may not have printed
    the error yet.
    """
    if own_rank():
        time.sleep(RANK_0_SECONDS)
    else:
        print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(REFUSED)


def is_folder_gone() -> bool:
    """Whether the current folder was removed, so that no relative path means anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _free_groups() -> None:
    """Free the process groups of a job's rank, whose threads then end, while the interpreter still works.

    Models and optimizers refer to each other in circles, so that groups outlived `destroy_process_group` with six to
    nine threads of gloo until the interpreter was taken down; a thread that then asks for the interpreter's lock aborts
    the process. A rank that fails does without: its groups may wait for others. It takes 0.2 to 0.3 s.
    """
    if started_processes() > 1:
        gc.collect()


def run(config_class: type[Config], function: Callable[[Config], None], prog: str) -> None:
    """Run a stage program: parse the command line and call the stage; exit status 0 means the result is complete.

    An `InputError` becomes one message on standard error and exit status 2, an `OSError` one message and status 1.

    Args:
        config_class: dataclass of the stage's options.
        function: the stage.
        prog: the program's name in messages, for example `recgpt_torchrec.pretrain`.
    """
    open_streams()
    set_form(prog)
    config = parse(config_class, prog)
    if (stage := re.split(r"[ .]", prog)[-1]) in ALONE and (started := find_processes()):
        refuse(prog, f"{stage} runs in one process; start it once, without torchrun or with -j 1x1 ({started})")
    try:
        function(config)
        sys.stdout.flush()
        _free_groups()
    except InputError as error:
        if error.is_told:
            time.sleep(RANK_0_SECONDS)
            raise SystemExit(REFUSED) from None
        print(f"{prog}: error{f' (rank {own_rank()})' if own_rank() else ''}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(REFUSED) from None
    except OSError as error:  # a disk, a network or a store failed: the operating system's message says why
        if getattr(error, "is_told", False):
            time.sleep(RANK_0_SECONDS)
            raise SystemExit(1) from None
        place = f"rank {own_rank()}" if started_processes() > 1 else ""
        place = f"on {error.host}" if isinstance(error, OtherRanksError) else place
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, StorageError):  # which names its node
            place, text = "", str(error)
        if isinstance(error, FileNotFoundError) and is_folder_gone():
            text = "the current folder has been removed; change into another one, and give the command again"
        if error.errno in (errno.EPIPE, errno.ENOSPC) and error.filename is None and is_output_lost():
            text = f"standard output cannot be written ({error.strerror}); what should come next is lost"
            if isinstance(error, BrokenPipeError):
                text = "what reads standard output has closed it (head does so); what should come next is lost"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not written at exit
        print(f"{prog}: error{place and f' ({place})'}: {text}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; give the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None
