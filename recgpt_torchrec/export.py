"""Stage `export`: dataset and checkpoint -> item vectors and user vectors for an ANN index, or what changed in them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from recgpt_torchrec import cli
from recgpt_torchrec.config import Export
from recgpt_torchrec.texts.commands import next_line

if TYPE_CHECKING:
    from recgpt_torchrec.checkpoints.trained import Trained
    from recgpt_torchrec.data.dataset import Dataset, Manifest
    from recgpt_torchrec.data.inputs.request import Request
    from recgpt_torchrec.data.inputs.spec import Inputs
    from recgpt_torchrec.retrieval.exports.chain import Chain
    from recgpt_torchrec.retrieval.exports.manifest import DeltaManifest, ExportManifest


def main(config: Export) -> None:
    """Encode every user's history, and write the user vectors and the item vectors, or those that changed."""
    import numpy as np
    import torch

    from recgpt_torchrec.catalogue.catalogue import Catalogue
    from recgpt_torchrec.checkpoints.folder import checkpoint_fingerprint, find_checkpoint
    from recgpt_torchrec.checkpoints.settings import CheckpointSettings
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.data.inputs.events import check_asked
    from recgpt_torchrec.data.inputs.request import Request
    from recgpt_torchrec.data.inputs.time_units import choose_request_time
    from recgpt_torchrec.data.reading.targets import describe_untargeted
    from recgpt_torchrec.data.stream import encoding_stream
    from recgpt_torchrec.distributed.processes import print_result, rank, run_on_first_rank, world_size
    from recgpt_torchrec.distributed.watchdog import phase, report_phase, watched_group
    from recgpt_torchrec.evaluation.held_out import check_has_targets, explain_left_out
    from recgpt_torchrec.model.tabled.base import unwrapped
    from recgpt_torchrec.progress import progress_bar
    from recgpt_torchrec.retrieval.encoding import collect_batches, encode
    from recgpt_torchrec.retrieval.exports.chain import open_chain
    from recgpt_torchrec.retrieval.exports.writing import write_delta, write_export
    from recgpt_torchrec.retrieval.interests import predict_interests
    from recgpt_torchrec.serving.exported.program import check_onnx
    from recgpt_torchrec.training.loading import load

    with watched_group(config.stall_seconds, config.device) as device:
        dataset, checkpoint = Dataset.open(config.data), find_checkpoint(config.checkpoint)
        settings = {**asdict(config), "checkpoint": checkpoint}
        del settings["index"], settings["encoder"]  # no part of what identifies an export
        if config.history != "all":
            check_has_targets(dataset, config.history, "Export whole histories: --history all")
            if dataset.manifest.hold_out != "last":
                settings["hold_out"] = dataset.manifest.hold_out
        inputs, request = CheckpointSettings.read(checkpoint).inputs, Request()
        if config.history == "all":
            request = Request(time=choose_request_time(config.time, inputs, checkpoint, dataset))
        settings["time"] = request.time
        if config.event is not None:
            check_asked(inputs, checkpoint, "--event", config.event)
            request = replace(request, event=inputs.id_of_event(config.event))
        fingerprint = checkpoint_fingerprint(checkpoint)
        chain = open_chain(config.since) if config.since else None
        if chain is not None:
            form = {name: getattr(config, name) for name in ("dtype", "interests", "history", "event")}
            chain.check_fits(dataset, **form, hold_out=settings.get("hold_out", "last"))
        manifest = run_on_first_rank(lambda: finished(config, settings, dataset, fingerprint, chain))
        already_there = manifest is not None
        absent = dataset.manifest.preparation.get("extends", {}).get("absent_users", 0)
        load_model = cache(partial(load, checkpoint, dataset, config.tables, bags=config.batch.tokens, device=device))
        if config.encoder.onnx:
            check_onnx()
        if manifest is None:
            report_phase("loading the checkpoint")
            trained = load_model()
            model = unwrapped(trained.model)
            steps = config.interests - 1
            stream = encoding_stream(
                dataset,
                config.history,
                trained.config,
                config.batch,
                trained.prompts,
                grows=steps,
                item_keys=model.item_keys,
                feedback=trained.feedback,
                inputs=trained.inputs,
                attributes=trained.attributes,
                request=request,
            )
            catalogue = Catalogue.of_model(model, dataset.manifest.items, device)

            def users() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                total = dataset.manifest.users if rank() == 0 else None
                with progress_bar(total, "users", active=rank() == 0) as bar:
                    batches = encode(trained.model, stream, device)
                    for collected in collect_batches(batches, catalogue.rows_per_pass if steps else None):
                        ids = np.concatenate([histories.users for histories, _ in collected])
                        vectors = torch.cat([vectors for _, vectors in collected])
                        if steps:
                            vectors = predict_interests(
                                trained.model, stream.maker, collected, catalogue, config.interests
                            )
                        bar.update(min(ids.size * world_size(), dataset.manifest.users - bar.n))
                        yield ids, vectors.cpu().numpy()

            write: Callable[..., ExportManifest | DeltaManifest]
            if chain is None:
                write = partial(write_export, dim=trained.config.dim, interests=config.interests, dtype=config.dtype)
            else:
                chain.check_fits(dataset, dim=trained.config.dim)
                write = partial(write_delta, chain=chain, tolerance=config.tolerance)
            report_phase("encoding items and users")
            manifest = write(
                config.output,
                dataset,
                items=catalogue.share(),
                users=users(),
                everyone=config.history == "all" and not absent and not inputs.history_events,
                checkpoint=checkpoint,
                checkpoint_fingerprint=fingerprint,
                settings=settings,
            )
        with phase("adding the index", computes=True):
            index_summary, index_added = add_asked_index(config)
        with phase("adding the encoder", computes=True):
            encoder_summary, encoder_added = add_asked_encoder(config, checkpoint, dataset, load_model)
        already_there &= not (index_added or encoder_added)
        vectors_each = f", {manifest.interests} vectors each" if manifest.interests > 1 else ""
        left_out = dataset.manifest.users - manifest.users
        reason = explain_left_out(dataset.manifest, config.history, inputs)
        left_out_note = f"; {left_out:,} users left out: {reason}" if left_out else ""
        print_result(
            f"{'Already there' if already_there else 'Written'}: {config.output} ({manifest.items:,} items, "
            f"{manifest.users:,} users{vectors_each}{left_out_note})",
            *explain_shared(dataset.manifest, config.data),
            *describe_untargeted(dataset.manifest, bool(inputs.of_entity("item"))),
            *describe_request(request, inputs, dataset, chain),
            *index_summary,
            *encoder_summary,
            sep="\n",
        )
        print_result(*(next_steps(config) if chain is None else changes(config, manifest, chain)), sep="\n")


