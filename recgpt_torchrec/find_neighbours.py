"""Stage `find_neighbours`: a dataset -> the items that most often follow each item, as soft targets of training."""

from recgpt_torchrec import cli
from recgpt_torchrec.config import FindNeighbours
from recgpt_torchrec.preparation.neighbours import Result, find_neighbours
from recgpt_torchrec.texts.commands import following
from recgpt_torchrec.texts.words import count, format_bytes


def main(config: FindNeighbours) -> None:
    """Find the neighbours, and print what was found."""
    print(summary(config, find_neighbours(config)))


def summary(config: FindNeighbours, result: Result) -> str:
    """What was read, found and written, and the next command."""
    manifest = result.manifest
    options = {"data": config.data, "neighbours.path": config.output, "output": "RUN_FOLDER"}
    following_line = f"next        {following('pretrain', options)}"
    if result.already_there:
        there = f"nothing to do: {config.output} already holds the neighbours of this dataset and these options"
        return f"{there}\n{following_line}"
    lines = [
        f"read        the training part of {config.data} ({manifest.interactions:,} interactions less those held out)",
        f"found       {manifest.pairs:,} pairs of different items, at most {config.window} positions apart",
        f"kept        the best {manifest.count} neighbours of each of {manifest.items:,} items",
    ]
    files = f"{format_bytes(manifest.size)} in {count(len(manifest.parts), 'file')}"
    lines += [f"wrote       {config.output} ({files}) in {result.seconds:.1f} s", following_line]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(FindNeighbours, main, "recgpt_torchrec.find_neighbours")
