"""Options of pipelines for tables of items and users, and for event types, beside a log."""

import argparse
import os
from dataclasses import dataclass, field

from pipelines.experiment import from_root


@dataclass(kw_only=True)
class Tables:
    """What beside ids the log is prepared with; paths are relative to the project."""

    items: str | None = None
    item_attributes: list[str] = field(default_factory=list)
    users: str | None = None
    user_attributes: list[str] = field(default_factory=list)
    event_column: str | None = None

    def arguments(self) -> list[str]:
        """Options of the stage prepare."""
        words = []
        for name, value in vars(self).items():
            if value:
                words += [f"--{name}", *(value if isinstance(value, list) else [value])]
        return words

    def attributes_of(self, *, items: bool = True, users: bool = True) -> list[str]:
        """Names of attributes as `pretrain --attributes.use` takes them."""
        named = [f"item.{name}" for name in self.item_attributes if items]
        named += [f"user.{name}" for name in self.user_attributes if users]
        return [name.partition(":")[0] for name in named]  # without the kind


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tables."""
    parser.add_argument("--items", help="table of the items, as in the stage prepare")
    parser.add_argument("--item_attributes", nargs="+", default=[], metavar="COLUMN", help="its columns to read")
    parser.add_argument("--users", help="table of the users, as in the stage prepare")
    parser.add_argument("--user_attributes", nargs="+", default=[], metavar="COLUMN", help="its columns to read")


def read_tables(parser: argparse.ArgumentParser, given: argparse.Namespace, event_column: str | None = None) -> Tables:
    """The tables that a command line names; the parser ends the program where they do not fit."""
    for table, columns in ((given.items, given.item_attributes), (given.users, given.user_attributes)):
        if bool(table) != bool(columns):
            parser.error("a table needs the names of its columns: --items with --item_attributes, --users likewise")
    for path in (given.input, given.items, given.users):
        if path and not os.path.exists(path):
            parser.error(f"there is no {path}")
    return Tables(
        items=given.items and from_root(given.items),
        item_attributes=given.item_attributes,
        users=given.users and from_root(given.users),
        user_attributes=given.user_attributes,
        event_column=event_column,
    )
