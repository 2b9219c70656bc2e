"""Stage `index`: an export -> the same export with a FAISS index of its item vectors, in shards."""

from recgpt_torchrec import cli
from recgpt_torchrec.config import BuildIndex


def main(config: BuildIndex) -> None:
    """Build the index, measure it, and put it into the export."""
    from recgpt_torchrec.distributed.processes import print_result
    from recgpt_torchrec.distributed.watchdog import watched_group
    from recgpt_torchrec.retrieval.exports.reading import open_on_all_ranks
    from recgpt_torchrec.retrieval.search.indexing import add_index, summary

    with watched_group(config.stall_seconds):
        index, already_there = add_index(open_on_all_ranks(config.export), config.index)
        print_result(
            summary(index),
            f"{'Already there' if already_there else 'Written'}: {config.export} ({index.kind} index)",
            f"Next:    python -m recgpt_torchrec.retrieve --export {config.export} --output LISTS_FOLDER",
            sep="\n",
        )


if __name__ == "__main__":
    cli.run(BuildIndex, main, "recgpt_torchrec.index")
