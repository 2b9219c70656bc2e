"""Stage `prepare`: a raw interaction log -> a dataset of sequence Parquet, id vocabularies and a manifest."""

from typing import Any

from recgpt_torchrec import cli
from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Manifest
from recgpt_torchrec.data.days.records import day_of, path_of
from recgpt_torchrec.data.split import EVALUATION
from recgpt_torchrec.preparation.days.appending import append
from recgpt_torchrec.preparation.pipeline import Result, prepare
from recgpt_torchrec.texts.commands import following
from recgpt_torchrec.texts.words import agree, format_bytes


def main(config: Prepare) -> None:
    """Prepare the dataset, and print what became of the log."""
    if config.append:
        print(agree(summarize_day(config, append(config))))
    else:
        print(agree(summary(config, prepare(config))))


def summary(config: Prepare, result: Result) -> str:
    """What was read, what was dropped and why, what was written, and the next command."""
    manifest, record = result.manifest, result.manifest.preparation
    rounds, lengths = record["rounds"], record["lengths"]
    lines = describe_reading(config, record)
    if "unknown_left_out" in record:
        lines.append(
            f"new keys    {record['unknown_left_out']:,} interactions left out, of users or items that "
            f"{config.vocabulary} lacks"
        )
    if "repeats_collapsed" in record:
        lines.append(f"repeats     {record['repeats_collapsed']:,} of the item just before, collapsed")
    for number, step in enumerate(rounds, 1):
        removed = ", ".join(f"{step[f'{what}_removed']:,} {what}" for what in ("users", "items", "interactions"))
        lines.append(f"{f'{config.min_count}-core' if number == 1 else '':<11} round {number} removed {removed}")
    if not rounds:
        lines.append(f"{f'{config.min_count}-core':<11} removed nothing")
    lines += describe_events(config, record)
    if exposed := record.get("exposed"):
        lines.append(
            f"shown       {exposed['rows']:,} rows were not clicked; {exposed['left']:,} kept after an interaction"
        )
        if told := [f"{exposed[kind]:,} {kind}" for kind in ("disliked", "skipped") if kind in exposed]:
            lines.append(f"{'':<11} of those kept {' and '.join(told)}")
        reasons_by_name = {
            "duplicates_dropped": "repeated",
            "unknown": "of users or items that were not kept",
            "outside": "before a user's first interaction",
        }
        if dropped := [f"{exposed[name]:,} {reason}" for name, reason in reasons_by_name.items() if exposed[name]]:
            lines.append(f"{'':<11} dropped {', '.join(dropped)}")
    lines += describe_ids(manifest)
    if extends := record.get("extends"):
        lines.append(
            f"extends     {extends['dataset']}: {extends['users']:,} users and {extends['items']:,} items keep their "
            f"ids; {manifest.users - extends['users']:,} users and {manifest.items - extends['items']:,} items are new"
        )
        if extends["absent_users"] or extends["absent_items"]:
            absent = f"{extends['absent_users']:,} users and {extends['absent_items']:,} items"
            lines.append(f"{'':<11} {absent} of that dataset do not occur in this log")
        lines.append(f"{'':<11} {extends['new_targets']:,} targets of the training part are new (--targets new)")
    quantiles = ", ".join(f"{key} {value:,}" for key, value in lengths.items())
    lines += [
        f"dataset     {manifest.users:,} users, {manifest.items:,} items, {manifest.interactions:,} interactions",
        f"lengths     {quantiles}",
        *describe_split(manifest),
    ]
    if manifest.users > 10 and lengths["max"] > manifest.interactions / 2:
        share = lengths["max"] / manifest.interactions
        lines.append(line("note", f"one user has {share:.0%} of all interactions: a word for `no user`, or a robot?"))
    lines += [line(label, text) for label, text in record.get("page", []) if label == "note"]
    if result.already_there:
        lines.append(f"nothing to do: {config.output} already holds the dataset of this input and these options")
    else:
        written = f"{format_bytes(manifest.size)} in {len(manifest.all_parts)} files"
        lines.append(f"wrote       {config.output} ({written}) in {result.seconds:.1f} s")
    more = {"initial": "EARLIER_RUN", "targets": "new"} if extends else {}
    lines.append(line("next", following("pretrain", {"data": config.output, "output": "RUN_FOLDER", **more})))
    if extends:
        lines.append(line("", "with the --config and the options of that run"))
    return "\n".join(lines)


def describe_events(config: Prepare, record: dict[str, Any]) -> list[str]:
    """How many rows of each event type were read, where there are types."""
    if not (events := record.get("events")):
        return []
    counts = [f"{word} {count:,}" for word, count in events["rows"].items()]
    counts += [f"unknown {events['unknown']:,}"] if events["unknown"] else []
    return [line("events", f"{', '.join(counts)} ({config.event_column})")]


def describe_ids(manifest: Manifest) -> list[str]:
    """What became of keys where ids are slots of a table of fixed size; nothing of vocabularies."""
    record, lines = manifest.preparation.get("ids"), []
    for table in record["tables"] if record else []:
        used, rows, entity = getattr(manifest, f"{table['entity']}s"), table["rows"], table["entity"]
        text = f"{used:,} of {rows:,} rows of {entity}s are used ({used / rows:.0%})"
        if table["ids"] == "hash":
            text += f"; {table['shared']:,} of them are shared, {table['keys']:,} keys in all"
        else:
            text += f"; {table['evicted']:,} keys lost theirs to new ones, {table['refused']:,} keys have none"
        lines.append(line("ids", text))
    if record and record["left_out"]:
        lines.append(line("", f"{record['left_out']:,} interactions left out, whose user or item has no row"))
    if record and record.get("forgotten"):
        lines.append(line("", f"{record['forgotten']:,} entries of earlier days left out, whose item has lost its row"))
    return lines


