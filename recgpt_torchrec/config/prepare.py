"""What the stage prepare can be told."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least

InputFormat = Literal["auto", "csv", "tsv", "jsonl", "parquet", "sequences", "recbole"]


@dataclass(kw_only=True)
class Prepare:
    """Turn raw interaction logs into a dataset: k-core filtering, dense ids in seeded random order, Parquet parts.

    Example: python -m recgpt_torchrec.prepare --input log.csv --output runs/mine/data
    """

    input: list[str]
    """Raw log: files, folders (searched to the bottom) or glob patterns; paths or URIs."""
    output: str
    """Folder of the new dataset, a path or a URI (s3://, gs://, hdfs://); must not exist, be empty, or hold the dataset
    that would be made (then nothing is done)."""
    input_format: InputFormat = "auto"
    """Format of the input. csv, tsv, jsonl and parquet: a row (or object) an interaction. sequences: a line a user,
    `user item item ...` in time order. recbole: tab separated with a header of name:type fields. auto goes by each
    file name's ending: .csv .tsv .jsonl .ndjson .parquet .txt (sequences) .inter (recbole), text also with .gz."""
    user_column: str = "user_id"
    """Column with the user key."""
    item_column: str = "item_id"
    """Column with the item key."""
    time_column: str | None = "timestamp"
    """Column with the event time: a number, kept in its own unit, or an ISO date-time, which becomes seconds since 1970
    (UTC unless it has an offset). null: rows are already in time order. Not used for sequences."""
    rating_column: str | None = None
    """Column with a number to keep beside each interaction, as the list column `ratings`; null keeps none."""
    click_column: str | None = None
    """Column that tells rows that were clicked (interactions) from rows that were only shown: a number, or true or
    false, which are 1 and 0; may be the rating_column. Shown rows become entries of segment 2, which generate_prompts
    takes with --prompts.source exposed; nothing else reads them. null: every row is an interaction."""
    click_from: float = 1
    """Smallest number in click_column that is a click; rows below were only shown. For ratings from 1 to 5 of which 1
    and 2 are dislikes: 3."""
    min_count: int = 5
    """Fewest interactions a kept user and a kept item must have (k-core, repeated until it converges); 1 keeps all."""
    vocabulary: str | None = None
    """Folder of an earlier dataset to extend: its users and items keep their ids and stay, however few interactions the
    log has of them; new ones that pass min_count get the ids after. The log must hold what their histories are to hold,
    so give that of the days before, too. Adds the column `trained`, which pretrain --targets new goes by."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether the same user, item and time, appearing again, is kept or dropped (before counting for min_count)."""
    seed: int = 0
    """Seed of the random order in which dense ids are given."""
    rows_per_group: int = 0
    """Users per Parquet row group, the unit that is streamed and shuffled; 0 makes 64 groups, of 16 to 8192 users."""
    groups_per_part: int = 16
    """Row groups per Parquet part file."""
    engine: Literal["duckdb", "pyspark"] = "duckdb"
    """What runs the preparation: duckdb on this machine; pyspark, for logs too large for it, is not available yet."""
    scratch: str | None = None
    """Local folder for temporary tables, about 50 bytes an interaction; null: beside the output."""
    memory_limit: str | None = None
    """Most memory the engine takes before it spills to scratch, such as 4GB; null: 80% of the machine's."""

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
        if not self.input:
            raise ValueError("--input is empty; name the files, folders or patterns of the raw log")
        if self.min_count < 1:
            raise ValueError(f"--min_count is {self.min_count}; it counts interactions and must be at least 1")
        if self.rows_per_group < 0:
            raise ValueError(f"--rows_per_group is {self.rows_per_group}; pass a number of users, or 0 to choose")
        if not abs(self.click_from) < float("inf"):
            raise ValueError(f"--click_from is {self.click_from}; it must be a finite number")
        if self.click_column is None and self.click_from != 1:
            raise ValueError(f"--click_from is {self.click_from}, but of which column? Name it with --click_column")
        if self.groups_per_part < 1:
            raise ValueError(f"--groups_per_part is {self.groups_per_part}; a file holds at least 1 row group")
