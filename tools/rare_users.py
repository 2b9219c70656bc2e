"""Writes the log of a dataset in which some users have few interactions, to see what their attributes are worth.

    python -m recgpt_torchrec.prepare --input ../shared/data/ml-100k.inter --output runs/rare/whole
    python tools/rare_users.py --data runs/rare/whole --output runs/rare/log.parquet --share 0.3 --keep 5

A share of the users is drawn; only their newest --keep interactions stay, of which a dataset holds out two. Other users
keep theirs. In the report of `pipelines/inputs.py` on this log they are the group of the shortest histories.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.feedback import keys_of  # noqa: E402
from recgpt_torchrec.data.dataset import Dataset  # noqa: E402
from recgpt_torchrec.data.reading.reader import Reader  # noqa: E402
from recgpt_torchrec.data.segments import INTERACTED  # noqa: E402
from recgpt_torchrec.data.windows import row_groups  # noqa: E402
from recgpt_torchrec.errors import InputError  # noqa: E402


def keep_newest(dataset: Dataset, share: float, keep: int, seed: int) -> tuple[pa.Table, int]:
    """The log of a dataset in which a share of the users have their newest `keep` interactions alone.

    Returns:
        log: user_id, item_id, timestamp; users in the order of the dataset.
        users: number of users that were drawn.

    Raises:
        InputError: the dataset is damaged, or has no timestamps.
    """
    count = dataset.manifest.users
    rare = np.zeros(count, dtype=bool)
    rare[np.random.default_rng(seed).permutation(count)[: round(share * count)]] = True
    user_keys, item_keys = (
        keys_of(dataset, parts) for parts in (dataset.manifest.user_parts, dataset.manifest.item_parts)
    )
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    for group in row_groups(dataset):
        table = Reader(dataset, times=True).read(group).table
        if "timestamps" not in table.schema.names:
            raise InputError(f"{dataset.path} has no timestamps; prepare a log with --time_column")
        names = ["user_id", "item_ids", "timestamps"]
        segments = table["segment_ids"].to_pylist() if "segment_ids" in table.schema.names else [None] * table.num_rows
        for (user, entries, moments), kinds in zip(
            zip(*table.select(names).to_pydict().values(), strict=True), segments, strict=True
        ):
            if kinds is not None:  # what was shown is no interaction
                chosen = [place for place, kind in enumerate(kinds) if kind == INTERACTED]
                entries, moments = [entries[place] for place in chosen], [moments[place] for place in chosen]
            kept = slice(max(len(entries) - keep, 0) if rare[user] else 0, None)
            users += [user_keys[user]] * len(entries[kept])
            items += [item_keys[item] for item in entries[kept]]
            times += moments[kept]
    return pa.table({"user_id": users, "item_id": items, "timestamp": times}), int(rare.sum())


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write the log, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the dataset")
    parser.add_argument("--output", required=True, help="file of the log, ending in .parquet")
    parser.add_argument("--share", type=float, default=0.3, help="share of the users that is rare (default: 0.3)")
    parser.add_argument("--keep", type=int, default=5, help="their newest interactions that stay (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    options = parser.parse_args(arguments)
    if not 0 <= options.share <= 1 or options.keep < 3 or not options.output.endswith(".parquet"):
        parser.error("--share is from 0 to 1, --keep at least 3, and --output ends in .parquet")
    try:
        log, users = keep_newest(Dataset.open(options.data), options.share, options.keep, options.seed)
    except InputError as error:
        parser.error(str(error))
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(log, options.output)
    print(
        f"wrote {options.output}: {log.num_rows:,} interactions; {users:,} users have the newest {options.keep} alone",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
