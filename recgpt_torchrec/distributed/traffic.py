"""Bytes that ranks send each other per training step, by formula: lookups of each table, and gradients of the decoder.

Knows placements and numbers alone; `tools/benchmarks/traffic.py` holds the formulas against what runs send.

All figures are means over the ranks. An all-reduce, a reduce-scatter and an all-gather are counted as a ring does them:
each rank sends to the next one, and only the last rank of a node sends to another node. Not counted: the sizes of
messages, agreed on before they are sent, and the few numbers by which ranks stay in step.
"""

from dataclasses import dataclass

from recgpt_torchrec.distributed.placements import Placement
from recgpt_torchrec.distributed.sharding_types import COPY, GRID, NODE_ROWS, OPTION_NAMES, ROWS, Ranks

ID_BYTES, LENGTH_BYTES = 8, 4
"""Of an id, and of the number of ids in a bag."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends."""

    within: float = 0.0
    """To other ranks of its node."""
    between: float = 0.0
    """To ranks of other nodes."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.within + other.within, self.between + other.between)

    @property
    def total(self) -> float:
        """To all other ranks."""
        return self.within + self.between


@dataclass(frozen=True)
class TableTraffic:
    """Bytes that a rank sends for one table in a training step, as a mean over the ranks.

    Vectors are sent by the ranks that hold the table, and ids and gradients received by them: where these are few of
    the ranks, each has so many times the mean.
    """

    ids: Traffic
    """Ids and lengths of bags, to the ranks that look them up."""
    vectors: Traffic
    """Looked-up vectors, in the forward."""
    gradients: Traffic
    """Their gradients, in the backward; of a copied table the whole gradient."""

    @property
    def total(self) -> Traffic:
        """Of all three."""
        return self.ids + self.vectors + self.gradients


def bytes_sent(
    placed: Placement,
    bags: int,
    world_size: int,
    local_world_size: int,
    *,
    ids: int | None = None,
    number_bytes: int = 4,
) -> TableTraffic:
    """What a rank sends for one table in a training step.

    column_wise, table_wise: a bag's vector travels once, whatever the number of ranks; its id to each block of columns.
    row_wise: every rank sends a sum of its rows for every bag of every rank, which the reduce-scatter adds up.
    table_row_wise, grid: those sums stay within a node, and what leaves it travels once, as column-wise.

    Args:
        placed: the table.
        bags: number of bags that a rank has room for, in all keys of the table, empty ones included.
        world_size: number of ranks; of a group, with `--tables.shard_ranks` (see `averaged`).
        local_world_size: number of ranks per node.
        ids: number of ids that a rank looks up; None: one per bag.
        number_bytes: bytes of a number of a vector on its way, 2 with `--tables.communication fp16` or `bf16`.
    """
    ranks = Ranks(world_size, local_world_size)
    world, local, nodes = ranks.world_size, ranks.local_world_size, ranks.nodes
    lengths, values = bags * LENGTH_BYTES, (bags if ids is None else ids) * ID_BYTES
    vectors = float(bags * placed.dim * number_bytes)
    if placed.sharding == COPY:
        gradients = all_reduced(placed.rows * placed.dim * 4, ranks)
        return TableTraffic(Traffic(), Traffic(), gradients)
    if placed.sharding == ROWS:
        sent = _spread(world * lengths + values, ranks)
        sums = _ring((world - 1) * vectors, ranks)
        return TableTraffic(sent, sums, sums)
    if placed.sharding in (NODE_ROWS, OPTION_NAMES[GRID]):
        # To the ranks of one node per block of columns; one in `nodes` senders is on it itself.
        message = placed.blocks * (local * lengths + values)
        sent = Traffic(message * (local - 1) / local / nodes, message * (nodes - 1) / nodes)
        out = Traffic((local - 1) * vectors, (nodes - 1) / nodes * vectors)
        return TableTraffic(sent, out, out)
    out = _spread(vectors, ranks)
    return TableTraffic(_spread(placed.blocks * (lengths + values), ranks), out, out)


def all_reduced(size: float, ranks: Ranks) -> Traffic:
    """What a rank sends to sum `size` bytes over all ranks: gradients of the decoder, or of a copied table."""
    return _ring(2 * size * (ranks.world_size - 1) / ranks.world_size, ranks)


def averaged(placed: Placement, shard_ranks: int, sync_steps: int, world_size: int, local_world_size: int) -> Traffic:
    """What a rank sends per step, on average, to average a table and its moments over groups of ranks.

    Args:
        placed: the table.
        shard_ranks: number of ranks of a group.
        sync_steps: number of steps between two averages.
        world_size: number of ranks of all groups.
        local_world_size: number of ranks per node.
    """
    groups = world_size // shard_ranks
    holders = max(1, local_world_size // shard_ranks)  # of the same rows, on one node
    size = placed.total_bytes / world_size  # what a rank holds, as a mean
    return all_reduced(size / sync_steps, Ranks(groups, min(groups, holders)))


def shared_softmax(targets: int, dim: int, ranks: Ranks, output_bytes: int = 4) -> Traffic:
    """What a rank sends where targets are scored against the candidates of all ranks, see `catalogue.softmax`.

    Args:
        targets: per rank, with which outputs [dim] travel, weighted sums of candidates, an id and six more numbers.
        dim: of an output.
        ranks: all of them.
        output_bytes: bytes of a number of an output: 2 in bf16.
    """
    return _ring((ranks.world_size - 1) * targets * ((output_bytes + 4) * dim + 32), ranks)


def _spread(size: float, ranks: Ranks) -> Traffic:
    """Of messages to ranks that are anywhere, one of which is the sender itself."""
    return Traffic(
        size * (ranks.local_world_size - 1) / ranks.world_size,
        size * (ranks.world_size - ranks.local_world_size) / ranks.world_size,
    )


def _ring(size: float, ranks: Ranks) -> Traffic:
    """Of messages to the next rank, in a ring of all: the last one of a node sends to the next node."""
    between = size / ranks.local_world_size if ranks.nodes > 1 else 0.0
    return Traffic(size - between, between)
