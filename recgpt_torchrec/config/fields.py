"""What an option is besides its type and default: its dotted name, its former names, whether a resumed run may change
it."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

RESUME = "resume"
"""Key in a field's metadata."""
RENAMED = {"checkpoint.": "saving.", "checkpointing.": "saving."}
"""Groups that had another name in earlier versions, whose runs still resume."""


def changeable(default: Any = MISSING) -> Any:
    """A field that a resumed run may change: it says where and how fast, not what is trained.

    Example: `keep: int = changeable(2)`
    """
    return field(default=default, metadata={RESUME: "may change"})


@dataclass(frozen=True)
class Option:
    """One option: a field that is not a group, at any depth of a stage's configuration."""

    name: str
    """Dotted, without dashes: `model.dim`."""
    type: Any
    """Of its values; where the field may be null, a union with None."""
    field: Field[Any]

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return get_origin(self.type) is list

    @property
    def may_change(self) -> bool:
        """Whether a resumed run may change it."""
        return RESUME in self.field.metadata


def options(config_class: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a configuration class, in the order of its fields, groups walked in place."""
    hints = get_type_hints(config_class)
    for each in fields(config_class):
        of_field, name = hints[each.name], prefix + each.name
        members = get_args(of_field) if get_origin(of_field) in (Union, UnionType) else (of_field,)
        groups = [member for member in members if is_dataclass(member)]
        if groups:
            yield from options(groups[0], f"{name}.")  # type: ignore[arg-type]
        else:
            yield Option(name, of_field, each)


def current_name(name: str) -> str:
    """The present name of an option: `checkpoint.keep`, as an earlier version recorded it, is `saving.keep`."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