def explain_shared(manifest: "Manifest", data: str) -> list[str]:
    """Which vectors belong to several keys, where ids are hashes of keys."""
    tables = manifest.preparation.get("ids", {}).get("tables", [])
    return [
        f"Note:    {table['shared']:,} {table['entity']} vectors belong to several keys each ({table['keys']:,} keys, "
        f"{getattr(manifest, table['entity'] + 's'):,} vectors). The key beside a vector is the most frequent of its "
        f"keys; {data}/{table['entity']}_keys lists all"
        for table in tables
        if table["shared"]
    ]


def describe_request(request: "Request", inputs: "Inputs", dataset: "Dataset", chain: "Chain | None") -> list[str]:
    """The event type and the time of the request that vectors are made for, and what the time means for a delta."""
    from recgpt_torchrec.data.inputs.time_units import describe_time
    from recgpt_torchrec.data.reading.footers import time_range

    lines = [f"event    asked for: {inputs.events[request.event - 1]}"] if request.event else []
    if request.time is None:
        return lines
    newest = (time_range(dataset) or (0, request.time))[1]
    which = "the newest time of the dataset" if newest == request.time else "given with --time"
    lines += [f"time     of the request: {describe_time(request.time, inputs.time_unit)} ({which})"]
    if newest > request.time:
        lines.append(
            f"note     the dataset has interactions up to {describe_time(newest, inputs.time_unit)}; a user whose last "
            "one is after the request counts as active at that moment"
        )
    earlier = None if chain is None else chain.last.manifest.settings.get("time")
    if chain is not None and earlier != request.time:
        lines.append(
            f"note     {chain.last.path} is for another time: vectors of all users move with it. For deltas of those "
            "with new interactions alone, export each of them with the same --time"
        )
    return lines


