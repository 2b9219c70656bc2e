"""The options of a configuration class: dotted names, former names, and whether a resumed run may change them."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

RESUME = "resume"
"""Key in a field's metadata: a resumed run may change the option."""
RENAMED = {"checkpoint.": "saving.", "checkpointing.": "saving."}
"""Groups renamed since earlier versions: runs that recorded the old name still resume."""


def changeable(default: Any = MISSING) -> Any:
    """A field that a resumed run may change: it affects where files are or how fast training is, not its result.

    Example: `keep: int = changeable(2)`
    """
    return field(default=default, metadata={RESUME: "may change"})


@dataclass(frozen=True)
class Option:
    """One option of a stage: a field that is not a group, at any depth of its configuration class."""

    name: str
    """Dotted, without the leading dashes: `model.dim`."""
    type: Any
    """Type of its values; a union with None where the option may be null."""
    field: Field[Any]

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def is_list(self) -> bool:
        """Whether the option takes several values."""
        return get_origin(self.type) is list

    @property
    def may_change(self) -> bool:
        """Whether a resumed run may change the option."""
        return RESUME in self.field.metadata


def options(config_class: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a configuration class, in the order of its fields; groups are expanded in place.

    Args:
        config_class: dataclass of a stage or of a group.
        prefix: put before each name.
    """
    hints = get_type_hints(config_class)
    for each in fields(config_class):
        hint, name = hints[each.name], prefix + each.name
        members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        groups = [member for member in members if is_dataclass(member)]
        if groups:
            yield from options(groups[0], f"{name}.")  # type: ignore[arg-type]
        else:
            yield Option(name, hint, each)


def current_name(name: str) -> str:
    """The current name of an option, given its current or a former name.

    Example: `current_name("checkpoint.keep")` is `"saving.keep"`.
    """
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
