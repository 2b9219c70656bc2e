"""Stage `index`: an export -> the same export with a FAISS index of its item vectors, in shards."""

from recgpt_torchrec import cli
from recgpt_torchrec.config import BuildIndex
from recgpt_torchrec.texts.commands import next_line


def main(config: BuildIndex) -> None:
    """Build the index, measure it, and put it into the export."""
    from recgpt_torchrec.distributed.processes import print_result
    from recgpt_torchrec.distributed.watchdog import watched_group
    from recgpt_torchrec.retrieval.exports.reading import open_on_all_ranks
    from recgpt_torchrec.retrieval.search.indexing import add_index, summary

    with watched_group(config.stall_seconds):
        export = open_on_all_ranks(config.export)
        index, already_there = add_index(export, config.index)
        following = {"export": config.export, "data": export.manifest.dataset, "output": "LISTS_FOLDER"}
        print_result(
            summary(index),
            f"{'Already there' if already_there else 'Written'}: {config.export} ({index.kind} index)",
            next_line("retrieve", following),
            sep="\n",
        )


if __name__ == "__main__":
    cli.run(BuildIndex, main, "recgpt_torchrec.index")
