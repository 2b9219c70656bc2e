"""The words of a command line and the values of YAML files, checked against the options of a stage.

What is wrong is said in one line, with the nearest name. It knows nothing of ranks, exit statuses and jsonargparse,
which takes the words from here.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from recgpt_torchrec.config.fields import Option, current_name, options

HELP = ("-h", "--help", "--print_config")
"""What is asked for instead of a run; then no option is required."""


class Mistake(ValueError):
    """What is wrong with the options, in one line for the user."""


@dataclass
class Words:
    """A command line whose names are all known, with the files of `--config` in place of their names.

    Example: `Words.of(Pretrain, ["--config", "mine.yaml", "--model.dim", "64"]).words`
    """

    words: list[str] = field(default_factory=list)
    """As jsonargparse reads them: a list is one word, `[20, 50]`."""
    values: list[tuple[Option, str, Any]] = field(default_factory=list)
    """What was given: the option, its name as a message names it, and the value, a string where it is a word."""
    asks_for_help: bool = False

    @classmethod
    def of(cls, config_class: type, given: list[str]) -> "Words":
        """Read a command line.

        Raises:
            Mistake: an option does not exist, has no value or too many, or is missing; a file cannot be read.
        """
        known = {option.name: option for option in options(config_class)}
        groups = groups_of(known)
        line, left = cls(), list(given)
        while left:
            word = left.pop(0)
            name, equals, text = word.removeprefix("--").partition("=")
            if word.partition("=")[0] in HELP or name.endswith(".help"):
                line.asks_for_help = True
                line.words.append(word)
                continue
            if not word.startswith("--"):
                before = f" after {line.words[-2]}" if len(line.words) > 1 else ""
                raise Mistake(f"unexpected {word!r}{before}; an option begins with -- and takes one value")
            option = known.get(name)
            if option is None and name != "config" and name not in groups:
                raise Mistake(f"unknown option --{name}{did_you_mean(name, known, '--')}")
            values = [text] if equals else []
            while not equals and left and not (left[0].startswith("--") or left[0] in HELP):
                values.append(left.pop(0))
                if option is None or not option.is_list:
                    break
            if not values:
                raise Mistake(f"--{name} needs a value")
            if name == "config":
                line._add_file(values[0], known, groups)
            elif option is not None and option.is_list:
                entries = _as_list(values)
                line.values.append((option, f"--{name}", entries))
                line.words += [f"--{name}", yaml.safe_dump(entries, default_flow_style=True, width=10**9).strip()]
            else:
                if option is not None:
                    line.values.append((option, f"--{name}", values[0]))
                line.words += [f"--{name}", values[0]]
        there = {option.name for option, *_ in line.values}
        if missing := [f"--{name}" for name, option in known.items() if option.required and name not in there]:
            if not line.asks_for_help:
                raise Mistake(f"{', '.join(missing)} must be given")
        return line

    def _add_file(self, path: str, known: dict[str, Option], groups: set[str]) -> None:
        values = values_of(path)
        for name, group, key in _leaves(values):
            if name in known and not (isinstance(group[key], dict) and current_name(f"{name}.") != f"{name}."):
                if known[name].is_list and not isinstance(group[key], list):
                    group[key] = [group[key]]
                self.values.append((known[name], f"{path}: {name}", group[key]))
            elif name not in groups:
                raise Mistake(f"{path}: unknown option {name}{did_you_mean(name, [*known, *groups])}")
        self.words += ["--config", yaml.safe_dump(values, sort_keys=False)]

    def explain(self, problem: str) -> str:
        """One line for what was refused: what the options' own checks say (of a group that may be null, among other
        words), the first value that is not of its option's type, or jsonargparse's words."""
        lines = [text.strip().removeprefix("- ") for text in problem.splitlines()]
        if own := next((text for text in lines if text.startswith("--")), None):
            return own
        for option, name, value in self.values:
            if not fits(option.type, value):
                shown = " ".join(map(str, value)) if isinstance(value, list) and name.startswith("--") else value
                return f"{name} is {shown}; it must be {in_words(option.type)}"
        return " ".join(problem.split())


def values_of(path: str | os.PathLike[str], within: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file of options, and of the file that it names as `config` beside it; a group (`model`, ...)
    that both have is the first one's alone.

    Raises:
        Mistake: one of them cannot be read as that.
    """
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except FileNotFoundError:
        raise Mistake(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Mistake(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise Mistake(f"--config {path}{line} is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise Mistake(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise Mistake(f"--config {path} holds no options; a line of it is like seed: 1")
    base = values.pop("config", None)
    if base is None:
        return values
    if os.path.abspath(path) in within:
        raise Mistake(f"--config {path} names itself as config, directly or through others")
    below = values_of(os.path.join(os.path.dirname(path), str(base)), (*within, os.path.abspath(path)))
    return {**below, **values}


def groups_of(names: Iterable[str]) -> set[str]:
    """Every group that dotted names lie in."""
    return {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest ones of those there are, if any is near."""
    near = nearest(name, list(names))
    return f"; did you mean {' or '.join(prefix + each for each in near)}?" if near else "; --help lists all"


def nearest(name: str, names: list[str]) -> list[str]:
    """Names that may have been meant: what a renamed one is now, those with the same last word, else the most alike."""
    name = name.replace("-", "_")
    for now in (current_name(name), current_name(f"{name}.").removesuffix(".")):
        if now != name and now in names:
            return [now]
    ends: dict[str, list[str]] = {}
    for each in names:
        ends.setdefault(each.rpartition(".")[2], []).append(each)
    end = name.rpartition(".")[2]
    if alike := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return alike
    if end in ends:
        return ends[end][:3]
    if alike := difflib.get_close_matches(end, ends, n=1, cutoff=0.75):
        return ends[alike[0]][:3]
    return difflib.get_close_matches(name, names, n=1, cutoff=0.6)


def fits(kind: Any, value: Any) -> bool:
    """Whether a value, a word of a command line or of YAML, is of the type of an option."""
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


def in_words(kind: Any, several: bool = False) -> str:
    """What values of a type are, after "it must be"."""
    origin, s = get_origin(kind), "s" if several else ""
    if origin in (Union, UnionType):
        return " or ".join(in_words(member) for member in get_args(kind))
    if origin is Literal:
        return f"{'' if several else 'one '}of {', '.join(map(str, get_args(kind)))}"
    if origin is list:
        return f"one or more {in_words(get_args(kind)[0], several=True)}"
    names = {int: "whole number", float: "number", str: "string"}
    if kind in names:
        return f"{'' if several else 'a '}{names[kind]}{s}"
    return "null" if kind is NoneType else "true or false"


def _as_list(values: list[str]) -> list[Any]:
    """Words as the entries of a list, `20 50` or `[20, 50]`."""
    entries: Any = values
    if len(values) == 1 and values[0].startswith("["):
        try:
            entries = yaml.safe_load(values[0])
        except yaml.YAMLError:
            pass  # a file's name may begin so
    return entries if isinstance(entries, list) else values


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each value of nested ones, groups before what is in them: its dotted name, the group it lies in, its key."""
    for key, value in list(values.items()):
        yield f"{prefix}{key}", values, key
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
