"""From a raw log to a dataset folder: k-core, dense ids, time order, Parquet parts, manifest.

Rows that were shown and not clicked decide nothing: ids, filtering, counts and held-out items are those of the log
without them. They only become entries after the first interaction of the same user.

Everything between reading and writing is Ibis expressions over tables in the engine, so the log need not fit in memory.
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.config.fields import changeable_names, default_values
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.segments import FEEDBACK
from recgpt_torchrec.data.split import EVALUATION, STORED
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation import earlier, parts, queries
from recgpt_torchrec.preparation.attributes.encoding import encode_table, write_vocabularies
from recgpt_torchrec.preparation.attributes.loading import load_table
from recgpt_torchrec.preparation.attributes.page import describe_tables
from recgpt_torchrec.preparation.attributes.tables import EntityTable, check_earlier, list_tables
from recgpt_torchrec.preparation.earlier import Known, KnownCodes
from recgpt_torchrec.preparation.engines.engine import BATCH_ROWS, Engine
from recgpt_torchrec.preparation.engines.opening import open_engine
from recgpt_torchrec.preparation.ids.assigning import assign_ids, check_tables, describe_rules, describe_slots
from recgpt_torchrec.preparation.kcore import Core, k_core
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.preparation.reading.log import RawLog, read_log
from recgpt_torchrec.preparation.reading.understanding import describe_keys
from recgpt_torchrec.preparation.writing import Layout, fingerprint_parts, lay_out_rows, list_groups
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.finished import differences, find_finished
from recgpt_torchrec.storage.parts import Part


@dataclass(kw_only=True)
class Result:
    """The manifest of the dataset that `prepare` wrote or found, and the time it took."""

    manifest: Manifest
    seconds: float
    already_there: bool = False


def prepare(config: Prepare) -> Result:
    """Write the dataset `config.output`, or find that it is finished already.

    Raises:
        InputError: the input cannot be used, or the output folder is not free.
    """
    began = time.monotonic()
    inputs, file_parts = parts.list_input_files(config)
    tables = list_tables(config)
    extended = None if config.vocabulary is None else earlier.open_earlier(config.vocabulary, config.output)
    check_tables(config, extended)
    if extended is not None:
        check_earlier(tables, extended)
    finished = _find_finished(config, record_inputs(config, inputs.files, file_parts), tables, extended)
    if finished is not None:
        return Result(manifest=finished, seconds=time.monotonic() - began, already_there=True)
    with open_engine(config) as engine:
        log = read_log(engine, config, inputs, _known_events(config, extended))
        if extended is not None:
            earlier.check_unit(extended, log.time_unit)
        manifest = _write_dataset(engine, config, log, file_parts, tables, extended)
    return Result(manifest=manifest, seconds=time.monotonic() - began)


def _write_dataset(
    engine: Engine,
    config: Prepare,
    log: RawLog,
    file_parts: list[int],
    tables: list[EntityTable],
    extended: Dataset | None,
) -> Manifest:
    """Filter the log, assign ids, and write the dataset."""
    loaded = None if extended is None else Known.load(engine, extended)
    clicks = queries.select_interacted(log.events)
    loaded_tables = [load_table(engine, table, clicks, table.entity) for table in tables]
    catalogue = loaded_tables[0].keys if config.catalogue == "items" else None
    users, items = queries.build_codes(engine, clicks, config.seed, loaded, config.new_keys, catalogue)
    known = None if loaded is None else loaded.join_codes(engine, users, items)
    events = engine.save("events", queries.encode_keys(log.events, users, items))
    unknown = 0
    if config.new_keys == "leave_out":
        coded = engine.count(queries.select_interacted(events))
        unknown = engine.count(clicks) - coded
        if not coded:
            raise InputError(
                f"--new_keys leave_out: none of the {unknown:,} interactions has a user and an item of --vocabulary "
                f"{config.vocabulary}; name the dataset that the log continues"
            )
    dropped = dropped_shown = collapsed = 0
    if config.duplicates == "drop":
        unique = engine.save("unique_events", queries.drop_repeats(events))
        dropped, dropped_shown = (
            engine.count(select(events)) - engine.count(select(unique))
            for select in (queries.select_interacted, queries.select_shown)
        )
        engine.drop("events")
        events = unique
    if config.repeats == "collapse":
        single = engine.save("single_events", queries.collapse_repeats(events))
        collapsed = engine.count(events) - engine.count(single)
        engine.drop(events.get_name())
        events = single
    core = _filter_core(engine, events, config.min_count, known)
    if core.left.interactions == 0:
        raise InputError(_explain_nothing_left(engine, config, events, core, known))
    if extended is not None and known is not None:
        _check_keys(engine, config, extended, core, known, items)
    known_users, known_items = (known.users, known.items) if known is not None else (None, None)
    kept_items = core.items if catalogue is None else queries.add_catalogue(core.items, items, catalogue)
    pairs = queries.select_interacted(events).semi_join(core.users, "user").semi_join(core.items, "item")
    assign = partial(assign_ids, engine, config, pairs=pairs, extended=extended)
    user_ids = assign("user", kept=core.users, codes=users, known=known_users)
    item_ids = assign("item", kept=kept_items, codes=items, known=known_items)
    all_users, all_items = user_ids.count, item_ids.count
    user_keys = queries.user_table(user_ids.named, users)
    entities = {"item": (queries.name_items(item_ids.named, items), all_items), "user": (user_keys, all_users)}
    encoded = [encode_table(engine, config, each, *entities[each.table.entity], extended) for each in loaded_tables]
    # Items of the catalogue that do not reach min_count have ids, but their interactions are not kept.
    with_history = item_ids.codes if catalogue is None else item_ids.codes.semi_join(core.items, "item")
    kept = engine.save(
        "kept_events", events.inner_join(user_ids.codes, "user").inner_join(with_history, "item").drop("user", "item")
    )
    engine.drop(events.get_name())
    slots = [ids.slots for ids in (user_ids, item_ids) if ids.slots is not None]
    if slots and not engine.count(queries.select_interacted(kept)):
        raise InputError(
            "no interaction of the log has both a user and an item with a row, so nothing is left; give more rows with "
            "--user_rows and --item_rows"
        )
    target_events = log.event_types.ids_of("--target_events", config.target_events) if log.event_types else []
    kept, boundaries = parts.mark_parts(engine, config, kept, log.first_rows, file_parts, target_events)
    entries, exposed = queries.select_interacted(kept), None
    if log.exposed:
        named = engine.count(queries.select_shown(kept))
        entries = engine.save("entries", queries.drop_outer_shown(kept))
        left = engine.count(queries.select_shown(entries))
        exposed = {
            "rows": log.exposed,
            "duplicates_dropped": dropped_shown,
            "unknown": log.exposed - dropped_shown - named,
            "outside": named - left,
            "left": left,
        }
        if len(config.feedback) > 1:
            told = {kind: entries.segment == FEEDBACK[kind] for kind in config.feedback[1:]}
            exposed |= engine.row(entries.agg(**{kind: is_of.cast("int64").sum() for kind, is_of in told.items()}))
        engine.drop("kept_events")
        kept = queries.select_interacted(entries)

    lengths = summarize_lengths(engine, kept)
    if extended is not None:
        changed = [ids.changed_since(extended) for ids in (user_ids, item_ids)]
        entries = engine.save("marked_entries", earlier.mark_trained(engine, entries, extended, log.timed, *changed))
    placed = engine.save("placed", queries.place_interactions(queries.select_interacted(entries), config.hold_out))
    counts = engine.save("item_counts", queries.count_items(placed))
    histories, layout = lay_out_sequences(config, entries, all_users, log.timed, bool(exposed), extended is not None)
    interactions = core.left.interactions if not slots else engine.count(kept)
    total = interactions + (exposed["left"] if exposed else 0)
    with folders.stage_folder(config.output) as (fs, folder):
        manifest = Manifest(
            users=all_users,
            items=all_items,
            interactions=interactions,
            settings=config.recorded(),
            hold_out=config.hold_out,
            events=log.event_types.words if log.event_types else [],
            time_unit=log.time_unit,
            feedback=config.feedback,
            sequences=engine.write_parts(histories, layout, fs, folder, total),
        )

        def write(name: str, table: ir.Table, ids: int) -> list[Part]:
            layout = lay_out_rows(name, list(table.columns), ids, BATCH_ROWS, config.groups_per_part)
            return engine.write_parts(table, layout, fs, folder, ids)

        item_rows = queries.item_table(item_ids.named, items, counts)
        rows = {"item": item_ids.add_columns(item_rows), "user": user_ids.add_columns(user_keys)}
        rows |= {each.loaded.table.entity: each.join(rows[each.loaded.table.entity]) for each in encoded}
        manifest.item_parts = write("items", rows["item"], all_items)
        manifest.user_parts = write("users", rows["user"], all_users)
        write_vocabularies(encoded, fs, folder, write)
        manifest.attributes = [a.attribute for each in encoded for a in each.attributes if a.attribute is not None]
        keys = {"items": manifest.item_parts, "users": manifest.user_parts}
        manifest.vocabulary = fingerprint_parts(fs, folder, keys, describe_rules(slots))
        for entity, ids, codes in (("item", item_ids, items), ("user", user_ids, users)):
            if (shared := ids.list_keys(codes)) is not None:
                manifest.key_parts += write(f"{entity}_keys", shared, engine.count(ids.codes))
        rejected = write("rejected", log.rejected_rows, sum(log.rejected.values())) if log.rejected else []
        manifest.preparation = {
            "inputs": record_inputs(config, log.files, file_parts),
            **({"tables": [file for table in tables for file in table.record()]} if tables else {}),
            "rows": log.rows,
            **({"filtered": log.filtered, "uncomputed": log.uncomputed} if log.filtered else {}),
            "rejected": log.rejected,
            "rejected_parts": [asdict(part) for part in rejected],
            "duplicates_dropped": dropped,
            **({"unknown_left_out": unknown} if config.new_keys == "leave_out" else {}),
            **({"repeats_collapsed": collapsed} if config.repeats == "collapse" else {}),
            "rounds": [asdict(round_) for round_ in core.rounds],
            "lengths": lengths,
            "split": parts.record_of(engine, placed, counts, all_items, boundaries),
            **({"exposed": exposed} if exposed else {}),
            **({"ids": describe_slots(slots, core.left.interactions - interactions)} if slots else {}),
            **({"events": log.event_types.to_record()} if log.event_types else {}),
            "page": [*log.page, *describe_tables(encoded), *describe_keys(engine, config, users, items)],
        }
        manifest.id_tables = [replace(each.record, version=0) for each in slots]
        if extended is not None and known_items is not None:
            absent_users = all_users - core.left.users
            absent_items = engine.count(known_items.anti_join(core.items, "item"))
            if slots:
                absent_users = all_users - engine.count(placed.select("user_id").distinct())
                absent_items = all_items - engine.count(placed.select("item_id").distinct())
            manifest.lineage = earlier.lineage_of(extended, manifest.vocabulary)
            manifest.id_tables = [replace(each.record, version=len(manifest.lineage)) for each in slots]
            manifest.preparation["extends"] = {
                "dataset": extended.path,
                **earlier.record_of(extended),
                "users": extended.manifest.users,
                "items": extended.manifest.items,
                "absent_users": absent_users,
                "absent_items": absent_items,
                "new_targets": engine.count(
                    placed.filter((placed.part == 0) & ~placed["first"] & (placed.trained == 0))
                ),
            }
        folders.write_manifest(fs, folder, manifest.to_json())
    return manifest


def _known_events(config: Prepare, extended: Dataset | None) -> list[str]:
    """Event types of the dataset that is extended.

    Raises:
        InputError: it has some, and no column of them is named.
    """
    known = [] if extended is None else extended.manifest.events
    if known and config.event_column is None:
        raise InputError(
            f"--vocabulary {config.vocabulary} has event types ({', '.join(known[:5])}); name their column in this log "
            "with --event_column"
        )
    return known


def lay_out_sequences(
    config: Prepare, entries: ir.Table, users: int, timed: bool, exposed: bool, extends: bool
) -> tuple[ir.Table, Layout]:
    """The rows of `sequences/`, an entry each, and how they become lists per user."""
    lists: dict[str, tuple[str, pa.DataType]] = {
        "item_ids": ("item_id", pa.int64()),
        **({"timestamps": ("time", pa.int64())} if timed else {}),
        **({"ratings": ("rating", pa.float32())} if config.rating_column else {}),
        **({"event_ids": ("event", pa.int16())} if config.event_column else {}),
        **({"segment_ids": ("segment", pa.int8())} if exposed else {}),
        **({"places": ("list_place", pa.int16())} if config.position_column else {}),
        **({"trained": ("trained", pa.int8())} if extends else {}),
        **({"of_user": ("of_user", pa.int64())} if "of_user" in entries.columns else {}),
    }
    starts = {f"{split}_start": f"before_{split}" for split in EVALUATION} if config.hold_out in STORED else {}
    size = config.rows_per_group or group_size(users)
    layout = Layout(
        folder="sequences",
        id="user_id",
        ids=users,
        columns=["user_id", *(source for source, _ in lists.values()), *starts.values()],
        order=queries.order_of(entries),
        ids_per_group=size,
        groups_per_part=config.groups_per_part,
        make_groups=partial(list_groups, ids_per_group=size, lists=lists, counts=starts),
    )
    rows = queries.mark_before(entries, starts)
    return rows.select(*dict.fromkeys([*layout.columns, *layout.order])), layout


def group_size(users: int) -> int:
    """Number of users per row group: a small dataset has 64 groups, but each at least 16 and at most 8,192 users."""
    return min(max(-(-users // 64), 16), 8192)


def _filter_core(engine: Engine, events: ir.Table, min_count: int, known: KnownCodes | None) -> Core:
    pairs = queries.select_interacted(events).select("user", "item")
    return k_core(engine, pairs, min_count, *((known.users, known.items) if known else ()))


def _check_keys(
    engine: Engine, config: Prepare, extended: Dataset, core: Core, known: KnownCodes, items: ir.Table
) -> None:
    """Raise an `InputError` if no item of the log is known: then their keys are of different kinds."""
    if engine.count(core.items.semi_join(known.items, "item")):
        return
    new, old = (
        engine.row(items.semi_join(codes, "item").agg(key=items.key.min()))["key"]
        for codes in (core.items, known.items)
    )
    raise InputError(
        f"--vocabulary {extended.path}: none of its {extended.manifest.items:,} items is in the log; its keys are like "
        f"{old!r}, those of the log (--item_column {config.item_column}) like {new!r}. Give the column that the "
        "earlier dataset was made with, or leave --vocabulary out"
    )


def summarize_lengths(engine: Engine, kept: ir.Table) -> dict[str, float]:
    """Mean and quantiles of the number of interactions per user, from their histogram."""
    sizes = kept.group_by("user_id").agg(length=kept.count())
    histogram = engine.rows(sizes.group_by("length").agg(users=sizes.count()).order_by("length"))
    users = sum(row["users"] for row in histogram)
    result: dict[str, float] = {"mean": round(sum(row["length"] * row["users"] for row in histogram) / users, 2)}
    for name, share in (("min", 0.0), ("50%", 0.5), ("90%", 0.9), ("99%", 0.99), ("max", 1.0)):
        seen = 0
        for row in histogram:
            seen += row["users"]
            if seen >= max(share * users, 1):
                result[name] = row["length"]
                break
    return result


def _explain_nothing_left(
    engine: Engine, config: Prepare, events: ir.Table, core: Core, known: KnownCodes | None
) -> str:
    """The message where k-core filtering drops everything; it looks for a count that leaves something."""
    first = core.rounds[0]
    text = (
        f"nothing is left after k-core filtering with --min_count {config.min_count}: the log has "
        f"{first.interactions:,} usable rows of {first.users:,} users and {first.items:,} items, but no part of it in "
        f"which every user and every item has {config.min_count} interactions"
    )
    for smaller in range(config.min_count - 1, max(config.min_count - 10, 1), -1):
        engine.drop(
            *(f"core_{kind}_{step}" for kind in ("users", "items", "pairs") for step in range(len(core.rounds) + 1))
        )
        core = _filter_core(engine, events, smaller, known)
        if core.left.interactions:
            left = f"{core.left.users:,} users, {core.left.items:,} items and {core.left.interactions:,} interactions"
            return f"{text}. --min_count {smaller} would leave {left}"
    return f"{text}. Pass a smaller --min_count; 1 keeps everything"


def record_inputs(config: Prepare, files: list[InputFile], file_parts: list[int]) -> list[dict[str, Any]]:
    """The input files as the manifest records them, with their part where each part has files of its own."""
    part = [{"part": parts.NAMES[number]} if config.hold_out == "given" else {} for number in file_parts]
    return [{**asdict(file), **more} for file, more in zip(files, part, strict=True)]


def _find_finished(
    config: Prepare, files: list[dict[str, Any]], tables: list[EntityTable], extended: Dataset | None
) -> Manifest | None:
    """The manifest, if the output folder holds the dataset asked for; None: the folder is free."""

    def compare(manifest: Manifest) -> list[str]:
        settings = {**default_values(config), **manifest.settings}
        differing = differences(settings, asdict(config), changeable_names(Prepare))
        given_tables = [file for table in tables for file in table.record()]
        for name, asked, there in (
            ("input files", files, manifest.preparation.get("inputs", [])),
            ("files of tables", given_tables, manifest.preparation.get("tables", [])),
        ):
            recorded, given = ({entry["path"]: entry for entry in entries} for entries in (there, asked))
            if [*given.values()] != [*recorded.values()]:
                paths = [path for path in {**given, **recorded} if given.get(path) != recorded.get(path)]
                more = ", ..." if len(paths) > 3 else ""
                differing.append(f"{name} differ: {', '.join(paths[:3]) or 'their order'}{more}")
        extends = manifest.preparation.get("extends", {})
        record = {} if extended is None else earlier.record_of(extended)
        if {name: extends.get(name) for name in record or extends} != record:
            path = extends.get("dataset")
            as_then = " (as it was then)" if path == config.vocabulary else ""
            differing.append(f"vocabulary: {path}{as_then} there, {config.vocabulary} now")
        return differing

    return find_finished(config.output, Manifest.KIND.name, lambda path: Dataset.open(path).manifest, compare)
