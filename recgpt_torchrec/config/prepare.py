"""Options of the stage prepare."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from recgpt_torchrec.config.boundaries import Boundary
from recgpt_torchrec.config.checks import at_least, check_ids, split_words, within
from recgpt_torchrec.config.fields import changeable
from recgpt_torchrec.config.inputs.attribute_names import parse_attributes
from recgpt_torchrec.config.inputs.time import TimeUnit

NULL_WORDS = (
    *("NA", "N/A", "#N/A", "<NA>", "NaN", "NAN", "nan", "-nan", "NaT", "NULL", "Null", "null", "(null)", "\\N"),
    *("None", "none", "undefined"),
)
"""Words that programs write for a value that is missing (pandas, R, Spark, Hive, MySQL, Python, Excel)."""
SEPARATOR_WORDS = {"tab": "\t", "\\t": "\t", "space": " ", "blank": " ", "comma": ",", "semicolon": ";", "pipe": "|"}
NONE = "none"
"""Value of an option that says that there is no such character."""
ATTRIBUTE_OPTIONS = (
    *("items", "item_attributes", "items_key", "users", "user_attributes", "users_key"),
    *("attribute_separator", "attribute_buckets", "catalogue"),
)
"""Options of tables of attributes, which a dataset without tables does not record."""
InputFormat = Literal["auto", "csv", "tsv", "jsonl", "parquet", "sequences", "recbole"]


@dataclass(kw_only=True)
class Prepare:
    """Turn a raw interaction log into a dataset: k-core filtering, dense ids in seeded random order, Parquet parts.

    Example: recgpt prepare --input log.csv --output data/mine
    """

    input: list[str] = changeable()
    """Raw log: files, folders (searched recursively) or glob patterns; paths or URIs."""
    output: str = changeable()
    """Folder of the new dataset, a path or a URI (s3://, gs://, hdfs://). It must be new or empty, unless it already
    holds this result; then nothing is done."""
    input_format: InputFormat = "auto"
    """Format of the input. csv, tsv, jsonl, parquet: one row (or object) per interaction. sequences: one line per user,
    `user item item ...` in time order. recbole: tab-separated with a header of name:type fields. auto: by the ending of
    each file name, .csv .tsv .jsonl .ndjson .json (lines of JSON) .parquet .pq .txt (sequences, or a table whose header
    has the columns) .inter (recbole); text formats also with .gz .bz2 .xz .zst. Files of a folder with other endings
    are left out, with a line about it."""
    header: bool = True
    """Whether the first line of csv and tsv files names the columns. false: columns are named by their place, from 0,
    for example --user_column 0 --item_column 1 --time_column 4."""
    separator: str | None = None
    """Separator of the columns in text: up to four characters, such as `;` or `::`, or one of the words tab, space.
    null: a comma for csv, a tab for tsv."""
    quote: str | None = None
    """Character around values that hold the separator; none: there are no quotes. null: " for csv with a separator of
    one character, none for tsv, recbole and other separators."""
    escape: str | None = None
    """Character before a quote inside quotes, such as \\ in files of Spark and MySQL. null: the quote is doubled."""
    encoding: str = "utf-8"
    """Encoding of text files, such as latin-1 or utf-16; any that Python knows."""
    null_words: list[str] = field(default_factory=lambda: [*NULL_WORDS])
    """Values that mean that there is none, beside the empty one; rows without user, item or time are set aside. []:
    none."""
    list_separator: str | None = None
    """Separator of lists in the text columns of item and time, one row per user; brackets and quotes around are left
    out. none: these columns hold no lists. null: a column that seems to hold lists is refused. Lists of JSON, Parquet
    and RecBole (token_seq) are read as such, whatever is given here."""
    partition_columns: list[str] = field(default_factory=list)
    """Names of folders NAME=VALUE to read as columns. Without it, names of folders mean nothing."""
    where: str | None = None
    """Condition on the columns of the log; other rows are left out. An SQL expression without queries, for example
    "event in ('cart', 'buy') and price > 0". Text compared with a number is read as one."""
    user_column: str = "user_id"
    """Column with the user key."""
    item_column: str = "item_id"
    """Column with the item key."""
    time_column: str | None = "timestamp"
    """Column with the event time: a number, kept in its own unit, or an ISO date-time, converted to seconds since 1970
    (UTC unless it has an offset). null: rows are already in time order. Not used for sequences."""
    time_unit: TimeUnit = "auto"
    """Unit of times that are numbers: s, ms, us, ns, min or day, since 1970 in UTC. It is recorded, and no time is
    changed; pretrain reads gaps, hours and weekdays by it (--time.use). auto: date-times are seconds; of numbers s, ms,
    us or ns where all lie in the years 1990 to 2099, and not known otherwise."""
    time_format: str | None = None
    """Format of times in text that are neither, in strptime's codes, for example "%d/%m/%Y %H:%M". null: numbers and
    ISO date-times with years of four digits."""
    rating_column: str | None = None
    """Column with a number to store with each interaction, in the list column `ratings`; null: none."""
    click_column: str | None = None
    """Column that tells clicked rows (interactions) from rows that were only shown: a number, or a boolean (true is 1,
    false is 0); may be the rating_column. Shown rows become entries with segment id 2, which only generate_prompts
    reads (--prompts.source exposed or both); see also --dislike_to and --skip_to. null: every row is an interaction."""
    click_from: float = 1
    """Smallest value of click_column that is a click; rows below it were only shown. Example: 3 for ratings from 1 to 5
    of which 1 and 2 are dislikes."""
    click_values: list[str] = field(default_factory=list)
    """Words of click_column that are clicks, separated by commas or blanks, for example buy,cart; rows with other words
    were only shown. To leave those rows out, use --where instead. []: click_column is a number, see click_from."""
    event_column: str | None = None
    """Column with the type of each event, such as view, cart or buy: words (or numbers), at most 200 different ones,
    written like keys. Stored in the list column `event_ids`, which pretrain --events reads; a row without one is kept,
    as an event of unknown type. May be the click_column, too. null: events have no types."""
    items: list[str] = changeable(default_factory=list)
    """Tables of items, a row per item: files, folders or patterns of csv, tsv, jsonl, parquet or recbole (.item), told
    by the ending whatever --input_format says. Header, encoding, null_words, quote, escape hold as for the log;
    separator too, unless another one parts the names that are asked for. []: none."""
    item_attributes: list[str] = field(default_factory=list)
    """Columns of --items to keep for each item, separated by commas: NAME, or NAME:KIND. category: each value has an
    id. list: several of them. number: quantile buckets. text: kept for reports, not for the model. Without KIND lists
    are list, floats number, and all else (text, whole numbers, true and false) category. Example: brand,tags:list."""
    items_key: str | None = None
    """Column of --items with the item key; null: item_column."""
    users: list[str] = changeable(default_factory=list)
    """Tables of users, like items (recbole: .user). []: none."""
    user_attributes: list[str] = field(default_factory=list)
    """Columns of --users to keep for each user, like item_attributes. Example: country,age:number."""
    users_key: str | None = None
    """Column of --users with the user key; null: user_column."""
    attribute_separator: str = "|"
    """Separator of the values in text columns of the kind list: up to four characters, or a word such as comma. Lists
    of JSON, Parquet and RecBole (token_seq) are read as such."""
    attribute_buckets: int = 16
    """Maximum number of quantile buckets of a number; equal numbers are in one bucket. With --vocabulary the buckets of
    the earlier dataset are kept."""
    catalogue: Literal["log", "items"] = "log"
    """Which items have ids. log: those of the log that reach min_count. items: those of --items too, so that a product
    without interactions has a vector made of its attributes, and is exported and recommended."""
    dislike_values: list[str] = field(default_factory=list)
    """Words of click_column that are dislikes, separated by commas or blanks, with --click_values. Such rows become
    entries with segment id 3, which the model tells from rows that were only shown. []: none."""
    skip_values: list[str] = field(default_factory=list)
    """Words of click_column that are skips, likewise; such rows become entries with segment id 4. []: none."""
    dislike_to: float | None = None
    """Largest value of click_column that is a dislike, below click_from. Example: --click_from 4 --dislike_to 2 for
    ratings from 1 to 5, of which 3 says neither. null: none is."""
    skip_to: float | None = None
    """Largest value of click_column that is a skip, likewise; of two ranges the one that ends higher begins above the
    other. Example: --click_from 0.8 --skip_to 0.1 for the share of a video that was watched. null: none is."""
    position_column: str | None = None
    """Column with the place in the list in which the item of a row was shown, a whole number; rows without one are of
    unknown place. Places are stored in the list column `places`, and rows of the same user and time are in their order.
    null: none."""
    position_from: int = 1
    """Number of the first place in position_column: 1, or 0 where places are counted from 0."""
    min_count: int = 5
    """Minimum number of interactions per user and per item (k-core, repeated until it converges); 1: keep all."""
    vocabulary: str | None = changeable(None)
    """Folder of an earlier dataset to extend. Its users and items keep their ids and stay, however few interactions
    they have in the log; new ones that reach min_count get the ids after them. Histories are made of --input alone, so
    give the earlier days of the log as well. Adds the column `trained`, which pretrain --targets new reads. null: a new
    vocabulary."""
    new_keys: Literal["add", "leave_out"] = "add"
    """With --vocabulary: what becomes of rows whose user or item it does not have. add: the vocabulary is extended.
    leave_out: they are left out, and new values of attributes are left empty, so that the vocabularies stay as they are
    and the checkpoints of the earlier dataset fit, for vectors between two trainings."""
    ids: Literal["vocabulary", "hash", "managed"] = "vocabulary"
    """How users and items get ids, where they have a number of rows. vocabulary: each key has its own, and tables grow
    with every new one. hash: a key's row is its hash modulo the number of rows; keys that collide share a row and its
    vector, and users that do also a history. managed: torchrec's managed collision; a key has a row of its own, and
    once all rows are taken --eviction decides which keys lose theirs to new ones. A key without a row is left out of
    histories and targets."""
    user_rows: int | None = None
    """Number of rows of the users' table, with --ids hash or managed; null: users have a vocabulary."""
    item_rows: int | None = None
    """Number of rows of the items' table, with --ids hash or managed; null: items have a vocabulary."""
    eviction: Literal["lru", "lfu", "distance_lfu"] = "lru"
    """Which keys keep their rows with --ids managed. lru: those seen last. lfu: those with the most interactions.
    distance_lfu: those with the most interactions, divided by the number of steps since the last one."""
    eviction_step: int = 86400
    """Length of a step in which lru and distance_lfu count time, in the unit of the time column: 86400 is a day where
    that is seconds. Without times a step is one run of prepare."""
    append: bool = False
    """Append the input as a day to the folder of days --output, without reading the log before it. Users and items keep
    their ids, and new ones get the ids after them, however few interactions they have (min_count is not used). A user's
    new interactions follow their newest earlier ones, which are marked as trained where they were. pretrain --data on
    the folder trains each day once. The first call makes the folder; later ones take the same options, where ids,
    user_rows, item_rows, eviction and eviction_step may be left out. Of hold_out, last and none."""
    history: int = 200
    """With --append: number of a user's newest earlier interactions that are kept for the days to come; at least the
    model.max_len of runs on the folder."""
    hold_out: Literal["last", "time", "given", "targets", "none"] = "last"
    """What is held out of training. last: the last two interactions of each user with at least three, the validation
    and the test item. time: the interactions from --test_from on, and before them those of validation. given: those of
    --validation_input and --test_input. targets: the last two interactions of each user that are of --target_events,
    such as purchases, and what comes after each; histories hold events of all types. Users with fewer than two of them,
    or nothing before, are trained on as a whole. none: nothing; train on everything, for a fixed number of epochs. With
    time and given a user's validation and test item are the first of each part, and histories end before the part."""
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
    target_events: list[str] = field(default_factory=list)
    """Event types that are held out (--hold_out targets), separated by commas or blanks, for example buy,cart."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether to keep or drop rows that repeat the user, item and time of another row (before min_count is applied)."""
    repeats: Literal["keep", "collapse"] = "keep"
    """Whether to keep consecutive interactions of a user with the same item, or collapse them to the first (before
    min_count is applied)."""
    seed: int = 0
    """Seed of the random order in which users and items are numbered."""
    rows_per_group: int = 0
    """Users per Parquet row group, the unit of reading and shuffling; 0: as many as make 64 groups, from 16 to 8192."""
    groups_per_part: int = 16
    """Row groups per Parquet part file."""
    engine: Literal["duckdb", "pyspark"] = changeable("duckdb")
    """Engine that runs the preparation; the dataset is the same. duckdb: on this machine. pyspark: on Apache Spark, for
    logs too large for one machine; `make spark` or the extra `spark` installs it, Java 17 is needed. Its own settings
    name the cluster (spark-submit, SPARK_CONF_DIR, PYSPARK_SUBMIT_ARGS="--master URL pyspark-shell"); without, it runs
    on all cores of this machine. Input, output and scratch must be reachable under the same names from all executors,
    where this package is installed too. One task reads a whole file, so give a large log in files of 100 MB to 1 GB."""
    scratch: str | None = changeable(None)
    """Folder for temporary tables, about 50 bytes per interaction; null: next to the output. duckdb: on a local disk.
    pyspark: a path or URI of a file system that Spark knows (hdfs://, s3a://)."""
    memory_limit: str | None = changeable(None)
    """Maximum memory of DuckDB before it spills to disk, such as 4GB. duckdb: null is 80% of the machine's memory.
    pyspark: of the reader in each task, beside Spark's own memory (spark.executor.memoryOverhead); null: 1GB."""

    def __post_init__(self) -> None:
        at_least("--seed", self.seed, 0)
        if not self.input:
            raise ValueError("--input is empty; name the files, folders or patterns of the raw log")
        at_least("--min_count", self.min_count, 1)
        at_least("--rows_per_group", self.rows_per_group, 0)
        at_least("--groups_per_part", self.groups_per_part, 1)
        if self.new_keys == "leave_out" and self.vocabulary is None:
            raise ValueError("--new_keys leave_out belongs to --vocabulary; name the earlier dataset, or leave it out")
        if self.new_keys == "leave_out" and self.ids == "hash":
            raise ValueError("--new_keys leave_out: with --ids hash every key has an id; leave it out")
        check_ids(self.ids, self.user_rows, self.item_rows, self.eviction_step, need_rows=not self.append)
        self.target_events = split_words(self.target_events)
        self._check_hold_out()
        self._check_attributes()
        self._check_append()
        if not abs(self.click_from) < float("inf"):
            raise ValueError(f"--click_from is {self.click_from}; it must be a finite number")
        if self.click_column is None and self.click_from != 1:
            raise ValueError(f"--click_from is {self.click_from}, but no column is named; name it with --click_column")
        self.click_values = split_words(self.click_values)
        if self.click_values and self.click_column is None:
            raise ValueError("--click_values says which words are clicks; name their column with --click_column")
        if self.click_values and self.click_from != 1:
            raise ValueError("--click_values is for words, --click_from for numbers; give one of them")
        self._check_feedback()
        if self.separator == NONE:
            raise ValueError("--separator is none; columns in text have one, such as a comma")
        self.separator = _named_character("--separator", self.separator, 4)
        self.quote = _named_character("--quote", self.quote, 1)
        self.escape = _named_character("--escape", self.escape, 1)
        self.list_separator = _named_character("--list_separator", self.list_separator, 4)
        if self.time_unit != "auto" and self.time_column is None:
            raise ValueError(f"--time_unit is {self.time_unit}, but no column is named; name it with --time_column")
        if self.time_format is not None and (self.time_column is None or "%" not in self.time_format):
            raise ValueError(f"--time_format is {self.time_format}; give codes such as %d/%m/%Y, with a --time_column")
        try:
            "text".encode(self.encoding)
        except (LookupError, UnicodeError):
            raise ValueError(
                f"--encoding is {self.encoding}, which Python does not know; give utf-8, latin-1, utf-16, ..."
            ) from None

    def recorded(self) -> dict[str, Any]:
        """The options as a dataset records them: those of attributes only where it has tables of them."""
        left_out = () if self.items or self.users else ATTRIBUTE_OPTIONS
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def _check_attributes(self) -> None:
        """Split the names of attributes, and check that the options of tables fit each other."""
        within("--attribute_buckets", self.attribute_buckets, 2, 1024)
        separator = _named_character("--attribute_separator", self.attribute_separator, 4)
        if separator is None or separator == NONE:
            raise ValueError(f"--attribute_separator is {separator}; give the characters between the values of a list")
        self.attribute_separator = separator
        self.item_attributes = parse_attributes("--item_attributes", self.item_attributes)
        self.user_attributes = parse_attributes("--user_attributes", self.user_attributes)
        for entity, tables, names, key in (
            ("item", self.items, self.item_attributes, self.items_key),
            ("user", self.users, self.user_attributes, self.users_key),
        ):
            for option, value in ((f"--{entity}_attributes", ",".join(names)), (f"--{entity}s_key", key)):
                if value and not tables:
                    raise ValueError(f"{option} {value}: no table of {entity}s is named; name it with --{entity}s")
            if tables and not names and not (entity == "item" and self.catalogue == "items"):
                raise ValueError(
                    f"--{entity}s names a table and no column of it; name columns with --{entity}_attributes"
                    + (", or pass --catalogue items to give its items ids" if entity == "item" else "")
                )
        if self.catalogue == "items" and not self.items:
            raise ValueError("--catalogue items gives the items of a table ids; name the table with --items")
        if self.catalogue == "items" and self.ids == "managed" and self.item_rows is not None:
            raise ValueError("--catalogue items adds items that --ids managed gives no row, as it counts interactions")
        if self.catalogue == "items" and self.new_keys == "leave_out":
            raise ValueError("--catalogue items adds items, and --new_keys leave_out adds none; give one of them")

    def _check_feedback(self) -> None:
        """Check the options that tell kinds of feedback apart, and those of places."""
        if self.position_from != 1 and self.position_column is None:
            raise ValueError("--position_from belongs to --position_column; name the column with the places")
        words = {"click": self.click_values}
        words |= {name: split_words(getattr(self, f"{name}_values")) for name in ("dislike", "skip")}
        self.dislike_values, self.skip_values = words["dislike"], words["skip"]
        for name in ("dislike", "skip"):
            to = getattr(self, f"{name}_to")
            given = [option for option in (f"{name}_values", f"{name}_to") if getattr(self, option) not in (None, [])]
            if given and self.click_column is None:
                raise ValueError(
                    f"--{given[0]} is about a column that tells clicks from others; name it with --click_column"
                )
            if words[name] and not self.click_values:
                raise ValueError(f"--{name}_values is for words, so name those that are clicks: --click_values")
            if to is None:
                continue
            if self.click_values:
                raise ValueError(f"--{name}_to is for numbers, --click_values for words; give --{name}_values")
            if not -float("inf") < to < self.click_from:
                raise ValueError(f"--{name}_to is {to:g}; it must be below --click_from, which is {self.click_from:g}")
        for one, other in (("click", "dislike"), ("click", "skip"), ("dislike", "skip")):
            if both := [word for word in words[one] if word in words[other]]:
                raise ValueError(f"{both[0]!r} is in --{one}_values and in --{other}_values; leave it in one of them")
        if self.dislike_to is not None and self.dislike_to == self.skip_to:
            raise ValueError(f"--dislike_to and --skip_to are both {self.skip_to:g}; values can be one of them only")

    @property
    def feedback(self) -> list[str]:
        """Kinds of feedback that are told apart, by their names in `segments.FEEDBACK`."""
        if self.click_column is None:
            return []
        told = {"disliked": (self.dislike_values, self.dislike_to), "skipped": (self.skip_values, self.skip_to)}
        return ["shown", *(kind for kind, (words, to) in told.items() if words or to is not None)]

    def _check_append(self) -> None:
        """Check that the options fit `append`."""
        at_least("--history", self.history, 1)
        if not self.append:
            if self.history != 200:
                raise ValueError("--history belongs to --append true; give that as well, or leave --history out")
            return
        if self.hold_out not in ("last", "none"):
            raise ValueError(f"--hold_out is {self.hold_out}; with --append it must be last or none")
        if self.vocabulary is not None:
            raise ValueError("--append extends the vocabulary of the days before; leave --vocabulary out")
        if self.engine != "duckdb":
            raise ValueError(f"--engine is {self.engine}; --append prepares a day on one machine: leave --engine out")
        if self.min_count not in (1, Prepare.min_count):
            raise ValueError(
                f"--min_count is {self.min_count}, but --append keeps every user and item, since their later "
                "interactions are not known; leave --min_count out"
            )

    def _check_hold_out(self) -> None:
        """Check that the options of the split fit what is held out."""
        belongs = {
            **{"test_from": "time", "validation_from": "time", "validation_input": "given", "test_input": "given"},
            "target_events": "targets",
        }
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
        if self.hold_out == "targets" and not (self.target_events and self.event_column):
            missing = "--target_events, the types to hold out, such as buy" if self.event_column else "--event_column"
            raise ValueError(f"--hold_out targets needs {missing}")
        if self.hold_out == "time" and self.test_from is None:
            raise ValueError("--hold_out time needs --test_from, the time at which the test part begins, such as 90%")
        if self.hold_out == "time" and self.time_column is None:
            raise ValueError(
                "--hold_out time needs times, but --time_column is null; name the column, or give --hold_out last"
            )
        for name in ("validation_from", "test_from"):
            if (text := getattr(self, name)) is not None:
                Boundary.parse(f"--{name}", text)


def _named_character(option: str, value: str | None, longest: int) -> str | None:
    """The characters that an option names: a word of `SEPARATOR_WORDS`, `none`, or the characters themselves."""
    if value is None or value == NONE:
        return value
    characters = SEPARATOR_WORDS.get(value, value)
    if not 1 <= len(characters.encode()) <= longest or "\n" in characters or "\r" in characters:
        words = " ".join(word for word in SEPARATOR_WORDS if word.isalpha())
        raise ValueError(f"{option} is {value!r}; it must be 1 to {longest} characters, or one of {words}")
    return characters
