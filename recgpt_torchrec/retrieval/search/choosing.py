"""Chooses the kind of an index and its options, and compares them with those of an index that is there."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from recgpt_torchrec.config import HNSW, IVF, PQ, Index, Retrieve
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.index_manifest import PARAMETERS, IndexManifest, vectors_fingerprint
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.texts.commands import command

FLAT_ITEMS = 100_000
"""Up to this number of items, auto chooses flat."""
IVF_BYTES = 2**32
"""Up to this size of all vectors, auto chooses ivf, which is fast while they are in memory; ivf_pq needs a sixteenth of
that, the codes. On a trained export of 14,109 items (dim 64) ivf found .9965 of the best 50 at 20,800 queries/s of one
core, ivf_pq the same at 7,600, hnsw .9954 at 9,100, and flat all at 6,800; building took .3, 7, 1.9 and 0 s. Of 400,000
drawn vectors ivf found .9995 at 2,300 queries/s and ivf_pq .998 at 3,000; of 100,000 hnsw .971 at 4,500."""
CLUSTER = 39
"""Minimum number of items per cluster that FAISS recommends."""
SEARCHING = {"ivf.probes": 64, "pq.refine": 8, "hnsw.search": 128}
"""Options that only the search depends on, and what 0 means for a new index. Of the best 50 of 400,000 drawn vectors
(dim 64, codes of 16 bytes) ivf_pq found .973 with 32 probes and .998 with 64 or more; .987 where 4 candidates per item
were scored again, .998 with 8, .9994 with 16."""

EARLIER = {"ivf.probes": 64, "hnsw.search": 128}
"""Options of retrieve that lists record with a number where the default is 0; lists of the first version lack them."""

CHOICES = ("index", "hnsw", "ivf", "pq")
"""The option of retrieve that names the kind of index, and the groups of its options."""


class Groups(Protocol):
    """A configuration with the groups of index options."""

    hnsw: HNSW
    ivf: IVF
    pq: PQ


def choose_kind(kind: str, items: int, dim: int) -> str:
    """The kind of index for `items` vectors of `dim` numbers, auto resolved."""
    if kind != "auto":
        return kind
    return "flat" if items <= FLAT_ITEMS else "ivf" if 4 * items * dim <= IVF_BYTES else "ivf_pq"


def choose_parameters(
    kind: str, groups: Groups, items: int, dim: int, shards: int, earlier: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The options of an index, by dotted name, with a number for every 0.

    Args:
        kind: flat, ivf, ivf_pq or hnsw.
        groups: given options.
        items: number of all items.
        dim: length of a vector.
        shards: number of shards, none of them empty.
        earlier: options of an index that is there, whose search is kept where none is given; None: a new index.

    Raises:
        InputError: more clusters than items of a shard, codes that do not fit the vectors, or too few items for codes.
    """
    smallest, prefix = items // shards, "--index." if isinstance(groups, Index) else "--"
    defaults = {name: (earlier or {}).get(name, value) for name, value in SEARCHING.items()}
    chosen = {name: _value(groups, name) or defaults.get(name, 0) for name in PARAMETERS[kind]}
    places = "shards" if isinstance(groups, Index) else "ranks"
    of_shards = "" if shards == 1 else f" in each of {shards} {places}"
    if kind in ("ivf", "ivf_pq"):
        if chosen["ivf.clusters"] > smallest:
            raise InputError(
                f"{prefix}ivf.clusters is {chosen['ivf.clusters']}, but the export has {smallest} items{of_shards}; "
                "give fewer, or 0 to choose"
            )
        chosen["ivf.clusters"] = chosen["ivf.clusters"] or max(1, min(round(4 * smallest**0.5), smallest // CLUSTER))
    if kind == "ivf_pq":
        chosen["pq.m"] = chosen["pq.m"] or next(m for m in range(max(1, dim // 4), 0, -1) if dim % m == 0)
        if dim % chosen["pq.m"]:
            fitting = ", ".join(str(m) for m in range(1, dim + 1) if dim % m == 0)
            raise InputError(
                f"{prefix}pq.m is {chosen['pq.m']}, but the vectors have {dim} numbers; give one of {fitting}"
            )
        if smallest < (least := 2 ** chosen["pq.bits"]):
            raise InputError(
                f"codes of {chosen['pq.bits']} bits need at least {least} items, but the export has {smallest}"
                f"{of_shards}; choose the kind flat, or fewer {prefix}pq.bits"
                + (" or shards" if isinstance(groups, Index) and shards > 1 else "")
            )
    return chosen


def is_same_build(index: IndexManifest, kind: str, parameters: Mapping[str, int]) -> bool:
    """Whether an index was built with these options; those of the search may differ."""
    same = (index.parameters.get(name) == value for name, value in parameters.items() if name not in SEARCHING)
    return index.kind == kind and all(same)


def search_options(kind: str, groups: Groups) -> dict[str, int]:
    """The options of a kind that only the search depends on, by dotted name."""
    return {name: _value(groups, name) for name in PARAMETERS[kind] if name in SEARCHING}


def held_index(config: Retrieve, export: Export) -> IndexManifest | None:
    """The index of the export that `--index` means; None: exact search, or an index that has to be built.

    Raises:
        InputError: it was made of other vectors, or built with other options than those given.
    """
    index = export.manifest.index
    if index is None or config.index not in ("auto", index.kind):
        return None
    rebuild = command("index", {"export": export.path, "index.kind": index.kind})
    if index.vectors != vectors_fingerprint(export.manifest):
        raise InputError(
            f"{export.path}: its index was made of other vectors than those it holds now; build it again with "
            f"{rebuild}, or give --index exact"
        )
    defaults = Retrieve(export="", output="")
    for name in PARAMETERS[index.kind]:
        given, there = _value(config, name), index.parameters.get(name)
        if name not in SEARCHING and given not in (there, _value(defaults, name)):
            raise InputError(
                f"--{name} is {given}, but the index in {export.path} was built with {there}; leave it out, or build "
                f"another with {rebuild} --index.{name} {given}"
            )
    return index


def is_open(config: Retrieve) -> bool:
    """Whether the options leave it to the export which index is searched, and how."""
    defaults = Retrieve(export="", output="")
    return all(getattr(config, name) == getattr(defaults, name) for name in CHOICES)


def check_used(config: Retrieve, kind: str) -> None:
    """Check that no option is given that this kind of search does not use.

    Raises:
        InputError: names the option, and the kinds that use it.
    """
    defaults = Retrieve(export="", output="")
    for name in dict.fromkeys(name for names in PARAMETERS.values() for name in names):
        if name not in PARAMETERS.get(kind, ()) and (given := _value(config, name)) != _value(defaults, name):
            users = " or ".join(each for each, names in PARAMETERS.items() if name in names)
            raise InputError(
                f"--{name} is {given}, but the search of {config.export} is {kind} (--index {config.index}), which "
                f"does not use it; leave it out, or give --index {users}"
            )


def resolve(config: Retrieve, export: Export) -> Retrieve:
    """The options of retrieve with auto and 0 replaced by what they mean for this export; lists record these.

    Raises:
        InputError: the index of the export cannot be searched with these options, or an option is not used.
    """
    if config.neighbours.path is not None and config.index == "auto":  # an index does not fetch what neighbours raise
        config = replace(config, index="exact")
    index = held_index(config, export)
    kind = index.kind if index is not None else "exact" if config.index == "auto" else config.index
    check_used(config, kind)
    groups = {name: getattr(config, name) for name in ("hnsw", "ivf", "pq")}
    chosen = {} if index is None else index.parameters
    for name in dict.fromkeys([*EARLIER, *PARAMETERS.get(kind, ())]):
        group, option = name.split(".")
        given = _value(config, name)
        if name in SEARCHING:
            value = given or chosen.get(name) or SEARCHING[name]
        else:
            value = chosen.get(name, given)
        groups[group] = replace(groups[group], **{option: value})
    return replace(config, index=kind, **groups)  # type: ignore[arg-type]  # kinds are checked with the manifest


def _value(groups: Groups, name: str) -> Any:
    group, option = name.split(".")
    return getattr(getattr(groups, group), option)
