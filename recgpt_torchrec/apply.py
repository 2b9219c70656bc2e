"""Program `apply`: an export and the deltas after it -> the export that is whole after them."""

from typing import TYPE_CHECKING

from recgpt_torchrec import cli
from recgpt_torchrec.config import Apply
from recgpt_torchrec.texts.commands import next_line
from recgpt_torchrec.texts.words import agree

if TYPE_CHECKING:
    from recgpt_torchrec.retrieval.exports.chain import Chain
    from recgpt_torchrec.retrieval.exports.manifest import ExportManifest


def main(config: Apply) -> None:
    """Write the rows of the export that no delta changes, and those of the deltas that no later one changes."""
    from recgpt_torchrec.distributed.processes import silence_libraries
    from recgpt_torchrec.retrieval.exports.applying import apply_deltas
    from recgpt_torchrec.retrieval.exports.chain import open_chain

    silence_libraries()
    chain = open_chain([config.export, *config.deltas])
    manifest = finished(config, chain)
    already_there = manifest is not None
    if manifest is None:
        manifest = apply_deltas(config.output, chain)
    said = (
        f"{'Already there' if already_there else 'Written'}: {config.output} ({manifest.items:,} items, "
        f"{manifest.users:,} users; {config.export} after {len(config.deltas)} deltas)"
    )
    print(agree(said))
    print(next_line("retrieve", {"export": config.output, "data": manifest.dataset, "output": "LISTS_FOLDER"}))


def finished(config: Apply, chain: "Chain") -> "ExportManifest | None":
    """The manifest of the export of this state in the output folder; None if there is none yet.

    Raises:
        InputError: the folder holds something else, or an export of another state.
    """
    from recgpt_torchrec.retrieval.exports.reading import Export, open_export
    from recgpt_torchrec.storage.finished import differences, find_finished

    def compare(export: Export) -> list[str]:
        return differences({"state": export.state}, {"state": chain.state})

    export = find_finished(config.output, "export", open_export, compare)
    return None if export is None else export.manifest


if __name__ == "__main__":
    cli.run(Apply, main, "recgpt_torchrec.apply")
