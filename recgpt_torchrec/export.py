"""Stage `export`: dataset and checkpoint -> item vectors and user vectors for an ANN index, or what changed in them."""

from functools import cache, partial
from typing import TYPE_CHECKING

from recgpt_torchrec import cli
from recgpt_torchrec.config import Export

if TYPE_CHECKING:
    from collections.abc import Callable

    from recgpt_torchrec.checkpoints.trained import Trained
    from recgpt_torchrec.data.dataset import Dataset


def main(config: Export) -> None:
    """Encode every user's history, and write the user vectors and the item vectors, or those that changed."""
    from recgpt_torchrec.checkpoints.folder import find_checkpoint
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.data.reading.targets import describe_untargeted
    from recgpt_torchrec.distributed.processes import print_result, run_on_first_rank
    from recgpt_torchrec.distributed.watchdog import phase, report_phase, watched_group
    from recgpt_torchrec.evaluation.held_out import check_has_targets, explain_left_out
    from recgpt_torchrec.retrieval import export_summary as summary
    from recgpt_torchrec.retrieval.export_making import Asked
    from recgpt_torchrec.serving.exported.program import check_onnx
    from recgpt_torchrec.training.loading import load

    with watched_group(config.stall_seconds, config.device) as device:
        dataset, checkpoint = Dataset.open(config.data), find_checkpoint(config.checkpoint)
        if config.history != "all":
            check_has_targets(dataset, config.history, "Export whole histories: --history all")
        asked = Asked.of(config, dataset, checkpoint)
        manifest = run_on_first_rank(asked.find_finished)
        already_there = manifest is not None
        load_model = cache(partial(load, checkpoint, dataset, config.tables, bags=config.batch.tokens, device=device))
        if config.encoder.onnx:
            check_onnx()
        if manifest is None:
            report_phase("loading the checkpoint")
            manifest = asked.write(load_model(), device)
        with phase("adding the index", computes=True):
            index_summary, index_added = add_asked_index(config)
        with phase("adding the encoder", computes=True):
            encoder_summary, encoder_added = add_asked_encoder(config, checkpoint, dataset, load_model)
        already_there &= not (index_added or encoder_added)
        reason = explain_left_out(dataset.manifest, config.history, asked.inputs)
        contents = summary.describe_contents(config, manifest, dataset, reason)
        print_result(
            f"{'Already there' if already_there else 'Written'}: {contents}",
            *summary.explain_shared(dataset.manifest, config.data),
            *describe_untargeted(dataset.manifest, bool(asked.inputs.of_entity("item"))),
            *summary.describe_request(asked.request, asked.inputs, dataset, asked.chain),
            *index_summary,
            *encoder_summary,
            *summary.describe_following(config, manifest, asked.chain),
            sep="\n",
        )


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


if __name__ == "__main__":
    cli.run(Export, main, "recgpt_torchrec.export")