def describe_reading(config: Prepare, record: dict[str, Any]) -> list[str]:
    """The lines on what was read of the log, and which rows were left out."""
    files, rejected = record["inputs"], record["rejected"]
    folder = record["rejected_parts"][0]["path"].rpartition("rejected/")[0] if rejected else ""
    folder = f"{config.output}/{folder}".rstrip("/")
    name = files[0]["path"] if len(files) == 1 else f"{len(files)} files"
    lines = [f"read        {record['rows']:,} rows of {name} ({format_bytes(sum(file['bytes'] for file in files))})"]
    lines += [line(label, text) for label, text in record.get("page", []) if label != "note"]
    if filtered := record.get("filtered"):
        unknown = record["uncomputed"]
        why = f"; {unknown:,} of them have no value for it, or one of another type" if unknown else ""
        lines.append(f"where       {filtered:,} rows left out ({filtered / record['rows']:.2%}): {config.where}{why}")
    if rejected:
        total = sum(rejected.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        lines.append(f"rejected    {total:,} rows ({total / record['rows']:.2%}): {reasons}; see {folder}/rejected")
    if record["duplicates_dropped"]:
        lines.append(f"duplicates  {record['duplicates_dropped']:,} dropped")
    return lines


def summarize_day(config: Prepare, result: Result) -> str:
    """What was read, what of it was new, what was written, and the next command, for `--append`."""
    manifest, record, day = result.manifest, result.manifest.preparation, result.manifest.day
    assert day is not None
    lines = describe_reading(config, record)
    if day.repeated:
        lines.append(line("repeated", f"{day.repeated:,} rows left out: an earlier day has them"))
    if day.too_late:
        lines.append(
            line("too late", f"{day.too_late:,} rows left out: older than the newest {day.history:,} of their user")
        )
    if day.late:
        lines.append(
            line("late", f"{day.late:,} interactions are older than others of their user, and were put in their place")
        )
    if "repeats_collapsed" in record:
        lines.append(line("repeats", f"{record['repeats_collapsed']:,} of the item just before, collapsed"))
    lines += describe_events(config, record)
    extends = record.get("extends", {"users": 0, "items": 0})
    rows = sum(part.rows for part in manifest.sequences)
    lines += [
        line("day", f"{day.number} of {config.output}: {day.new:,} new interactions of {rows:,} users"),
        line("targets", f"{record['split']['training_targets']:,} new ones to train on"),
        line(
            "keys",
            f"{manifest.users - extends['users']:,} users and {manifest.items - extends['items']:,} items are new",
        ),
        *describe_ids(manifest),
        line("so far", f"{manifest.users:,} users, {manifest.items:,} items, {day.total:,} interactions"),
    ]
    if config.hold_out == "none":
        lines.append(line("held out", "nothing (--hold_out none)"))
    else:
        of_day = " of the day" if any(table.ids == "managed" for table in manifest.id_tables) else ""
        users = f"{day.held_out_users:,} users{of_day}"
        lines.append(line("held out", f"the last two interactions of {users}, until later ones come"))
    lines += [line(label, text) for label, text in record.get("page", []) if label == "note"]
    if result.already_there:
        lines.append(f"nothing to do: {config.output} already holds this input, as day {day.number}")
    else:
        own = [part for part in manifest.all_parts if day_of(part) == day.number]
        written = f"{format_bytes(sum(part.bytes for part in own))} in {len(own)} files"
        lines.append(f"wrote       {path_of(config.output, day.number)} ({written}) in {result.seconds:.1f} s")
    lines.append(line("next", following("pretrain", {"data": config.output, "output": "RUN_FOLDER"})))
    return "\n".join(lines)


def line(label: str, text: str) -> str:
    """A line of the summary: a label, and a text that may be long."""
    return f"{label:<11} {text}"


def describe_split(manifest: Manifest) -> list[str]:
    """The lines on what is held out, how many users have held-out items, and which items are never trained on."""
    record = manifest.preparation.get("split")
    if record is None:
        return []
    hold_out, counts = manifest.hold_out, record["interactions"]
    lines = [f"held out    nothing (--hold_out none): all {counts['training']:,} interactions are trained on"]
    if hold_out != "none":
        begins = [f"{name} from time {record[f'{name}_from']}" for name in EVALUATION if f"{name}_from" in record]
        parts = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        lines = [f"held out    --hold_out {hold_out}: {', '.join([*begins, f'interactions {parts}'])}"]
        with_item = " and ".join(
            f"{record[f'{name}_users']:,} have a {name} item" for name in EVALUATION if counts[name]
        )
        lines.append(f"{'':<11} of {manifest.users:,} users {with_item or 'none has a held-out item'}")
    if record["unused"]:
        lines.append(
            f"{'':<11} {record['unused']:,} held-out interactions are neither ranked nor in a history before one"
        )
    if without := record["items_without_target"]:
        cure = "" if hold_out == "none" else "held out or "
        unseen = "they have no interactions, or " if manifest.settings.get("catalogue") == "items" else ""
        lines.append(
            f"targets     {without:,} of {manifest.items:,} items ({without / manifest.items:.1%}) are never a training"
            f" target: {unseen}their interactions are {cure}first in a history"
            + ("" if hold_out == "none" else "; --hold_out none trains on the held-out ones")
        )
    return lines


if __name__ == "__main__":
    cli.run(Prepare, main, "recgpt_torchrec.prepare")
