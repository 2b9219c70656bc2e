"""The formulas of what ranks send in a step are what a step of training sends."""

import pytest

from recgpt_torchrec.distributed.placements import Placement
from recgpt_torchrec.distributed.traffic import Traffic, averaged, bytes_sent
from tools.benchmarks.traffic import PARTS, compare


def test_what_two_nodes_of_two_ranks_send_is_what_the_formulas_say():
    rows = compare(4, 2)
    assert {row["sharding"] for row in rows} == {
        "data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid"
    }  # fmt: skip
    assert {row["part"] for row in rows} == set(PARTS)
    for row in rows:
        for way in ("within", "between"):
            counted, formula = row["counted"][way], row["formula"][way]
            # Ids are as many as each batch happens to have, and lie on the ranks as they happen to.
            assert counted == pytest.approx(formula, rel=0.05 if row["part"] == "ids" else 1e-6), row
            assert formula > 0 or row["sharding"] == "data_parallel", row


def place(sharding: str, blocks: int = 1) -> Placement:
    return Placement("item", 10**8, 64, "float32", sharding, "fused", 1, blocks, 0, 0)


def test_row_wise_grows_with_the_ranks_and_a_grid_stays_within_the_node():
    def vectors(sharding: str, world: int, blocks: int = 1) -> tuple[float, float]:
        sent = bytes_sent(place(sharding, blocks), 1000, world, 8).vectors
        return sent.within, sent.between

    whole = 1000 * 64 * 4
    assert vectors("row_wise", 8) == (7 * whole, 0)
    assert vectors("row_wise", 64) == (63 * whole * 7 / 8, 63 * whole / 8)
    assert vectors("grid", 64, 4) == vectors("table_row_wise", 64) == (7 * whole, 7 / 8 * whole)
    assert sum(vectors("column_wise", 64, 64)) == sum(vectors("table_wise", 64)) == 63 / 64 * whole
    half = bytes_sent(place("row_wise"), 1000, 64, 8, number_bytes=2).vectors
    assert half.total == sum(vectors("row_wise", 64)) / 2


def test_groups_send_what_they_hold_to_be_averaged_between_nodes_only_if_they_are_nodes():
    table = Placement("item", 1000, 16, "float32", "row_wise", "fused", 32, 1, 8_000, 4 * 64_000)
    assert averaged(table, shard_ranks=8, sync_steps=10, world_size=32, local_world_size=8) == Traffic(0, 1_200)
    assert averaged(table, shard_ranks=4, sync_steps=1, world_size=8, local_world_size=8) == Traffic(32_000, 0)
    assert averaged(table, shard_ranks=32, sync_steps=1, world_size=32, local_world_size=8) == Traffic(0, 0)
