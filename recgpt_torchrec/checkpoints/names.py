"""Names of tensors in checkpoints that earlier versions wrote."""

import re

TABLE = re.compile(r"(model|optimizer\.state)\.(?:user|item|output)_table\.(?=embedding_bags\.)")


def current_name(name: str) -> str:
    """The name that a tensor of a checkpoint has now: each table was once a collection of its own.

    `model.item_table.embedding_bags.item.weight` is `model.tables.embedding_bags.item.weight`.
    """
    old = TABLE.match(name)
    return name if old is None else f"{old[1]}.tables.{name[old.end() :]}"
