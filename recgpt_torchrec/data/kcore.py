"""k-core filtering: drop users and items with too few interactions, again and again until none is left to drop."""

from dataclasses import dataclass

import ibis.expr.types as ir

from recgpt_torchrec.data.engine import DuckDBEngine


@dataclass(kw_only=True)
class Round:
    """What was there when a round began, and what it removed."""

    users: int
    items: int
    interactions: int
    users_removed: int = 0
    items_removed: int = 0
    interactions_removed: int = 0


@dataclass(kw_only=True)
class Core:
    """Result of `k_core`: the kept users (`user`) and items (`item`), and how it came to them."""

    users: ir.Table
    items: ir.Table
    rounds: list[Round]
    """One for each round that removed something."""
    left: Round
    """Users, items and interactions that are left."""


def k_core(engine: DuckDBEngine, pairs: ir.Table, min_count: int) -> Core:
    """The largest part of a log in which every user and every item has at least `min_count` interactions.

    That part is unique, so it does not matter in which order users and items are dropped. Each round drops both at
    once, from the pairs that the round before left.

    Args:
        pairs: one row an interaction, columns `user` and `item`.
    """
    rounds: list[Round] = []
    previous: tuple[str, ...] = ()
    while True:
        step = len(rounds)
        users = engine.save(f"core_users_{step}", pairs.group_by("user").agg(n=pairs.count()))
        items = engine.save(f"core_items_{step}", pairs.group_by("item").agg(n=pairs.count()))
        engine.drop(*previous)
        of_users = engine.row(_sizes(users, min_count))
        of_items = engine.row(_sizes(items, min_count))
        now = Round(users=of_users["all"], items=of_items["all"], interactions=of_users["interactions"] or 0)
        if rounds:
            before = rounds[-1]
            before.users_removed = before.users - now.users
            before.items_removed = before.items - now.items
            before.interactions_removed = before.interactions - now.interactions
        if of_users["kept"] == of_users["all"] and of_items["kept"] == of_items["all"]:
            return Core(users=users.select("user"), items=items.select("item"), rounds=rounds, left=now)
        rounds.append(now)
        kept_users, kept_items = users.filter(users.n >= min_count), items.filter(items.n >= min_count)
        previous = (f"core_users_{step}", f"core_items_{step}", *((pairs.get_name(),) if step else ()))
        pairs = engine.save(
            f"core_pairs_{step}",
            pairs.semi_join(kept_users, "user").semi_join(kept_items, "item").select("user", "item"),
        )


def _sizes(counts: ir.Table, min_count: int) -> ir.Table:
    """One row: how many there are, how many have enough, and their interactions in all."""
    kept = (counts.n >= min_count).cast("int64").sum().fill_null(0)
    return counts.agg(all=counts.count(), kept=kept, interactions=counts.n.sum())
