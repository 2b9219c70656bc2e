"""Everything a user can set: one dataclass a stage, built from shared groups; each field with its unit and default.

The docstring under a field is what `--help` prints. Validation stands in `__post_init__`, with the fix in the message.
"""

from dataclasses import dataclass, field
from typing import Literal

InputFormat = Literal["auto", "csv", "tsv", "jsonl", "parquet", "sequences", "recbole"]


@dataclass(kw_only=True)
class Prepare:
    """Turn raw interaction logs into a dataset: k-core filtering, dense ids in seeded random order, Parquet parts."""

    input: list[str] = field(metadata={"nargs": "+", "help": "Raw log files, folders or glob patterns."})
    output: str
    """Folder of the new dataset; must not exist, be empty, or hold an earlier dataset made with the same settings."""
    input_format: InputFormat = "auto"
    """Format of the input; auto goes by the file name's ending (.csv, .tsv, .jsonl, .parquet, .inter, .txt)."""
    user_column: str = "user_id"
    """Column with the user key."""
    item_column: str = "item_id"
    """Column with the item key."""
    time_column: str | None = "timestamp"
    """Column with the event time: a number, or an ISO date-time. null: rows are already in time order."""
    min_count: int = 5
    """Fewest interactions a kept user and a kept item must have (k-core, repeated until it converges); 1 keeps all."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether the same user, item and time, appearing again, is kept or dropped."""
    seed: int = 0
    """Seed of the random order in which dense ids are given."""
    rows_per_group: int = 0
    """Users per Parquet row group, the unit that is streamed and shuffled; 0 picks it from the dataset's size."""
    groups_per_part: int = 16
    """Row groups per Parquet part file."""
    engine: Literal["duckdb", "pyspark"] = "duckdb"
    """What runs the preparation."""

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"--min_count is {self.min_count}; it counts interactions and must be at least 1")
