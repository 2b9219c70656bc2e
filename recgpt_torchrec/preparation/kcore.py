"""k-core filtering: drop users and items with too few interactions, repeatedly, until none is left to drop."""

from dataclasses import dataclass

import ibis.expr.types as ir

from recgpt_torchrec.preparation.engines.engine import Engine


@dataclass(kw_only=True)
class Round:
    """Users, items and interactions at the start of a round, and how many it removed."""

    users: int
    items: int
    interactions: int
    users_removed: int = 0
    items_removed: int = 0
    interactions_removed: int = 0


@dataclass(kw_only=True)
class Core:
    """Result of `k_core`: the users (`user`) and items (`item`) that are left, and the rounds."""

    users: ir.Table
    items: ir.Table
    rounds: list[Round]
    """The rounds that removed something."""
    left: Round
    """Number of users, items and interactions that are left."""


def k_core(
    engine: Engine,
    pairs: ir.Table,
    min_count: int,
    known_users: ir.Table | None = None,
    known_items: ir.Table | None = None,
) -> Core:
    """The largest part of a log in which every user and every item has at least `min_count` interactions, or is known.

    That part is unique, whatever the order in which users and items are dropped. Each round drops both at once, from
    the pairs that the round before left.

    Args:
        pairs: one row per interaction, columns `user` and `item`.
        known_users, known_items: columns `user` and `item` of those that stay, however few interactions they have.
    """
    rounds: list[Round] = []
    previous: tuple[str, ...] = ()
    while True:
        step = len(rounds)
        users = engine.save(f"core_users_{step}", _count_interactions(pairs, "user", min_count, known_users))
        items = engine.save(f"core_items_{step}", _count_interactions(pairs, "item", min_count, known_items))
        engine.drop(*previous)
        of_users = engine.row(_sum_counts(users))
        of_items = engine.row(_sum_counts(items))
        now = Round(users=of_users["all"], items=of_items["all"], interactions=of_users["interactions"] or 0)
        if rounds:
            before = rounds[-1]
            before.users_removed = before.users - now.users
            before.items_removed = before.items - now.items
            before.interactions_removed = before.interactions - now.interactions
        if of_users["kept"] == of_users["all"] and of_items["kept"] == of_items["all"]:
            return Core(users=users.select("user"), items=items.select("item"), rounds=rounds, left=now)
        rounds.append(now)
        kept_users, kept_items = users.filter(users.stays), items.filter(items.stays)
        previous = (f"core_users_{step}", f"core_items_{step}", *((pairs.get_name(),) if step else ()))
        pairs = engine.save(
            f"core_pairs_{step}",
            pairs.semi_join(kept_users, "user").semi_join(kept_items, "item").select("user", "item"),
        )


def _count_interactions(pairs: ir.Table, name: str, min_count: int, known: ir.Table | None) -> ir.Table:
    """Columns `name`, `n` (number of interactions) and `stays`: whether `n` is enough, or the user or item is known."""
    counts = pairs.group_by(name).agg(n=pairs.count())
    enough = counts.n >= min_count
    return counts.mutate(stays=enough if known is None else enough | counts[name].isin(known[name]))


def _sum_counts(counts: ir.Table) -> ir.Table:
    """One row: how many there are, how many stay, and the sum of their interactions."""
    kept = counts.stays.cast("int64").sum().fill_null(0)
    return counts.agg(all=counts.count(), kept=kept, interactions=counts.n.sum())
