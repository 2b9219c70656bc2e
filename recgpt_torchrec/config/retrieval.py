"""From a checkpoint to lists: the stages evaluate, export and retrieve."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.training import Batch, Sharding

INTERESTS = 32
"""Most interests a user has."""


@dataclass(kw_only=True)
class Recall:
    """How lists of several interests are recalled and merged (paper, section 3.4)."""

    m: int = 0
    """Items of the first interest in the two-step list of the longest k, the rest n from the second; 0: chosen on the
    validation split by NDCG at the longest k."""
    interests: int = 1
    """Interests of the multi-interest paths, measured where there is more than one; 1 to 32."""

    def __post_init__(self) -> None:
        if self.m < 0:
            raise ValueError(f"--recall.m is {self.m}; it is a number of items, or 0 to choose it on validation")
        within("--recall.interests", self.interests, 1, INTERESTS, f"a user has 1 to {INTERESTS}")


@dataclass(kw_only=True)
class Evaluate:
    """Rank the whole catalogue for every user: HR@k and NDCG@k of a checkpoint, beside baselines that need no
    training."""

    data: str
    """Folder of the dataset."""
    checkpoint: str
    """A run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str
    """JSON file to write; its folder must exist."""
    split: Literal["validation", "test"] = "test"
    """Which held-out item is ranked: the second last of each user, or the last."""
    ks: list[int] = field(default_factory=lambda: [5, 10])
    """List lengths of HR and NDCG."""
    baselines: bool = True
    """Whether to measure popularity and item co-occurrence beside the model."""
    recall: Recall = field(default_factory=Recall)
    overwrite: bool = False
    """Replace an output file that holds the evaluation of something else."""
    batch: Batch = field(default_factory=Batch)
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"--ks is {self.ks}; it takes list lengths of at least 1, for example [5,10]")
        if self.recall.m > max(self.ks):
            raise ValueError(f"--recall.m is {self.recall.m}, more than the longest list of --ks ({max(self.ks)})")


@dataclass(kw_only=True)
class Export:
    """Write item vectors and user vectors of a checkpoint as Parquet, for an ANN index: one vector a user, or several,
    by autoregressive steps (paper, section 3.4)."""

    data: str
    """Folder of the dataset."""
    checkpoint: str
    """A run's output folder (its best checkpoint) or one checkpoint folder."""
    output: str
    """Folder of the export; must not hold anything else."""
    history: Literal["all", "test", "validation"] = "all"
    """Which history a user's vector is made of: everything, or what comes before the item that a split holds out."""
    interests: int = 1
    """Vectors of each user, 1 to 32: the ordinary one, and with more those of as many autoregressive steps less one.
    The paper's online system has 6; retrieve merges in two steps from 2 on."""
    batch: Batch = field(default_factory=Batch)
    tables: Sharding = field(default_factory=Sharding)

    def __post_init__(self) -> None:
        within("--interests", self.interests, 1, INTERESTS, f"a user has 1 to {INTERESTS}")


@dataclass(kw_only=True)
class HNSW:
    """A graph of near neighbours (index hnsw)."""

    neighbours: int = 32
    """Edges of each item (M); more find more, in more memory: 8 bytes an edge and item."""
    build: int = 200
    """Candidates looked at when an item is put in (efConstruction); more make a better graph, more slowly."""
    search: int = 128
    """Candidates looked at in a search (efSearch), and never fewer than the items wanted; more find more, more
    slowly."""

    def __post_init__(self) -> None:
        for name, least in {"neighbours": 2, "build": 1, "search": 1}.items():
            at_least(f"--hnsw.{name}", getattr(self, name), least)


@dataclass(kw_only=True)
class IVF:
    """Clusters of items, of which a search looks into the nearest (index ivf)."""

    clusters: int = 0
    """Clusters (nlist), at most as many as there are items; 0: four times the square root of the items, each of 39
    items or more."""
    probes: int = 64
    """Clusters a search looks into (nprobe); more find more, more slowly."""

    def __post_init__(self) -> None:
        at_least("--ivf.clusters", self.clusters, 0)
        at_least("--ivf.probes", self.probes, 1)


@dataclass(kw_only=True)
class Retrieve:
    """Turn an export into a list of items for each user, with an exact or an approximate index: no model is needed.

    Example: python -m recgpt_torchrec.retrieve --export vectors/mine --data data/mine --output lists/mine --k 50
    """

    export: str
    """Folder of the export."""
    output: str
    """Folder of the lists; must not hold anything else."""
    k: int = 50
    """Items of each list; at most as many as the export has."""
    merge: Literal["auto", "two_step", "quota", "score"] = "auto"
    """How the lists of several interests become one. two_step: m items of the first interest, then k - m new ones of
    the second; quota: an equal number of new items of each, list after list; score: the items with the largest share
    exp(score) / sum of exp(scores) of any list; auto: two_step where the export has several interests."""
    m: int = 0
    """Items of the first interest (two_step), 1 to k; 0: nine tenths of k."""
    interests: int = 0
    """Interests that are used, the first ones of the export, 1 to 32; 0: all, of two_step two."""
    data: str | None = None
    """Folder of the dataset: the items of the history that a user's vectors were made of are left out, and if that
    history ends before a held-out item, the lists are measured by it. null: any item may be retrieved."""
    index: Literal["exact", "hnsw", "ivf"] = "exact"
    """exact: every item is scored; hnsw, ivf: approximate, for catalogues where that takes too long."""
    hnsw: HNSW = field(default_factory=HNSW)
    ivf: IVF = field(default_factory=IVF)
    sample: int = 1000
    """Users whose approximate lists are compared with exact ones, about; 0: none."""

    def __post_init__(self) -> None:
        at_least("--k", self.k, 1)
        at_least("--sample", self.sample, 0)
        within("--m", self.m, 0, self.k, f"of a list of --k {self.k} the first interest has 1 to {self.k} items")
        if self.m and self.merge not in ("auto", "two_step"):
            raise ValueError(f"--m is {self.m}, but --merge is {self.merge}; m belongs to two steps, leave it out")
        within("--interests", self.interests, 0, INTERESTS, f"a user has 1 to {INTERESTS}, or 0 for all there are")
        if self.merge == "two_step" and self.interests not in (0, 2) or self.merge == "auto" and self.interests > 2:
            raise ValueError(
                f"--interests is {self.interests}, but two steps take 2; leave it out, or give --merge quota or score"
            )
