"""Options of the stages evaluate, export, apply, index and retrieve."""

import math
from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.boundaries import parse_moment
from recgpt_torchrec.config.checks import MAX_SEED, at_least, within
from recgpt_torchrec.config.device import Computing, Watched
from recgpt_torchrec.config.fields import changeable
from recgpt_torchrec.config.inputs.neighbours import RecallNeighbours
from recgpt_torchrec.config.serving.encoder import Encoder
from recgpt_torchrec.config.tables import Sharding
from recgpt_torchrec.config.training import Batch

INTERESTS = 32
"""Maximum number of interests per user."""


@dataclass(kw_only=True)
class Recall:
    """Recall paths that merge the lists of several interests (paper, section 4.4)."""

    m: int = 0
    """Number of items from the first interest in the two-step list of the longest k; the other n items are from the
    second. 0: chosen on the validation split, by NDCG at the longest k; where no user has a validation item, nine
    tenths, as in retrieve."""
    interests: int = 1
    """Number of interests of the multi-interest paths, 1 to 32; 1: these paths are not measured."""
    repeat_bias: bool = True
    """Whether unmasked ranks and lists are by the model's whole score: with its repeat bias added to the items of the
    history. false: by inner products alone. Masked figures are the same."""

    def __post_init__(self) -> None:
        at_least("--recall.m", self.m, 0)
        within("--recall.interests", self.interests, 1, INTERESTS)


@dataclass(kw_only=True)
class Evaluate(Computing, Watched):
    """Rank the whole catalogue for every user: HR@k and NDCG@k of a checkpoint, next to baselines that need no
    training.

    Example: recgpt evaluate --data data/mine --checkpoint runs/mine --output runs/mine.json
    """

    data: str
    """Folder of the dataset."""
    checkpoint: str
    """Output folder of a run (its best checkpoint is used), or one checkpoint folder."""
    output: str
    """JSON file to write; its folder must exist."""
    split: Literal["validation", "test"] = "test"
    """Which held-out item of each user is ranked: the one of the validation or of the test part (prepare --hold_out;
    by default the second to last and the last)."""
    ks: list[int] = field(default_factory=lambda: [5, 10])
    """List lengths k of HR@k and NDCG@k."""
    event: str | None = None
    """Event type, such as buy: only users whose held-out item is of this type are ranked, and the model is asked for
    it. null: all users are ranked, and the model is asked for any type, as the true one is not known when a request
    comes. Popularity and co-occurrence count events of all types."""
    ask: bool = True
    """With --event, whether the model is asked for that type; false: for any, to see on the same users what asking is
    worth."""
    users: int = 0
    """Number of users to rank for: a sample of those with an item of the split, drawn by the seed, the same on any
    number of ranks. m of the two-step list is then chosen on so many users of the validation split. 0: all of them."""
    seed: int = 0
    """Seed of the sample of users."""
    baselines: bool = True
    """Also measure the baselines, popularity and item co-occurrence. One that may need more than 16 GiB per rank is
    left out, and so is one that does not fit into half of the memory left, together with the one before."""
    recall: Recall = field(default_factory=Recall)
    neighbours: RecallNeighbours = field(default_factory=RecallNeighbours)
    per_user: bool = True
    """Also write the rank of every user's held-out item by each path to a Parquet file beside the JSON, such as
    test.users.parquet beside test.json: some 3 bytes per user and path, and a pass over the histories, two where the
    dataset has times. It tells whether differences are beyond chance; --compare needs it, and report for metrics by
    item age. false: no such file and none of these."""
    compare: str | None = None
    """Another evaluation to compare with user by user: its JSON file, or a run's folder with one evaluation on the same
    split. Differences of all paths of the same kind are printed, with 95% intervals. null: none."""
    overwrite: bool = False
    """Replace the output file whatever it holds; false: replace only an evaluation of the same dataset and split."""
    batch: Batch = field(default_factory=Batch)
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"--ks is {self.ks}; it must be list lengths of at least 1, for example 5 10")
        at_least("--users", self.users, 0)
        within("--seed", self.seed, 0, MAX_SEED)
        if self.compare is not None and not self.per_user:
            raise ValueError(f"--compare is {self.compare}, but --per_user is false: no ranks of users to compare")
        if self.recall.m > max(self.ks):
            raise ValueError(f"--recall.m is {self.recall.m}; it must be at most {max(self.ks)}, the longest of --ks")


