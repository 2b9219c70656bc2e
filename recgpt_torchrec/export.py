"""Stage `export`: dataset and checkpoint -> item vectors and user vectors as Parquet, for an ANN index."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from recgpt_torchrec import cli
from recgpt_torchrec.config import Export
from recgpt_torchrec.errors import InputError


def main(config: Export) -> None:
    """Encode every user's history, and write the vectors beside those of the items."""
    import numpy as np

    from recgpt_torchrec.building import encoding_stream, load
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.model.recgpt import unwrapped
    from recgpt_torchrec.progress import bar
    from recgpt_torchrec.retrieval.export_folder import write_export
    from recgpt_torchrec.retrieval.ranking import encode, gather_table
    from recgpt_torchrec.training.checkpoint import find
    from recgpt_torchrec.training.processes import process_group, rank, say, world_size

    with process_group() as device:
        dataset, checkpoint = Dataset.open(config.data), find(config.checkpoint)
        settings = {**asdict(config), "checkpoint": checkpoint}
        already = finished(config.output, settings, dataset.manifest.vocabulary)
        if not already:
            trained = load(checkpoint, dataset, config.batch, config.tables, device)
            prompts = trained.tuning is not None and trained.tuning.prompts
            stream = encoding_stream(dataset, config.history, trained.config, config.batch, prompts=prompts)
            catalogue = (
                gather_table(unwrapped(trained.model).scoring_table, dataset.manifest.items, device).cpu().numpy()
            )
            ids = np.arange(dataset.manifest.items)
            mine = np.array_split(ids, world_size())[rank()]

            def users() -> Iterator[tuple[np.ndarray, np.ndarray]]:
                total = dataset.manifest.users if rank() == 0 else None
                with bar(total, "users", active=rank() == 0) as shown:
                    for sequences, vectors in encode(trained.model, stream, device):
                        shown.update(sequences.users.size * world_size())
                        yield sequences.users, vectors.cpu().numpy()

            write_export(
                config.output,
                dataset,
                items=[(mine, catalogue[mine])],
                users=users(),
                dim=trained.config.dim,
                checkpoint=checkpoint,
                settings=settings,
            )
        say(
            f"{'Already there' if already else 'Written'}: {config.output} "
            f"({dataset.manifest.items:,} item vectors, {dataset.manifest.users:,} user vectors)\n"
            "A user's score of an item is the inner product of their vectors: index items/*.parquet for maximum inner "
            "product, and query it with users/*.parquet"
        )


def finished(path: str, settings: dict[str, Any], vocabulary: str) -> bool:
    """Whether `path` holds the export of the same checkpoint, dataset and options."""
    from recgpt_torchrec.data.dataset import MANIFEST, filesystem
    from recgpt_torchrec.retrieval.export_folder import open_export

    fs, root = filesystem(path)
    if not fs.get_file_info(f"{root}/{MANIFEST}").is_file:
        return False  # nothing, or something else, which the writer refuses to touch
    manifest = open_export(path).manifest
    if (manifest.settings, manifest.vocabulary) != (settings, vocabulary):
        raise InputError(
            f"{path} holds another export (checkpoint {manifest.checkpoint}, dataset {manifest.dataset}); "
            "choose another --output"
        )
    return True


if __name__ == "__main__":
    cli.run(Export, main, "recgpt_torchrec.export")
