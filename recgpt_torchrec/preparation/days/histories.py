"""The histories of a day: its users' tails with the day's rows behind them, each with what is trained after the day."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.ids.records import Entity
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.data.split import is_held_out
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import earlier, queries
from recgpt_torchrec.preparation.days.folder import DaysFolder
from recgpt_torchrec.preparation.days.ids import DayIds, assign_day_ids
from recgpt_torchrec.preparation.days.slots import assign_day_slots
from recgpt_torchrec.preparation.days.tails import CUT, STALE
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.queries import IN_TIME
from recgpt_torchrec.preparation.reading.log import RawLog

EARLIER, NEW = 0, 1
"""Values of the column `new` of entries."""


@dataclass
class Histories:
    """The histories of a day that is being appended. Example: `Histories(engine, config, log, folder).join()`."""

    engine: DuckDBEngine
    config: Prepare
    log: RawLog
    folder: DaysFolder
    catalogue: ir.Table | None = None
    """Column `key`: items that get an id without an interaction; None: there are none."""
    columns: dict[str, pa.DataType] = field(default_factory=dict)
    """Columns of the entries that tails keep."""
    duplicates: int = 0
    """Number of rows that were left out by `--duplicates drop`."""
    collapsed: int = 0
    """Number of rows that were left out by `--repeats collapse`."""
    repeated: int = 0
    late: int = 0
    too_late: int = 0
    """These three: see `DayRecord`."""
    left_out: int = 0
    """Number of interactions whose user or item has no slot."""
    forgotten: int = 0
    """Number of entries of tails whose item has lost its slot."""

    def __post_init__(self) -> None:
        self.before = self.folder.newest
        self.users, self.items = self.assign_ids(queries.select_interacted(self.log.events))

    @property
    def known_users(self) -> int:
        """Number of users of the days before."""
        return 0 if self.before is None else self.before.manifest.users

    @property
    def known_items(self) -> int:
        """Number of items of the days before."""
        return 0 if self.before is None else self.before.manifest.items

    def join(self) -> tuple[ir.Table, ir.Table]:
        """The entries of the day's users, see `place`, and the users, see `number_users`."""
        entries = self.join_tails()
        active = self.engine.save("active", self.number_users(entries))
        return self.engine.save("entries", self.place(entries, active)), active

    def assign_ids(self, clicks: ir.Table) -> tuple[DayIds, DayIds]:
        """The ids of the day's users and items."""
        known: dict[str, ir.Table | None] = {"user_id": None, "item_id": None}
        if self.before is not None:
            loaded = earlier.Known.load_day(self.engine, self.before)
            known = {"user_id": loaded.users, "item_id": loaded.items}
        rows = self.log.events
        keys_of_items = rows.select(key=rows.item)
        if (there := known["item_id"]) is not None and not self.engine.count(there.semi_join(keys_of_items, "key")):
            (new,), (old,) = (self.engine.rows(table.limit(1)) for table in (keys_of_items, there))
            raise InputError(
                f"--append: none of the {self.known_items:,} items of {self.folder.path} is in the day; its keys are "
                f"like {old['key']!r}, those of --item_column {self.config.item_column} like {new['key']!r}. Give the "
                "column of the days before"
            )
        return self.assign("user", clicks, known["user_id"]), self.assign("item", clicks, known["item_id"])

    def assign(self, entity: Entity, clicks: ir.Table, known: ir.Table | None) -> DayIds:
        """The ids of the day's users or items."""
        rows, name = self.log.events, f"{entity}_id"
        keys, others = (table.select(key=table[entity]) for table in (clicks, rows))
        catalogue = self.catalogue if entity == "item" else None
        if self.config.ids != "vocabulary" and getattr(self.config, f"{entity}_rows") is not None:
            return assign_day_slots(
                self.engine,
                self.config,
                entity,
                clicks=clicks,
                others=others,
                known=known,
                catalogue=catalogue,
                before=self.before,
            )
        keys = keys if catalogue is None else keys.union(catalogue.select("key"))
        count = self.known_users if entity == "user" else self.known_items
        return assign_day_ids(self.engine, name, keys, others, known, count, self.config.seed)

    def join_tails(self) -> ir.Table:
        """The day's rows that no earlier day has, and their users' tails: `user_id`, `item_id`, the columns of the log,
        `trained` int8 and `new` int8."""
        engine, config = self.engine, self.config
        coded_users = self.users.of_day.select("key", user="user_id")
        coded_items = self.items.of_day.select("key", item="item_id")
        events = engine.save("events", queries.encode_keys(self.log.events, coded_users, coded_items))
        clicks = queries.select_interacted
        self.left_out = engine.count(clicks(self.log.events)) - engine.count(clicks(events))
        if config.duplicates == "drop":
            unique = engine.save("unique_events", queries.drop_repeats(events))
            self.duplicates = engine.count(events) - engine.count(unique)
            events = unique
        day = events.select(
            *(name for name in events.columns if name not in ("user", "item")),
            user_id=events.user,
            item_id=events.item,
            trained=ibis.literal(0, "int8"),
        )
        schema = day.schema().to_pyarrow()
        self.columns = {field.name: field.type for field in schema if field.name not in ("user_id", "order")}
        if self.before is None:
            day = day.mutate(new=ibis.literal(NEW, "int8"))
            entries = engine.save("joined", day)
        else:
            entries = engine.save("joined", self.add_tails(engine.save("day_rows", day)))
        if config.repeats == "collapse":
            single = engine.save("single", self.collapse(entries))
            self.collapsed = engine.count(entries) - engine.count(single)
            entries = single
        return entries

    def add_tails(self, day: ir.Table) -> ir.Table:
        """The day's rows behind the tails of their users, without rows that an earlier day has or that are too old."""
        engine = self.engine
        slots = {"user": self.users.slots, "item": self.items.slots}
        changes = {name: each.ids.slots.columns for name, each in slots.items() if each is not None and each.ids.slots}
        since = {name: columns["since"] for name, columns in changes.items() if "since" in columns}
        tails = self.folder.open_tails(self.columns, since)

        def read() -> Iterator[pa.Table]:
            ids = day.select("user_id").distinct().order_by("user_id")
            for batch in engine.batches(ids):
                yield from tails.read(batch.column(0).to_numpy())

        context = engine.fill("context", read(), tails.schema)
        kept = context.filter(context[STALE] == 0)
        self.forgotten = engine.count(context) - engine.count(kept) if since else 0
        if self.log.timed:
            day = engine.save("unseen_rows", self.leave_out_seen(day, context))
        names = [*self.columns, "user_id", "order"]
        older = kept.select(*names, new=ibis.literal(EARLIER, "int8"))
        return older.union(day.select(*names, new=ibis.literal(NEW, "int8")))

    def leave_out_seen(self, day: ir.Table, context: ir.Table) -> ir.Table:
        """Leave out as many rows as the tails have of the same user, item and time, and rows older than a tail that was
        cut; both are counted."""
        engine, same = self.engine, ["user_id", "item_id", "time", "fraction", "segment"]
        same += [name for name in day.columns if name == "event"]
        place = ibis.row_number().over(ibis.window(group_by=same, order_by="order"))
        there = context.filter(context[STALE] == 0)
        counts = there.group_by(same).agg(there=there.count()).rename({f"of_{name}": name for name in same})
        placed = day.mutate(place=place)
        matched = placed.left_join(counts, [placed[name] == counts[f"of_{name}"] for name in same])
        unseen = engine.save(
            "unmatched_rows", matched.filter((matched.place >= matched.there).fill_null(True)).select(*day.columns)
        )
        self.repeated = engine.count(day) - engine.count(unseen)
        cut = context.filter(context[CUT] == 1)
        oldest = cut.group_by("user_id").agg(oldest=cut.time.min()).rename(of_user="user_id")
        joined = unseen.left_join(oldest, unseen.user_id == oldest.of_user)
        kept = engine.save(
            "kept_rows", joined.filter((joined.time > joined.oldest).fill_null(True)).select(*day.columns)
        )
        self.too_late = engine.count(unseen) - engine.count(kept)
        newest = context.group_by("user_id").agg(newest=context.time.max()).rename(of_user="user_id")
        clicks = queries.select_interacted(kept)
        late = clicks.inner_join(newest, clicks.user_id == newest.of_user)
        self.late = engine.count(late.filter(late.time < late.newest))
        return kept

    def collapse(self, entries: ir.Table) -> ir.Table:
        """Keep the first of a user's consecutive interactions with the same item; those of earlier days stay."""
        place = ibis.window(group_by=["user_id", "segment"], order_by=IN_TIME)
        numbered = entries.mutate(before=entries.item_id.lag().over(place))
        repeats = (numbered.segment == INTERACTED) & (numbered.before == numbered.item_id) & (numbered.new == NEW)
        return numbered.filter(~repeats.fill_null(False)).drop("before")

    def number_users(self, entries: ir.Table) -> ir.Table:
        """The users with a new row, numbered from 0 on in the order of their ids: `user_id`, `number`.

        One who was only shown something has no new target, but a tail with it, for the days to come.
        """
        ids = entries.filter(entries.new == NEW).select("user_id").distinct()
        bucketed = ids.mutate(bucket=ids.user_id // queries.BUCKET_CODES)
        return queries.number_rows(bucketed, ["user_id"], "number").select("user_id", "number")

    def place(self, entries: ir.Table, active: ir.Table) -> ir.Table:
        """The entries of the day's users, with `number` of the user, `after` int8 (whether it is trained after the
        day), `later` (the user's interactions after it) and `place` (those before it)."""
        named = active.rename(of_user="user_id")
        joined = entries.inner_join(named, entries.user_id == named.of_user).drop("of_user")
        clicked = (joined.segment == INTERACTED).cast("int64")
        of_user = ibis.window(group_by="user_id")
        counted = joined.mutate(
            through=clicked.sum().over(ibis.cumulative_window(group_by="user_id", order_by=IN_TIME)),
            length=clicked.sum().over(of_user),
        )
        place = counted.mutate(
            later=counted.length - counted.through,
            place=counted.through - (counted.segment == INTERACTED).cast("int64"),
        )
        trained = place.segment == INTERACTED
        if self.config.hold_out == "last":
            trained &= ~is_held_out(place.later, place.length, "validation")
        after = ((place.trained == 1) | trained).cast("int8")
        return place.mutate(after=after).drop("through")
