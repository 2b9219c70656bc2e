"""Appends a day to a folder of days: `prepare --append`.

What is read of the days before: all keys, the counts of all items, the newest day of every user (some bytes each, in
order), and the tails of the day's own users. What is written: the sequences and tails of these users, new users, all
items with their counts, and the newest days. The log before is not read.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.days.newest import write_newest
from recgpt_torchrec.data.days.records import DayRecord, name_of, path_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import earlier, parts, queries
from recgpt_torchrec.preparation.attributes.encoding import encode_table, write_vocabularies
from recgpt_torchrec.preparation.attributes.loading import load_table
from recgpt_torchrec.preparation.attributes.page import describe_tables
from recgpt_torchrec.preparation.attributes.tables import EntityTable, check_earlier, list_tables
from recgpt_torchrec.preparation.days.counts import count_items
from recgpt_torchrec.preparation.days.folder import DaysFolder
from recgpt_torchrec.preparation.days.histories import EARLIER, NEW, Histories
from recgpt_torchrec.preparation.days.ids import DayIds, fingerprint_keys
from recgpt_torchrec.preparation.days.tails import CUT, write_tails
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.engines.engine import BATCH_ROWS
from recgpt_torchrec.preparation.engines.opening import open_engine
from recgpt_torchrec.preparation.ids.assigning import describe_rules, describe_slots
from recgpt_torchrec.preparation.ids.tables import Slots
from recgpt_torchrec.preparation.pipeline import Result, lay_out_sequences, summarize_lengths
from recgpt_torchrec.preparation.queries import IN_TIME
from recgpt_torchrec.preparation.reading.log import RawLog, read_log
from recgpt_torchrec.preparation.reading.understanding import describe_keys
from recgpt_torchrec.preparation.writing import NUMBER, Layout, fingerprint_parts, lay_out_rows
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.parts import Part

HELD_OUT = 2
"""Interactions that `--hold_out last` may hold out of a user: as many more are kept in a tail."""


def append(config: Prepare) -> Result:
    """Append the input of `config` to the folder of days `config.output`, or find that it is its newest day already.

    Raises:
        InputError: the input or the folder cannot be used, or the folder was made with other options.
    """
    began = time.monotonic()
    inputs, _ = parts.list_input_files(config)
    tables = list_tables(config)
    folder = DaysFolder.find(config)
    config = folder.config
    files = folder.record_inputs(inputs.files)
    table_files = folder.record_tables(tables)
    if (appended := folder.find_appended(files, table_files)) is not None:
        return Result(manifest=appended, seconds=time.monotonic() - began, already_there=True)
    with open_engine(config) as engine:
        assert isinstance(engine, DuckDBEngine)
        known = [] if folder.newest is None else folder.newest.manifest.events
        log = read_log(engine, config, inputs, known, is_later_day=folder.newest is not None)
        manifest = Day(engine, config, log, folder, files, tables, table_files).write()
    folder.commit()
    return Result(manifest=manifest, seconds=time.monotonic() - began)


@dataclass
class Day:
    """A day that is being appended. Example: `Day(engine, config, log, folder, files, [], []).write()`."""

    engine: DuckDBEngine
    config: Prepare
    log: RawLog
    folder: DaysFolder
    files: list[dict[str, Any]]
    """The input files, as the manifest records them."""
    tables: list[EntityTable]
    """Tables of attributes; that of items first."""
    table_files: list[dict[str, Any]]
    """Their files, as the manifest records them."""

    def __post_init__(self) -> None:
        self.number = len(self.folder.manifests) + 1
        self.before = self.folder.newest
        self.record = DayRecord(number=self.number, history=self.config.history)
        self.check_times()
        if self.before is not None:
            check_earlier(self.tables, self.before)
            earlier.check_unit(self.before, self.log.time_unit)
        clicks = queries.select_interacted(self.log.events)
        self.loaded = [load_table(self.engine, each, clicks, each.entity) for each in self.tables]
        catalogue = self.loaded[0].keys if self.config.catalogue == "items" else None
        self.histories = Histories(self.engine, self.config, self.log, self.folder, catalogue)

    @property
    def keep(self) -> int:
        """Number of interactions in a tail."""
        return self.config.history + (HELD_OUT if self.config.hold_out == "last" else 0)

    def check_times(self) -> None:
        """Check that the day has times as the days before, and newer ones; note its newest.

        Raises:
            InputError: it has not.
        """
        timed = self.log.timed
        if timed:
            newest = self.engine.row(self.log.events.agg(newest=self.log.events.time.max()))["newest"]
            self.record.newest_time = int(newest)
        if self.before is None:
            return
        before = self.before.manifest.day
        assert before is not None
        if timed != (before.newest_time is not None):
            has, had = ("has times", "none") if timed else ("has no times", "some")
            raise InputError(
                f"--input {self.config.input[0]} {has}, the days before in {self.folder.path} have {had}; give a log "
                "of the same kind"
            )
        if before.newest_time is None or self.record.newest_time is None:
            return
        if self.record.newest_time < before.newest_time:
            raise InputError(
                f"--input {self.config.input[0]} is not newer than {self.folder.path}: its newest row has time "
                f"{self.record.newest_time}, day {before.number} reaches {before.newest_time}. Append days in the "
                "order of time"
            )

    def write(self) -> Manifest:
        """Write the folder of the day, and commit it whole."""
        engine, config = self.engine, self.config
        entries, active = self.histories.join()
        users, items = self.histories.users, self.histories.items
        count = engine.count(active)
        if not count and self.histories.left_out:
            raise InputError(
                f"--input {config.input[0]}: none of its interactions is new and has both a user and an item with a "
                "row; append a longer day, or begin a new folder with more --user_rows and --item_rows"
            )
        if not count:
            raise InputError(
                f"--input {config.input[0]}: {self.folder.path} has all of its interactions already; give a new day"
            )
        interacted = queries.select_interacted(entries)
        targets = interacted.filter((interacted.trained == 0) & (interacted.after == 1))
        self.count_record(interacted)
        self.folder.begin()
        with folders.stage_folder(path_of(self.folder.path, self.number)) as (fs, root):
            manifest = Manifest(
                users=users.count,
                items=items.count,
                interactions=engine.count(interacted),
                settings=config.recorded(),
                hold_out=config.hold_out,
                events=self.log.event_types.words if self.log.event_types else [],
                time_unit=self.log.time_unit,
                feedback=config.feedback,
                day=self.record,
            )
            manifest.sequences = self.write_sequences(fs, root, entries, count)
            self.items = engine.save("counted_items", count_items(engine, self.before, items, interacted, targets))
            self.encode_tables(manifest, users)
            manifest.item_parts = self.write_rows(
                fs, root, "items", self.join("item", self.items, items), manifest.items
            )
            manifest.user_parts = self.write_users(fs, root, users, manifest.users)
            for name, each in (("item_keys", items), ("user_keys", users)):
                if each.slots is not None and (keys := each.slots.keys) is not None:
                    manifest.key_parts += self.write_rows(fs, root, name, keys, engine.count(keys))
            self.write_vocabularies(fs, root, manifest)
            self.record.tails = self.written(
                write_tails(fs, root, self.tail_batches(entries), self.histories.columns, count)
            )
            ids = (batch.column(0).to_numpy() for batch in engine.batches(active.order_by("user_id").select("user_id")))
            newest = None if self.before is None else self.folder.newest_users
            reassigned = users.slots.reassigned if users.slots is not None else np.zeros(0, np.int64)
            self.record.newest = self.written(
                write_newest(fs, root, newest, manifest.users, self.number, ids, reassigned)
            )
            manifest.vocabulary = self.fingerprint(fs, root, manifest, users, items)
            manifest.preparation = self.describe(fs, root, interacted, targets)
            manifest.id_tables = [replace(each.record, version=0) for each in self.slots]
            if self.before is not None:
                manifest.lineage = earlier.lineage_of(self.before, manifest.vocabulary)
                manifest.id_tables = [replace(each, version=len(manifest.lineage)) for each in manifest.id_tables]
                manifest.preparation["extends"] = {
                    "dataset": path_of(self.folder.path, self.number - 1),
                    **earlier.record_of(self.before),
                    "users": self.histories.known_users,
                    "items": self.histories.known_items,
                    "absent_users": manifest.users - count,
                    "absent_items": 0,
                    "new_targets": manifest.preparation["split"]["training_targets"],
                }
            folders.write_manifest(fs, root, manifest.to_json())
        return manifest

    # ----------------------------------------------------------------------------------------------------- writing

    def written(self, files: list[Part]) -> list[Part]:
        """The parts with their paths in the folder of days."""
        return [replace(part, path=f"days/{name_of(self.number)}/{part.path}") for part in files]

    def write_rows(self, fs: pyarrow.fs.FileSystem, root: str, name: str, table: ir.Table, rows: int) -> list[Part]:
        """Write a table with one row per id, which is its first column after ordering."""
        id = NUMBER if NUMBER in table.columns else f"{name.removesuffix('s')}_id"
        columns = [id, *(column for column in table.columns if column != id)]
        layout = lay_out_rows(name, columns, rows, BATCH_ROWS, self.config.groups_per_part)
        return self.written(self.engine.write_parts(table, layout, fs, root, rows))

    def write_sequences(self, fs: pyarrow.fs.FileSystem, root: str, entries: ir.Table, users: int) -> list[Part]:
        """Write a row per user of the day."""
        shown = self.config.click_column is not None
        rows = entries.mutate(of_user=entries.user_id, user_id=entries.number)
        if shown:
            rows = queries.drop_outer_shown(rows)
        table, layout = lay_out_sequences(self.config, rows, users, self.log.timed, shown, True)
        layout = replace(layout, make_groups=partial(_name_users, layout))
        return self.written(self.engine.write_parts(table, layout, fs, root, self.engine.count(rows)))

    def encode_tables(self, manifest: Manifest, users: DayIds) -> None:
        """Give the values of attributes of all users and items ids."""
        self.all_users = users.new
        if users.slots is not None:
            self.all_users = users.slots.named
        elif self.before is not None:
            known = ibis.table({"key": "string", "user_id": "int64"}, name="known_users")
            self.all_users = known.select("user_id", "key").union(users.new.select("user_id", "key"))
        ids = {"item": (self.items.select("key", "item_id"), manifest.items), "user": (self.all_users, manifest.users)}
        self.encoded = [
            encode_table(self.engine, self.config, each, *ids[each.table.entity], self.before) for each in self.loaded
        ]

    @property
    def slots(self) -> list[Slots]:
        """What the tables of fixed size hold, of users, items or both."""
        both = (self.histories.users.slots, self.histories.items.slots)
        return [each.ids.slots for each in both if each is not None and each.ids.slots is not None]

    def join(self, entity: str, rows: ir.Table, ids: DayIds) -> ir.Table:
        """The rows of users/ or items/ with what is known of their slots, and their attributes where there are any."""
        rows = rows if ids.slots is None else ids.slots.ids.add_columns(rows)
        for each in self.encoded:
            rows = each.join(rows) if each.loaded.table.entity == entity else rows
        return rows

    def write_users(self, fs: pyarrow.fs.FileSystem, root: str, users: DayIds, count: int) -> list[Part]:
        """Write the new users, or all where a table says what their attributes are today or where their ids are slots;
        returns the parts of all."""
        if users.slots is not None or any(each.table.entity == "user" for each in self.loaded):
            rows = self.all_users.select("user_id", "key")
            return self.write_rows(fs, root, "users", self.join("user", rows, users), count)
        earlier_users = [] if self.before is None else self.before.manifest.user_parts
        return earlier_users + self.write_rows(fs, root, "users", users.new, users.new_count)

    def write_vocabularies(self, fs: pyarrow.fs.FileSystem, root: str, manifest: Manifest) -> None:
        """Write the vocabularies of the attributes."""

        def write(name: str, table: ir.Table, rows: int) -> list[Part]:
            layout = lay_out_rows(name, list(table.columns), rows, BATCH_ROWS, self.config.groups_per_part)
            return self.engine.write_parts(table, layout, fs, root, rows)

        write_vocabularies(self.encoded, fs, root, write)
        manifest.attributes = [a.attribute for each in self.encoded for a in each.attributes if a.attribute is not None]
        for attribute in manifest.attributes:
            attribute.parts = self.written(attribute.parts)

    def tail_batches(self, entries: ir.Table) -> Iterator[pa.RecordBatch]:
        """The entries of the tails, in order."""
        kept = entries.filter(entries.later < self.keep)
        shown = kept.mutate(trained=kept.after, cut=(kept.length > self.keep).cast("int8"))
        if self.before is not None:  # a tail that was cut stays so
            cut = ibis.table({"user_id": "int64", CUT: "int8"}, name="context")
            cut = cut.filter(cut[CUT] == 1).select(was_cut="user_id").distinct()
            shown = shown.left_join(cut, shown.user_id == cut.was_cut)
            shown = shown.mutate(cut=shown.cut | shown.was_cut.notnull().cast("int8"))
        ordered = shown.order_by("number", *IN_TIME)
        names = [*self.histories.columns, CUT]
        return self.engine.batches(ordered.select(*names, user_id=ordered.number))

    # ------------------------------------------------------------------------------------------------------ records

    def count_record(self, interacted: ir.Table) -> None:
        """Count what the day adds, and the sums over all days."""
        record, engine = self.record, self.engine
        for name in ("repeated", "late", "too_late"):
            setattr(record, name, getattr(self.histories, name))
        before = None if self.before is None else self.before.manifest.day
        record.new = engine.count(interacted.filter(interacted.new == NEW))
        record.total = record.new + (0 if before is None else before.total)
        if before is not None and record.newest_time is not None and before.newest_time is not None:
            record.newest_time = max(record.newest_time, before.newest_time)
        if self.config.hold_out == "last":
            sizes = interacted.group_by("user_id").agg(
                all=interacted.count(), old=(interacted.new == EARLIER).cast("int64").sum()
            )
            if self.slots:  # users of earlier days may have lost theirs
                record.held_out_users = engine.count(sizes.filter(sizes["all"] >= 3))
            else:
                gained = engine.count(sizes.filter((sizes["all"] >= 3) & (sizes.old < 3)))
                record.held_out_users = gained + (0 if before is None else before.held_out_users)

    def describe(
        self,
        fs: pyarrow.fs.FileSystem,
        root: str,
        interacted: ir.Table,
        targets: ir.Table,
    ) -> dict[str, Any]:
        """What the manifest records of the preparation; writes the rejected rows."""
        engine, log, histories = self.engine, self.log, self.histories
        rejected: list[Part] = []
        if log.rejected:
            rows = sum(log.rejected.values())
            columns = list(log.rejected_rows.columns)
            layout = lay_out_rows("rejected", columns, rows, BATCH_ROWS, self.config.groups_per_part)
            rejected = self.written(engine.write_parts(log.rejected_rows, layout, fs, root, rows))
        placed = queries.place_interactions(
            interacted.select("user_id", "item_id", *IN_TIME, "trained"), self.config.hold_out
        )
        split = engine.row(queries.summarize_parts(queries.count_parts(placed)))
        new_targets = targets.filter(targets.place > 0)
        codes = {
            name: ids.of_day.rename({name: f"{name}_id"})
            for name, ids in (("user", histories.users), ("item", histories.items))
        }
        return {
            "inputs": self.files,
            **({"tables": self.table_files} if self.tables else {}),
            "rows": log.rows,
            **({"filtered": log.filtered, "uncomputed": log.uncomputed} if log.filtered else {}),
            "rejected": log.rejected,
            "rejected_parts": [asdict(part) for part in rejected],
            "duplicates_dropped": histories.duplicates,
            **({"repeats_collapsed": histories.collapsed} if self.config.repeats == "collapse" else {}),
            "rounds": [],
            "lengths": summarize_lengths(engine, interacted),
            "split": {
                "interactions": {name: split.pop(name) for name in parts.NAMES},
                **split,
                "training_targets": engine.count(new_targets),
                "items_without_target": engine.count(self.items.filter(self.items.train_count == 0)),
            },
            **({"ids": describe_slots(self.slots, histories.left_out, histories.forgotten)} if self.slots else {}),
            **({"events": log.event_types.to_record()} if log.event_types else {}),
            "page": [
                *log.page,
                *describe_tables(self.encoded),
                *describe_keys(engine, self.config, codes["user"], codes["item"]),
            ],
        }

    def fingerprint(
        self, fs: pyarrow.fs.FileSystem, root: str, manifest: Manifest, users: DayIds, items: DayIds
    ) -> str:
        """The fingerprint of the vocabulary."""
        if self.before is None:
            keys = {"items": manifest.item_parts, "users": manifest.user_parts}
            own = {name: [replace(p, path=p.path.split("/", 2)[2]) for p in files] for name, files in keys.items()}
            return fingerprint_parts(fs, root, own, describe_rules(self.slots))
        if not users.new_count and not items.new_count:
            return self.before.manifest.vocabulary
        return fingerprint_keys(self.engine, self.before.manifest.vocabulary, users, items)


def _name_users(layout: Layout, batches: Any, *, start: int, stop: int) -> Iterator[pa.Table]:
    """The row groups of a layout whose ids are the numbers of a day's users, with the ids of these in `user_id`."""
    for table in layout.make_groups(batches, start=start, stop=stop):
        lists = table["of_user"].combine_chunks()
        first = lists.flatten().take(pa.array(np.asarray(lists.offsets)[:-1] - np.asarray(lists.offsets)[0]))
        yield table.drop_columns(["of_user"]).set_column(0, "user_id", first)
