"""Stage `find_neighbours`: a dataset -> the items that most often follow each item, as soft targets of training."""

from recgpt_torchrec import cli
from recgpt_torchrec.config import FindNeighbours
from recgpt_torchrec.preparation.neighbours import Result, find_neighbours
from recgpt_torchrec.texts.commands import following


def main(config: FindNeighbours) -> None:
    """Find the neighbours, and print what was found."""
    print(summary(config, find_neighbours(config)))


def summary(config: FindNeighbours, result: Result) -> str:
    """What was read, found and written, and the next command."""
    manifest = result.manifest
    lines = [
        f"read        the training part of {config.data} ({manifest.interactions:,} interactions less those held out)",
        f"found       {manifest.pairs:,} pairs of different items, at most {config.window} positions apart",
        f"kept        the best {manifest.count} neighbours of each of {manifest.items:,} items",
    ]
    if result.already_there:
        lines.append(f"nothing to do: {config.output} already holds the neighbours of this dataset and these options")
    else:
        megabytes = manifest.size / 10**6
        files = f"{megabytes:,.1f} MB, {len(manifest.parts):,} part{'s' * (len(manifest.parts) != 1)}"
        lines.append(f"wrote       {config.output} ({files}) in {result.seconds:.1f} s")
    options = {"data": config.data, "neighbours.path": config.output, "output": "RUN_FOLDER"}
    lines.append(f"next        {following('pretrain', options)}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(FindNeighbours, main, "recgpt_torchrec.find_neighbours")
