"""Reads a command line and its YAML files, and checks the names and values against the options of a stage.

An error is one line, with the nearest name where a name is unknown. This file knows nothing of ranks, exit statuses or
jsonargparse, which parses the checked arguments.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from recgpt_torchrec.config.fields import Option, current_name, options

YAML_CHARACTERS = 2**20
"""Maximum length of a file of options."""
HELP = ("-h", "--help", "--print_config")
"""Arguments that print something instead of running the stage; with one of them no option is required."""


class OptionError(ValueError):
    """The options are wrong; the message is one line for the user."""


class _PlainLoader(yaml.SafeLoader):
    """Loads plain values only: `SafeLoader` makes no objects, and here no value stands for another.

    With aliases, a short file can stand for more values than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose the next value, which must be written out."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Make a value, in which no character may be written that no file name and no terminal takes."""
        if isinstance(node.value, str) and _is_broken(node.value):
            raise yaml.MarkedYAMLError(problem="a value has a character that is none", problem_mark=node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dict of a group of options, each of which must be named once."""
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in names:
                problem = f"{key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


def _is_broken(text: str) -> bool:
    """Whether a text has a NUL or half a character, which an escape can write."""
    return any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


@dataclass
class CommandLine:
    """A checked command line: all names are known, and the content of each `--config` file replaces its path.

    Example: `CommandLine.of(Pretrain, ["--config", "mine.yaml", "--model.dim", "64"]).arguments`
    """

    arguments: list[str] = field(default_factory=list)
    """For jsonargparse, which reads a list from one argument: `[20, 50]`."""
    values: list[tuple[Option, str, Any]] = field(default_factory=list)
    """The values given: the option, its name for messages, and the value; a string if it is from the command line."""
    asks_for_help: bool = False
    """Whether one of the arguments prints something instead of running the stage."""

    @classmethod
    def of(cls, config_class: type, given: list[str]) -> "CommandLine":
        """Read and check a command line.

        Args:
            config_class: dataclass of the stage's options.
            given: the arguments, without the program's name.

        Raises:
            OptionError: an option is unknown, missing, or has no value or too many; a file cannot be read.
        """
        known = {option.name: option for option in options(config_class)}
        groups = groups_of(known)
        given, rest = _split_at_dashes(given, known)
        line, remaining = cls(), _name_leading(given, known)
        while remaining:
            argument = remaining.pop(0)
            name, equals, text = argument.removeprefix("--").partition("=")
            if argument.partition("=")[0] in HELP or name.endswith(".help"):
                line.asks_for_help = True
                line.arguments.append(argument)
                continue
            if not argument.startswith("--"):
                previous = f" after {line.arguments[-2]}" if len(line.arguments) > 1 else ""
                how = "an option begins with -- and takes one value, quoted where it has spaces"
                raise OptionError(f"unexpected {argument!r}{previous}; {how}")
            option = known.get(name)
            if option is None and name != "config" and name not in groups:
                raise OptionError(f"unknown option --{name}{did_you_mean(name, known, '--')}")
            values = [text] if equals else []
            while not equals and remaining and not (remaining[0].startswith("--") or remaining[0] in HELP):
                values.append(remaining.pop(0))
                if option is None or not option.is_list:
                    break
            if not values:
                raise OptionError(f"--{name} needs a value")
            if name == "config":
                line._add_file(values[0], known, groups)
            elif name in groups:
                line._add_file(values[0], known, groups, below=name)
            elif option is not None and option.is_list:
                entries = [whole_number(option.type, entry) for entry in _as_list(values)]
                line.values.append((option, f"--{name}", entries))
                line.arguments += [f"--{name}", yaml.safe_dump(entries, default_flow_style=True, width=10**9).strip()]
            else:
                value = values[0]
                if option is not None:
                    value = str(whole_number(option.type, value))
                    line.values.append((option, f"--{name}", value))
                line.arguments += [f"--{name}", value]
        for option, words in rest:
            line.values.append((option, f"--{option.name}", words))
            line.arguments += [f"--{option.name}", yaml.safe_dump(words, default_flow_style=True, width=10**9).strip()]
        given_names = {option.name for option, *_ in line.values}
        missing = [f"--{name}" for name, option in known.items() if option.required and name not in given_names]
        if missing and not line.asks_for_help:
            raise OptionError(f"{', '.join(missing)} must be given")
        return line

    def _add_file(self, path: str, known: dict[str, Option], groups: set[str], below: str | None = None) -> None:
        """Add the values of a file: those of all options, or of the group `below`."""
        values = values_of(path) if below is None else {below: values_of(path)}
        for given in groups & values.keys():
            nullable = any(option.in_nullable_group for name, option in known.items() if name.startswith(f"{given}."))
            if not isinstance(values[given], dict) and not (nullable and values[given] is None):
                raise OptionError(
                    f"{path}: {given} is {values[given]!r}, but it is a group of options; write its options below it, "
                    f"like {next(name for name in known if name.startswith(f'{given}.'))}"
                )
        for name, group, key in _leaves(values):
            if name in known and not (isinstance(group[key], dict) and current_name(f"{name}.") != f"{name}."):
                if known[name].is_list and not isinstance(group[key], list):
                    group[key] = [group[key]]
                each = group[key]
                if isinstance(each, list):
                    group[key] = [whole_number(known[name].type, entry) for entry in each]
                else:
                    group[key] = whole_number(known[name].type, each)
                if group[key] is None and not fits(known[name].type, None):  # which jsonargparse takes for any type
                    raise OptionError(f"{path}: {name} is null; it must be {describe_type(known[name].type)}")
                self.values.append((known[name], f"{path}: {name}", group[key]))
            elif name not in groups:
                raise OptionError(f"{path}: unknown option {name}{did_you_mean(name, [*known, *groups])}")
        self.arguments += ["--config", yaml.safe_dump(values, sort_keys=False)]

    def explain(self, problem: str) -> str:
        """Shorten an error message about the options to one line.

        The line is the first of these that applies: the message of a range check (for a group that may be null,
        jsonargparse adds text around it), the first value that is not of its option's type, or the whole message.

        Args:
            problem: message of jsonargparse or of a configuration class.
        """
        lines = [text.strip().removeprefix("- ") for text in problem.splitlines()]
        if range_check := next((text for text in lines if text.startswith("--")), None):
            return range_check
        for option, name, value in self.values:
            if not fits(option.type, value):
                shown = " ".join(map(str, value)) if isinstance(value, list) and name.startswith("--") else value
                return f"{name} is {shown}; it must be {describe_type(option.type)}"
        return " ".join(problem.split())


def _split_at_dashes(given: list[str], known: dict[str, Option]) -> tuple[list[str], list[tuple[Option, list[str]]]]:
    """The arguments before --, and the option that takes those after it with them, if there is one."""
    option = next((option for option in known.values() if option.is_after_dashes), None)
    if option is None or "--" not in given:
        return given, []
    place = given.index("--")
    return given[:place], [(option, given[place + 1 :])]


def _name_leading(given: list[str], known: dict[str, Option]) -> list[str]:
    """The arguments, with the name of the option before values that come first without it."""
    name = next((option.name for option in known.values() if option.is_leading), None)
    if name is None or not given or given[0].startswith("-"):
        return list(given)
    return [f"--{name}", *given]


def values_of(path: str | os.PathLike[str], included_from: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file of options, on top of those of the file that it names as `config`, if any.

    A value of the file replaces the other's of the same name; so does a group (`model`, ...), as a whole.

    Args:
        path: of the file; `config` in it is relative to its folder.
        included_from: absolute paths of the files that led to this one.

    Raises:
        OptionError: a file cannot be read, is not YAML or holds no options, or includes itself.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(YAML_CHARACTERS + 1)
        if len(text) > YAML_CHARACTERS:
            raise OptionError(f"--config {path} has more than {YAML_CHARACTERS:,} characters; no file of options has")
        values = yaml.load(text, _PlainLoader) or {}
    except FileNotFoundError:
        raise OptionError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OptionError(f"--config {path}{line} is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise OptionError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise OptionError(f"--config {path} is nested too deeply") from None
    except ValueError as error:  # a number or a date that is none
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"--config {path} holds a value that cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} holds no options; write them as lines like seed: 1")
    base = values.pop("config", None)
    if base is None:
        return values
    if os.path.abspath(path) in included_from:
        raise OptionError(f"--config {path} names itself as config, directly or through others")
    base_values = values_of(os.path.join(os.path.dirname(path), str(base)), (*included_from, os.path.abspath(path)))
    return {**base_values, **values}


def groups_of(names: Iterable[str]) -> set[str]:
    """The groups that dotted names lie in: `a` and `a.b` for `a.b.c`."""
    return {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known names, or a hint at `--help`.

    Args:
        name: the unknown name.
        names: the known names.
        prefix: put before each name that is suggested.
    """
    suggestions = nearest(name, list(names))
    if not suggestions:
        return "; --help lists all"
    return f"; did you mean {' or '.join(prefix + suggestion for suggestion in suggestions)}?"


def nearest(name: str, names: list[str]) -> list[str]:
    """Known names that an unknown name may stand for, at most three.

    In this order: its current name if it was renamed, a very similar name, names with the same or a similar last part,
    a similar name.
    """
    name = name.replace("-", "_")
    for renamed in (current_name(name), current_name(f"{name}.").removesuffix(".")):
        if renamed != name and renamed in names:
            return [renamed]
    by_last_part: dict[str, list[str]] = {}
    for known in names:
        by_last_part.setdefault(known.rpartition(".")[2], []).append(known)
    last_part = name.rpartition(".")[2]
    if matches := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return matches
    if last_part in by_last_part:
        return by_last_part[last_part][:3]
    if matches := difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=0.75):
        return by_last_part[matches[0]][:3]
    return difflib.get_close_matches(name, names, n=1, cutoff=0.6)


