"""The options of a configuration class: dotted names, former names, and whether a resumed run may change them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

RESUME = "resume"
"""Key in a field's metadata: the option may change without changing the result."""
LEADING = "leading"
"""Key in the metadata of a list option whose values may come first on the command line, without its name."""
AFTER_DASHES = "after dashes"
"""Key in the metadata of the list option that takes all that comes after -- on the command line, as it is."""
GIVEN = "_given_names"
"""Attribute of a configuration: the options that were given, by `remember_given`."""
RENAMED = {"checkpoint.": "saving.", "checkpointing.": "saving."}
"""Groups renamed since earlier versions: runs that recorded the old name still resume."""


def changeable(default: Any = MISSING, *, default_factory: Any = MISSING) -> Any:
    """A field that may change without changing the result: where files are, or how fast a stage is.

    A resumed run may be given another value, and a finished result is the one that is asked for whatever the value.
    Where the field is a group, that goes for all of its options.

    Example: `keep: int = changeable(2)`
    """
    return field(default=default, default_factory=default_factory, metadata={RESUME: "may change"})


@dataclass(frozen=True)
class Option:
    """One option of a stage: a field that is not a group, at any depth of its configuration class."""

    name: str
    """Dotted, without the leading dashes: `model.dim`."""
    type: Any
    """Type of its values; a union with None where the option may be null."""
    field: Field[Any]
    in_nullable_group: bool = False
    """Whether its group may be null as a whole."""
    in_changeable_group: bool = False

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def is_list(self) -> bool:
        """Whether the option takes several values."""
        return get_origin(self.type) is list

    @property
    def is_leading(self) -> bool:
        """Whether its values may come first on the command line, without its name."""
        return LEADING in self.field.metadata

    @property
    def is_after_dashes(self) -> bool:
        """Whether its values are what comes after -- on the command line."""
        return AFTER_DASHES in self.field.metadata

    @property
    def may_change(self) -> bool:
        """Whether a resumed run may change the option."""
        return self.in_changeable_group or RESUME in self.field.metadata


def options(config_class: type, prefix: str = "", nullable: bool = False, may_change: bool = False) -> Iterator[Option]:
    """Every option of a configuration class, in the order of its fields; groups are expanded in place.

    Args:
        config_class: dataclass of a stage or of a group.
        prefix: put before each name.
        nullable: whether the group of this class may be null as a whole.
        may_change: whether the group of this class is `changeable`.
    """
    hints = get_type_hints(config_class)
    for each in fields(config_class):
        hint, name = hints[each.name], prefix + each.name
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        groups = [member for member in members if is_dataclass(member)]
        if groups:
            changes = may_change or RESUME in each.metadata
            yield from options(groups[0], f"{name}.", NoneType in members, changes)  # type: ignore[arg-type]
        else:
            yield Option(name, hint, each, nullable, may_change)


def changeable_names(config_class: type) -> set[str]:
    """Dotted names of the options that may change without changing the result."""
    return {option.name for option in options(config_class) if option.may_change}


def default_values(config: Any) -> dict[str, Any]:
    """Default values of all options of a configuration, groups nested: what was done before an option existed.

    So the default of a new option must be the behaviour before it.
    """
    values: dict[str, Any] = {}
    for each in fields(config):
        given = getattr(config, each.name)
        default: Any = each.default if each.default_factory is MISSING else each.default_factory()
        if is_dataclass(given):
            group: Any = type(given)
            values[each.name] = asdict(default or group())
        elif default is not MISSING:
            values[each.name] = default
    return values


def remember_given(config: T, names: Iterable[str]) -> T:
    """Remember which options of a configuration were given, by their dotted names; `replace` forgets it."""
    vars(config)[GIVEN] = frozenset(names)
    return config


def given_names(config: Any) -> frozenset[str]:
    """Dotted names of the options that were given; of a configuration made without `cli`, those unlike the defaults."""
    return vars(config)[GIVEN] if GIVEN in vars(config) else frozenset(given_options(config))


def option_value(config: Any, name: str) -> Any:
    """The value of an option, by its dotted name; None: its group is null."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def with_options(config: T, values: Mapping[str, Any]) -> T:
    """A copy of a configuration with other values of some options, by their dotted names.

    Raises:
        ValueError: a value is refused by the checks of its group.
    """
    groups: dict[str, dict[str, Any]] = {}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        group, _, rest = name.partition(".")
        if rest:
            groups.setdefault(group, {})[rest] = value
        else:
            changed[name] = value
    changed |= {group: with_options(getattr(config, group), inner) for group, inner in groups.items()}
    return replace(config, **changed)  # type: ignore[type-var] # mypy takes no type for a dataclass


def given_options(config: Any) -> dict[str, Any]:
    """The options of a configuration whose values are not the defaults, by their dotted names."""
    return _unlike(asdict(config), default_values(config))


def _unlike(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name, MISSING)
        if isinstance(value, dict) and isinstance(default, dict):
            found |= _unlike(value, default, f"{prefix}{name}.")
        elif value != default:
            found[prefix + name] = value
    return found


def current_name(name: str) -> str:
    """The current name of an option, given its current or a former name.

    Example: `current_name("checkpoint.keep")` is `"saving.keep"`.
    """
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
