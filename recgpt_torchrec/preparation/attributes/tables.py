"""The tables of attributes that the options name: their files, key columns and columns asked for. Reads nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.inputs.attribute_names import AskedAttribute
from recgpt_torchrec.config.prepare import NONE
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import Entity, table_of_attribute
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.reading.files import TABLE_ENDINGS, InputFile, list_files

TEXT = "text"
"""Kind of a column that is kept for names, and not read by the model."""


@dataclass(frozen=True, kw_only=True)
class EntityTable:
    """A table of users or of items, in one file or several."""

    entity: Entity
    key: str
    """Column of the keys."""
    asked: list[AskedAttribute]
    files: list[InputFile]
    left_out: list[str]
    """Paths of files that are not read: of unknown endings, hidden, or named twice."""
    reading: Prepare
    """Options of a log that has the key column alone, and is written like the table."""
    separator: str
    """Between the values of lists in text."""

    @property
    def option(self) -> str:
        """Option that names the files."""
        return f"--{self.entity}s"

    @property
    def attributes_option(self) -> str:
        """Option that names the columns."""
        return f"--{self.entity}_attributes"

    def record(self) -> list[dict[str, Any]]:
        """The files as the manifest records them."""
        return [{**asdict(file), "entity": self.entity} for file in self.files]


def list_tables(config: Prepare) -> list[EntityTable]:
    """The tables that the options name; that of items first.

    Raises:
        InputError: a file is missing, or two attributes would be one table of the model.
    """
    tables = []
    entities: tuple[tuple[Entity, list[str], list[str], str], ...] = (
        ("item", config.items, config.item_attributes, config.items_key or config.item_column),
        ("user", config.users, config.user_attributes, config.users_key or config.user_column),
    )
    for entity, patterns, attributes, key in entities:
        if not patterns:
            continue
        asked = [AskedAttribute.parse(word) for word in attributes]
        _check_names(entity, asked)
        reading = _options_of_table(config, patterns, key)
        listed = list_files(patterns, reading, f"--{entity}s", TABLE_ENDINGS)
        table = EntityTable(
            entity=entity,
            key=key,
            asked=asked,
            files=listed.files,
            left_out=listed.left_out + listed.repeated,
            reading=reading,
            separator=config.attribute_separator,
        )
        if not any(file.bytes for file in table.files):
            raise InputError(f"--{entity}s {table.files[0].path}: empty; give a table with a row per {entity}")
        tables.append(table)
    return tables


def _options_of_table(config: Prepare, patterns: list[str], key: str) -> Prepare:
    """The options of a log whose users and items are the key column; how text is written stays as it is given."""
    plain = Prepare(input=patterns, output=config.output)
    kept = ("header", "separator", "quote", "escape", "encoding", "null_words", "scratch", "memory_limit", "engine")
    return replace(
        plain,
        **{name: getattr(config, name) for name in kept},
        user_column=key,
        item_column=key,
        time_column=None,
        list_separator=NONE,
    )


def _check_names(entity: Entity, asked: Sequence[AskedAttribute]) -> None:
    """Raise an `InputError` if two attributes would have one name in the model."""
    names: dict[str, str] = {}
    for each in asked:
        other = names.setdefault(table_of_attribute(entity, each.name).lower(), each.name)
        if other != each.name:
            raise InputError(
                f"--{entity}_attributes {other},{each.name}: these names differ in marks or case alone, and would be "
                "one table of the model; rename one of the columns"
            )


def check_earlier(tables: Sequence[EntityTable], earlier: Dataset) -> None:
    """Check that every attribute of the earlier dataset is given again.

    Raises:
        InputError: names the first that is not.
    """
    asked = {(table.entity, each.name): each.kind for table in tables for each in table.asked}
    for each in earlier.manifest.attributes:
        if asked.get((each.entity, each.name)) == TEXT:
            raise InputError(
                f"--{each.entity}_attributes {each.name}:text: --vocabulary {earlier.path} has it as a {each.kind}; "
                f"pass {each.name}:{each.kind}, or prepare without --vocabulary"
            )
        if (each.entity, each.name) not in asked:
            raise InputError(
                f"--vocabulary {earlier.path} has the {each.entity} attribute {each.name}, which is not given now; "
                f"name its table with --{each.entity}s and the column with --{each.entity}_attributes"
            )