def fits(kind: Any, value: Any) -> bool:
    """Whether a value from a command line or a YAML file is of an option's type."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(fits(member, value) for member in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(fits(get_args(kind)[0], each) for each in value)
    if kind is NoneType:
        return value in (None, "null")
    if kind is bool:
        return str(value).lower() in ("true", "false")
    if kind in (int, float):
        try:
            return not isinstance(value, bool) and kind(str(value)) is not None
        except ValueError:
            return False
    return isinstance(value, str)


def whole_number(kind: Any, value: Any) -> Any:
    """A value of an option that takes whole numbers, written out: 100000000 for `1e8`; other values as they are.

    Args:
        kind: the option's type; only whole numbers, alone, in a list or beside other types, are written out.
        value: text of a command line, or a value of a YAML file, which reads 1.0e+8 as a fraction.
    """
    members = get_args(kind) if get_origin(kind) in (list, Union, UnionType) else (kind,)
    if int not in members or float in members or not isinstance(value, str | float):
        return value
    try:
        number = Decimal(str(value).strip())
        return int(number) if abs(number) < 2**63 and number == number.to_integral_value() else value
    except InvalidOperation:  # no number, or none that is finite
        return value


def describe_type(kind: Any, several: bool = False) -> str:
    """An option's type in words that follow "it must be": `a whole number`, `one of all, new`.

    Args:
        kind: the type.
        several: whether the words are in the plural.
    """
    origin, s = get_origin(kind), "s" if several else ""
    if origin in (Union, UnionType):
        return " or ".join(describe_type(member) for member in get_args(kind))
    if origin is Literal and len(get_args(kind)) == 1:
        return str(get_args(kind)[0])
    if origin is Literal:
        return f"{'' if several else 'one '}of {', '.join(map(str, get_args(kind)))}"
    if origin is list:
        return f"one or more {describe_type(get_args(kind)[0], several=True)}"
    names = {int: "whole number", float: "number", str: "string"}
    if kind in names:
        return f"{'' if several else 'a '}{names[kind]}{s}"
    return "null" if kind is NoneType else "true or false"


def _as_list(values: list[str]) -> list[Any]:
    """The entries of a list that is given as `20 50` or `[20, 50]`."""
    entries: Any = values
    if len(values) == 1 and values[0].startswith("["):
        try:
            entries = yaml.safe_load(values[0])
        except yaml.YAMLError:
            pass  # the name of a file may begin with [
    return entries if isinstance(entries, list) else values


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Dotted name, enclosing group and key of every value and group; a group comes before what is in it."""
    for key, value in list(values.items()):
        yield f"{prefix}{key}", values, key
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