def next_steps(config: Export) -> list[str]:
    """What to do with an export."""
    return [
        "A user's score for an item is the inner product of their vectors: index items/*.parquet for maximum inner "
        "product and query it with users/*.parquet, or let retrieve do both",
        next_line("retrieve", {"export": config.output, "data": config.data, "output": "LISTS_FOLDER"}),
    ]


def changes(config: Export, manifest: "DeltaManifest", chain: "Chain") -> list[str]:
    """What a delta holds, and what to do with it."""
    lines = []
    for name in ("items", "users"):
        count, new = getattr(manifest, name), getattr(manifest, f"new_{name}")
        sent = sum(part.rows for part in getattr(manifest, f"{name[:-1]}_parts"))
        gone = sum(part.rows for part in getattr(manifest, f"removed_{name[:-1]}_parts"))
        lines.append(
            f"{name:<9}{new:,} new, {sent - new:,} moved, {gone:,} removed: {sent:,} of {count:,} sent "
            f"({sent / count:.2%})"
        )
    share = manifest.size / chain.export.manifest.size
    return [
        *lines,
        f"size     {manifest.size:,} bytes, {share:.2%} of {chain.export.path}",
        "A vector store that holds the state of --since takes it as it is: upsert items/ and users/, delete removed_*/",
        next_line(
            "apply",
            {"export": chain.export.path, "deltas": [*chain.paths[1:], config.output], "output": "NEW_EXPORT"},
        ),
    ]


def add_asked_index(config: Export) -> tuple[list[str], bool]:
    """Add the index that the options ask for to the export, which is complete without it (collective).

    Returns:
        Lines for the summary, and whether an index was built or measured.
    """
    if config.index.kind == "none":
        return [], False
    from recgpt_torchrec.retrieval.exports.reading import open_on_all_ranks
    from recgpt_torchrec.retrieval.search.indexing import add_index, summary

    index, already_there = add_index(open_on_all_ranks(config.output), config.index)
    return [summary(index)], not already_there


def add_asked_encoder(
    config: Export, checkpoint: str, dataset: "Dataset", load: "Callable[[], Trained]"
) -> tuple[list[str], bool]:
    """Add the encoder that the options ask for to the export, which is complete without it (collective).

    Returns:
        Lines for the summary, and whether an encoder was written.
    """
    if config.encoder.kind == "none":
        return [], False
    from recgpt_torchrec.retrieval.exports.reading import open_on_all_ranks
    from recgpt_torchrec.serving.exported.writing import add_encoder, describe

    export = open_on_all_ranks(config.output)
    encoder, already_there = add_encoder(export, config.encoder, checkpoint, dataset, load)
    return [describe(encoder)], not already_there


def finished(
    config: Export, settings: dict[str, Any], dataset: "Dataset", fingerprint: str, chain: "Chain | None"
) -> "Any":
    """The manifest of the finished export or delta in the output folder; None if there is none yet.

    Args:
        config: of this stage.
        settings: its options, as the manifest records them.
        dataset: the dataset to export from.
        fingerprint: of the checkpoint.
        chain: what a delta is compared with; None: an export is asked for.

    Raises:
        InputError: the folder holds something else, or a result of another checkpoint, dataset or other options.
    """
    from recgpt_torchrec.config.fields import changeable_names, default_values
    from recgpt_torchrec.data.dataset import histories_fingerprint
    from recgpt_torchrec.retrieval.exports.reading import open_delta, open_export
    from recgpt_torchrec.storage.finished import differences, find_finished, flatten

    inputs = {
        "vocabulary": dataset.manifest.vocabulary,
        "dataset_fingerprint": histories_fingerprint(dataset),
        "checkpoint_fingerprint": fingerprint,
    }
    if chain is not None:
        inputs["base"] = chain.state

    def compare(manifest: "ExportManifest | DeltaManifest") -> list[str]:
        recorded = {name: getattr(manifest, name) for name in inputs}
        found = {**flatten(default_values(config)), **flatten(manifest.settings), **recorded}
        return differences(found, {**settings, **inputs}, changeable_names(Export))

    if chain is None:
        return find_finished(config.output, "export", lambda path: open_export(path).manifest, compare)
    return find_finished(config.output, "delta", lambda path: open_delta(path).manifest, compare)


if __name__ == "__main__":
    cli.run(Export, main, "recgpt_torchrec.export")