@dataclass(kw_only=True)
class HNSW:
    """Graph of near neighbours (hnsw)."""

    neighbours: int = 32
    """Number of neighbours per item (M); more improve recall and take more memory, 8 bytes per neighbour and item."""
    build: int = 200
    """Number of items examined when an item is inserted (efConstruction); more make a better graph and a slower
    build."""
    search: int = 0
    """Number of items examined per search (efSearch), never fewer than the search returns; more improve recall and take
    longer. 0: as the index in the export was measured, 128 for a new one."""

    def __post_init__(self) -> None:
        for name, least in {"neighbours": 2, "build": 1, "search": 0}.items():
            at_least(f"--hnsw.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class IVF:
    """Clusters of items (ivf, ivf_pq)."""

    clusters: int = 0
    """Number of clusters per shard (nlist), at most the number of its items; 0: four times the square root of the
    number of items, but no more than one per 39 items."""
    probes: int = 0
    """Number of nearest clusters examined per search (nprobe); more improve recall and take longer. 0: as the index in
    the export was measured, 64 for a new one."""

    def __post_init__(self) -> None:
        at_least("--ivf.clusters", self.clusters, 0)
        at_least("--ivf.probes", self.probes, 0)


@dataclass(kw_only=True)
class PQ:
    """Codes of product quantization (ivf_pq)."""

    m: int = 0
    """Number of parts that a vector is cut into, each with a code of its own; must divide the vectors' length. More
    improve recall and take more memory, `bits` each per item. 0: the length over four, or the next divisor below."""
    bits: int = 8
    """Bits per code, 4 to 8; a shard needs at least 2^bits items."""
    refine: int = 0
    """Number of candidates found by their codes per item returned; they are scored again with their vectors, which lie
    in the same file. Opening reads all of it once, for its checksums; then vectors are mapped from a local disk, so
    that the system may drop them from memory, and held in memory where the file is from a store. More improve recall
    and take longer. 0: as the index in the export was measured, 8 for a new one."""

    def __post_init__(self) -> None:
        at_least("--pq.m", self.m, 0)
        within("--pq.bits", self.bits, 4, 8)
        at_least("--pq.refine", self.refine, 0)


@dataclass(kw_only=True)
class Index:
    """FAISS index of the item vectors, in the export."""

    kind: Literal["none", "auto", "flat", "ivf", "ivf_pq", "hnsw"] = "none"
    """none: no index is made, and one that the export holds stays. flat: every item is scored. ivf: the items of the
    nearest clusters. ivf_pq: the same by short codes, then the best again by their vectors. hnsw: a graph of near
    neighbours. auto: flat up to 100,000 items; beyond, ivf while the vectors take up to 4 GiB (16 million items of 64
    numbers), then ivf_pq."""
    shards: int = 0
    """Number of files, each with an id range of the items. They are dealt to the ranks that build, and to those that
    retrieve. One shard is in a rank's memory while it is built. 0: one per rank."""
    hnsw: HNSW = field(default_factory=HNSW)
    ivf: IVF = field(default_factory=IVF)
    pq: PQ = field(default_factory=PQ)
    sample: int = 1000
    """Number of user vectors with which recall and speed are measured, dealt evenly to the ranks; a rank that reads
    fewer takes all of its own. 0: none."""

    def __post_init__(self) -> None:
        at_least("--index.shards", self.shards, 0)
        at_least("--index.sample", self.sample, 0)


@dataclass(kw_only=True)
class Export(Computing, Watched):
    """Write the item vectors and user vectors of a checkpoint as Parquet, for an ANN index: one vector per user, or
    several from autoregressive steps (paper, section 4.4). With --since only what has changed.

    Example: recgpt export --data data/mine --checkpoint runs/mine --output vectors/mine
    """

    data: str = changeable()
    """Folder of the dataset."""
    checkpoint: str = changeable()
    """Output folder of a run (its best checkpoint is used), or one checkpoint folder."""
    output: str = changeable()
    """Folder of the export. It must be new or empty, unless it already holds this result; then nothing is done."""
    history: Literal["all", "test", "validation"] = "all"
    """History that user vectors are made of. all: the whole history. test, validation: what comes before the item that
    this split holds out."""
    event: str | None = None
    """Event type that user vectors ask for, such as buy, so that retrieve lists what will be bought. null: any type."""
    time: str | None = None
    """Time of the request that user vectors are made for, where the model reads times: an ISO date-time, UTC unless it
    has an offset, or a number in the log's unit. With history test and validation it is that of the item that is held
    out. null: the newest time of the dataset."""
    interests: int = 1
    """Number of interest vectors per user, 1 to 32. The first is the output at the newest entry; each further one takes
    one more autoregressive step. The paper's online system uses 6; retrieve by default merges the first 2."""
    dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the stored numbers. float16: half the size, 11 bits of precision, numbers up to 65,504. int8: a quarter
    of the size; a number is its int8 times the scale of its vector, the largest absolute number over 127."""
    since: list[str] = changeable(default_factory=list)
    """Folder of an earlier export, then those of the deltas after it, oldest first. Written is a delta: only the items
    and users that are new or have moved, and which users are gone. recgpt apply makes an export of an export and
    deltas. The dataset must be that of the last folder, or be prepared with --vocabulary from it. Empty: an export."""
    tolerance: float = 0.0
    """With --since: vectors that moved by no more than this, as a share of the length of the vector that the export and
    the deltas hold, are left out. 0: any vector that differs in a bit is in the delta."""
    index: Index = changeable(default_factory=Index)
    encoder: Encoder = changeable(default_factory=Encoder)
    batch: Batch = field(default_factory=Batch)
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        super().__post_init__()
        within("--interests", self.interests, 1, INTERESTS)
        if self.time is not None:
            parse_moment("--time", self.time)
            if self.history != "all":
                raise ValueError(
                    f"--time is {self.time}, but with --history {self.history} requests have the times of the items "
                    "that are held out; leave one out"
                )
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"--tolerance is {self.tolerance}; it must be a number of at least 0, for example 0.01")
        if self.tolerance and not self.since:
            raise ValueError(
                f"--tolerance is {self.tolerance}, but there is nothing to compare with; give --since EXPORT, or leave "
                "it out"
            )
        for name, kind in (("index", self.index.kind), ("encoder", self.encoder.kind)):
            if self.since and kind != "none":
                raise ValueError(
                    f"--{name}.kind is {kind}, but --since writes a delta, which holds no {name}; leave one out"
                )


@dataclass(kw_only=True)
class Apply:
    """Apply deltas to the export they were made from, and write the export that is whole after them.

    Example: recgpt apply --export vectors/monday --deltas vectors/tuesday vectors/wednesday
    --output vectors/now
    """

    export: str
    """Folder of the export."""
    deltas: list[str]
    """Folders of the deltas, oldest first; each was made with --since of the export and of the deltas before it."""
    output: str
    """Folder of the new export. It must be new or empty, unless it already holds this result; then nothing is done."""

    def __post_init__(self) -> None:
        if not self.deltas:
            raise ValueError("--deltas is empty; give the folders of the deltas, oldest first")


@dataclass(kw_only=True)
class BuildIndex(Watched):
    """Build a FAISS index of an export's item vectors and keep it in the export, in place of one that is there; the
    vectors stay as they are.

    Example: recgpt index --export vectors/mine --index.kind hnsw
    """

    export: str
    """Folder of the export."""
    index: Index = field(default_factory=lambda: Index(kind="auto"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index.kind == "none":
            raise ValueError("--index.kind is none; name a kind, or auto")


@dataclass(kw_only=True)
class Retrieve(Watched):
    """Turn an export into a list of items for each user, with an exact or an approximate index; needs no model.

    Example: recgpt retrieve --export vectors/mine --data data/mine --output lists/mine --k 50
    """

    export: str = changeable()
    """Folder of the export."""
    output: str = changeable()
    """Folder of the lists. It must be new or empty, unless it already holds this result; then nothing is done."""
    k: int = 50
    """Number of items per list, at most as many as the export holds; lists are shorter where a filter leaves fewer."""
    merge: Literal["auto", "two_step", "quota", "score"] = "auto"
    """How the lists of several interests are merged. two_step: m items of the first interest, then k - m new items of
    the second. quota: an equal number of new items of each interest, one interest after another. score: the items with
    the largest softmax share within any interest's list. auto: two_step if the export has several interests."""
    m: int = 0
    """Number of items from the first interest (two_step), 1 to k; 0: nine tenths of k."""
    interests: int = 0
    """Number of interests to use, from the first on, 1 to 32; 0: all, or two with two_step."""
    data: str | None = changeable(None)
    """Folder of the dataset. Items of the history that a user's vectors were made of are left out of the list, or
    weighed, see --seen. If the export was made with --history test or validation, the lists are measured against the
    held-out items. null: any item may be retrieved, by its inner product alone."""
    neighbours: RecallNeighbours = field(default_factory=RecallNeighbours)
    seen: Literal["leave_out", "weigh"] = "leave_out"
    """Items of the history, which --data tells. leave_out: they are in no list. weigh: they compete, with the repeat
    bias of the export added to their scores. Where that is above 0, only --index exact can."""
    index: Literal["auto", "exact", "flat", "ivf", "ivf_pq", "hnsw"] = "auto"
    """auto: the index that the export holds (see export --index.kind), or exact. exact: score every item. flat, ivf,
    ivf_pq, hnsw: this kind of index, from the export if it holds one of that kind; otherwise each rank builds one over
    its share of the items, and it is not kept."""
    hnsw: HNSW = field(default_factory=HNSW)
    ivf: IVF = field(default_factory=IVF)
    pq: PQ = field(default_factory=PQ)
    sample: int = 1000
    """About how many users' approximate lists are compared with exact ones; 0: none."""
    allow: str | None = changeable(None)
    """Keys of the only items that may be in a list: a text file with a key per line, or a table (.csv .tsv .jsonl
    .parquet, also .gz .zst) with keys in the column --item_column; a path, folder or URI. Keys as in the log: 12 and
    12.0 are the same. Unknown ones are counted. It may be given with --deny and --where: an item must pass all of them.
    null: every item may."""
    deny: str | None = changeable(None)
    """Keys of the items that no list may hold, in a file like that of --allow; all may be unknown. null: none."""
    items: str | None = changeable(None)
    """Table of the items for --where, with keys in the column --item_column: .csv, .tsv, .jsonl or .parquet. null:
    none."""
    where: str | None = None
    """Condition on the columns of --items, for example "category = 'shoes' and price < 20", in the language of prepare
    --where: an SQL expression without queries. Only items with a row that meets it may be in a list; items that are not
    in the table, or for which it cannot be computed, may not. null: every item may."""
    item_column: str = "item_id"
    """Column of the keys in the tables of --allow, --deny and --items."""
    users: str | None = changeable(None)
    """Keys of the users whose lists are wanted, in a file like that of --allow. Unknown ones are counted. null: the
    lists of all users."""
    user_column: str = "user_id"
    """Column of the keys in the table of --users."""
    fallback: Literal["none", "popular"] = "none"
    """Lists of users of --data without a vector in the export: those without a history and, if it was made with
    --history test or validation, those without an item that this split holds out. none: they get no list. popular: the
    same k items for all of them, those with the most interactions that a filter leaves, whether a user has seen them or
    not; scores are the numbers of interactions, and the column interests is -1. Interactions are those of the whole
    log, or of the training part with --history test or validation."""

    @property
    def key_files(self) -> list[str]:
        """The files of keys that options name."""
        return [path for path in (self.allow, self.deny, self.items, self.users) if path is not None]

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--k", self.k, 1)
        if self.neighbours.path is not None and self.data is None:
            raise ValueError(
                f"--neighbours.path is {self.neighbours.path}: neighbours are those of a history's items; name the "
                "dataset with --data DIR"
            )
        if self.where is not None and self.items is None:
            raise ValueError(f"--where is {self.where!r}; name the table whose columns it is about with --items FILE")
        if self.items is not None and self.where is None:
            raise ValueError(
                f"--items is {self.items}; give a condition on its columns with --where, or a list of keys with --allow"
            )
        if self.fallback != "none" and self.data is None:
            raise ValueError(f"--fallback is {self.fallback}; give the dataset whose users and counts it needs: --data")
        if self.seen == "weigh" and self.data is None:
            raise ValueError("--seen is weigh; give the dataset whose histories are weighed: --data")
        at_least("--sample", self.sample, 0)
        within("--m", self.m, 0, self.k, ", the length of the list (--k)")
        if self.m and self.merge not in ("auto", "two_step"):
            raise ValueError(f"--m is {self.m}, but --merge is {self.merge}; only two_step uses m, leave it out")
        within("--interests", self.interests, 0, INTERESTS, " (0: all)")
        if self.merge == "two_step" and self.interests not in (0, 2) or self.merge == "auto" and self.interests > 2:
            raise ValueError(
                f"--interests is {self.interests}, but two_step merges 2; leave it out, or give --merge quota or score"
            )
