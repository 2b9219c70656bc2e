"""Options of the stage prepare."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.config.checks import at_least
from recgpt_torchrec.config.fields import changeable

InputFormat = Literal["auto", "csv", "tsv", "jsonl", "parquet", "sequences", "recbole"]


@dataclass(kw_only=True)
class Prepare:
    """Turn a raw interaction log into a dataset: k-core filtering, dense ids in seeded random order, Parquet parts.

    Example: python -m recgpt_torchrec.prepare --input log.csv --output data/mine
    """

    input: list[str] = changeable()
    """Raw log: files, folders (searched recursively) or glob patterns; paths or URIs."""
    output: str = changeable()
    """Folder of the new dataset, a path or a URI (s3://, gs://, hdfs://). It must be new or empty, unless it already
    holds this result; then nothing is done."""
    input_format: InputFormat = "auto"
    """Format of the input. csv, tsv, jsonl, parquet: one row (or object) per interaction. sequences: one line per user,
    `user item item ...` in time order. recbole: tab-separated with a header of name:type fields. auto: by the ending of
    each file name, .csv .tsv .jsonl .ndjson .parquet .txt (sequences) .inter (recbole); text formats also with .gz."""
    user_column: str = "user_id"
    """Column with the user key."""
    item_column: str = "item_id"
    """Column with the item key."""
    time_column: str | None = "timestamp"
    """Column with the event time: a number, kept in its own unit, or an ISO date-time, converted to seconds since 1970
    (UTC unless it has an offset). null: rows are already in time order. Not used for sequences."""
    rating_column: str | None = None
    """Column with a number to store with each interaction, in the list column `ratings`; null: none."""
    click_column: str | None = None
    """Column that tells clicked rows (interactions) from rows that were only shown: a number, or a boolean (true is 1,
    false is 0); may be the rating_column. Shown rows become entries with segment id 2, which only generate_prompts
    reads (--prompts.source exposed or both). null: every row is an interaction."""
    click_from: float = 1
    """Smallest value of click_column that is a click; rows below it were only shown. Example: 3 for ratings from 1 to 5
    of which 1 and 2 are dislikes."""
    min_count: int = 5
    """Minimum number of interactions per user and per item (k-core, repeated until it converges); 1: keep all."""
    vocabulary: str | None = changeable(None)
    """Folder of an earlier dataset to extend. Its users and items keep their ids and stay, however few interactions
    they have in the log; new ones that reach min_count get the ids after them. Histories are made of --input alone, so
    give the earlier days of the log as well. Adds the column `trained`, which pretrain --targets new reads. null: a new
    vocabulary."""
    hold_out: Literal["last", "time", "given", "none"] = "last"
    """What is held out of training. last: the last two interactions of each user with at least three, the validation
    and the test item. time: the interactions from --test_from on, and before them those of validation. given: those of
    --validation_input and --test_input. none: nothing; train on everything, for a fixed number of epochs. With time and
    given a user's validation and test item are the first of each part, and histories end before the part."""
    test_from: str | None = None
    """Time at which the test part begins (--hold_out time): a number in the log's own unit; an ISO date or date-time,
    which means seconds since 1970, UTC unless it has an offset; or a share such as 90%, the time before which that
    share of the interactions lies. Interactions at this very time are in the test part."""
    validation_from: str | None = None
    """Time at which the validation part begins, written like test_from. null: as many interactions before test_from as
    there are after it."""
    validation_input: list[str] = changeable(default_factory=list)
    """Raw log of the validation part, like input (--hold_out given); without, nothing is held out for validation."""
    test_input: list[str] = changeable(default_factory=list)
    """Raw log of the test part, like input (--hold_out given). Then --input is the training part."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether to keep or drop rows that repeat the user, item and time of another row (before min_count is applied)."""
    seed: int = 0
    """Seed of the random order in which users and items are numbered."""
    rows_per_group: int = 0
    """Users per Parquet row group, the unit of reading and shuffling; 0: as many as make 64 groups, from 16 to 8192."""
    groups_per_part: int = 16
    """Row groups per Parquet part file."""
    engine: Literal["duckdb", "pyspark"] = changeable("duckdb")
    """Engine that runs the preparation. duckdb: on this machine. pyspark: for logs too large for one machine; not
    available yet."""
    scratch: str | None = changeable(None)
    """Local folder for temporary tables, about 50 bytes per interaction; null: next to the output."""
    memory_limit: str | None = changeable(None)
    """Maximum memory the engine uses before it spills to scratch, such as 4GB; null: 80% of the machine's memory."""

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
        if not self.input:
            raise ValueError("--input is empty; name the files, folders or patterns of the raw log")
        at_least("--min_count", self.min_count, 1)
        at_least("--rows_per_group", self.rows_per_group, 0)
        at_least("--groups_per_part", self.groups_per_part, 1)
        self._check_hold_out()
        if not abs(self.click_from) < float("inf"):
            raise ValueError(f"--click_from is {self.click_from}; it must be a finite number")
        if self.click_column is None and self.click_from != 1:
            raise ValueError(f"--click_from is {self.click_from}, but no column is named; name it with --click_column")

    def _check_hold_out(self) -> None:
        """Check that the options of the split fit what is held out."""
        belongs = {"test_from": "time", "validation_from": "time", "validation_input": "given", "test_input": "given"}
        for name, hold_out in belongs.items():
            if getattr(self, name) and self.hold_out != hold_out:
                raise ValueError(
                    f"--{name} belongs to --hold_out {hold_out}, but --hold_out is {self.hold_out}; give --hold_out "
                    f"{hold_out}, or leave --{name} out"
                )
        if self.hold_out == "given" and not self.test_input:
            raise ValueError(
                "--hold_out given needs --test_input, the files of the test part; --input is what to train on"
            )
        if self.hold_out == "time" and self.test_from is None:
            raise ValueError("--hold_out time needs --test_from, the time at which the test part begins, such as 90%")
        if self.hold_out == "time" and self.time_column is None:
            raise ValueError(
                "--hold_out time needs times, but --time_column is null; name the column, or give --hold_out last"
            )
        for name in ("validation_from", "test_from"):
            if (text := getattr(self, name)) is not None:
                Boundary.parse(f"--{name}", text)
