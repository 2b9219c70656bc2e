"""What `--tables.sharding auto` chooses, and that a plan covers every table once, for 1 to 512 ranks."""

from collections import Counter
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.types import EnumerableShardingSpec, ShardingPlan

from recgpt_torchrec.config import Sharding
from recgpt_torchrec.config.tables import TableChoice
from recgpt_torchrec.distributed.placements import placements, table_text
from recgpt_torchrec.distributed.sharding import make_plan
from recgpt_torchrec.distributed.sharding_types import UNFAIR, Choice, Ranks, Size, choose, why_not
from recgpt_torchrec.errors import InputError

MILLION = 1_000_000
COPIED = 32 * 2**20
BAGS = 4_920


def choose_one(rows: int, dim: int, world: int, local: int, bags: int | None = BAGS, **options: Any) -> Choice:
    sizes = {"item": Size(rows, dim)}
    return choose(Sharding(**options), sizes, Ranks(world, local), bags=bags, fused=bags is not None)["item"]


@pytest.mark.parametrize(
    ("rows", "dim", "ranks", "bags", "expected"),
    [
        (12_101, 64, 2, BAGS, "table_wise"),  # a step looks up a part of it
        (12_101, 64, 1, BAGS, "table_wise"),
        (12_101, 64, 8, BAGS, "data_parallel"),  # one rank would look up for all
        (12_101, 64, 2, 12_101, "data_parallel"),  # every row in each step
        (12_101, 64, 2, None, "data_parallel"),  # not trained
        (2_000, 64, 2, 300, "data_parallel"),  # small
        (12_101, 66, 2, BAGS, "data_parallel"),  # fused kernels cannot train it
        (MILLION, 66, 2, BAGS, "data_parallel"),
        (MILLION, 66, 2, None, "row_wise"),  # others look it up
        (MILLION, 64, 2, BAGS, "column_wise"),
        (MILLION, 64, 16, BAGS, "column_wise"),  # blocks of 4
        (MILLION, 64, 32, BAGS, "row_wise"),
        (MILLION, 64, 3, BAGS, "row_wise"),
        (MILLION, 12, 2, None, "row_wise"),  # blocks of 6
    ],
)
def test_auto_on_one_node_follows_size_ranks_and_what_a_step_looks_up(rows, dim, ranks, bags, expected):
    assert choose_one(rows, dim, ranks, ranks, bags).kind == expected


@pytest.mark.parametrize(
    ("dim", "nodes", "expected"),
    [
        (64, 2, ("grid_shard", 2)),
        (64, 4, ("grid_shard", 4)),  # blocks of 16
        (64, 8, ("grid_shard", 4)),  # half of the nodes: twice a rank's share
        (64, 16, ("grid_shard", 8)),
        (64, 64, ("grid_shard", 16)),  # blocks of 4: four times a rank's share
        (32, 64, ("row_wise", 1)),  # a grid would leave eight times a rank's share
        (12, 2, ("table_row_wise", 1)),
        (12, 8, ("grid_shard", 3)),
        (12, 64, ("row_wise", 1)),
        (100, 2, ("table_row_wise", 1)),  # blocks of 50 are no multiple of 4
        (512, 4, ("column_wise", 32)),  # blocks of 16
        (512, 8, ("grid_shard", 8)),  # not of 8
    ],
)
def test_auto_on_several_nodes_of_eight_ranks(dim, nodes, expected):
    assert choose_one(100 * MILLION, dim, 8 * nodes, 8) == expected


def test_tables_of_equal_size_share_the_nodes():
    sizes = {"user": Size(100 * MILLION, 12), "item": Size(100 * MILLION, 12)}
    choices = choose(Sharding(), sizes, Ranks(32, 8), bags=BAGS, fused=True)
    assert choices == dict.fromkeys(sizes, ("table_row_wise", 1))


DIMS = (8, 10, 12, 32, 64, 66, 100, 128, 512)
ROWS = (10, 1_000, 100_000, 10 * MILLION, 1000 * MILLION)


@pytest.mark.parametrize("copied", [32.0, 0.0])
def test_auto_chooses_what_can_be_placed_for_every_number_of_ranks(copied):
    for world in range(1, 513):
        local = min(world, 8) if world % min(world, 8) == 0 else world
        ranks = Ranks(world, local)
        for dim in DIMS:
            for rows in ROWS:
                for fused in (True, False):
                    size = Size(rows, dim)
                    options = Sharding(data_parallel_mb=copied)
                    (choice,) = choose(options, {"item": size}, ranks, bags=BAGS, fused=fused).values()
                    case = (world, local, dim, rows, fused, choice)
                    assert why_not(choice.kind, size, ranks, fused) is None, case
                    assert dim % choice.blocks == 0, case
                    assert choice.blocks == 1 or dim // choice.blocks % 4 == 0, case
                    spread = {
                        "column_wise": world,
                        "row_wise": world,
                        "table_row_wise": local,
                        "grid_shard": choice.blocks * local,
                    }.get(choice.kind, 1)
                    if size.bytes > COPIED and (dim % 4 == 0 or not fused) and rows >= world:
                        assert size.bytes / spread <= max(COPIED, UNFAIR * size.bytes / world), case


def make_tables(dim: int, rows: dict[str, int]) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(name=name, embedding_dim=dim, num_embeddings=number, feature_names=[name])
        for name, number in rows.items()
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta"))


def cells(plan: ShardingPlan, table: str, world: int) -> Counter[int]:
    """Check that a plan covers a table exactly once, and count the numbers on each rank."""
    (module,) = plan.plan.values()
    sharding = module[table]
    by_rank: Counter[int] = Counter()
    if sharding.sharding_type == "data_parallel":
        assert sharding.ranks == list(range(world))
        return by_rank
    assert isinstance(sharding.sharding_spec, EnumerableShardingSpec)
    blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shard in sharding.sharding_spec.shards:
        (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
        rank = shard.placement.rank()
        assert 0 <= rank < world
        blocks.setdefault((column, columns), []).append((row, rows))
        by_rank[rank] += rows * columns
    end = 0
    for (column, columns), parts in sorted(blocks.items()):
        assert column == end
        end, last = column + columns, 0
        for row, rows in sorted(parts):
            assert row == last
            last = row + rows
        by_rank[-1] = last
    by_rank[-2] = end
    return by_rank


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 7, 8, 13, 16, 24, 32, 40, 48, 56, 64, 72, 100, 128, 256, 384, 512])
@pytest.mark.parametrize("dim", [12, 64, 100, 512])
def test_a_plan_covers_each_table_once_and_no_rank_has_much_more_than_its_share(world, dim):
    local = 8 if world > 8 and world % 8 == 0 else world
    rows = {"user": 1000 * MILLION, "item": 100 * MILLION, "output": 900}
    plan = make_plan(
        make_tables(dim, rows), Sharding(), BAGS, world_size=world, local_world_size=local, device_type="cuda"
    )
    total: Counter[int] = Counter()
    for table, number in rows.items():
        by_rank = cells(plan, table, world)
        if by_rank:
            assert (by_rank.pop(-1), by_rank.pop(-2)) == (number, dim)
        total += by_rank
    share = sum(number * dim for number in rows.values()) / world
    assert total.total() >= 0.99 * share * world
    assert max(total.values()) <= UNFAIR * share + 2 * COPIED / 4, (max(total.values()), share)


def test_what_cannot_be_sharded_as_asked_is_refused_with_the_reason_and_what_would_fit():
    wrong = {
        ("column_wise", 64, 100, 48, 48): "64 columns are not 48 equal blocks of a multiple of 4. "
        "--tables.item.sharding row_wise would fit",
        ("row_wise", 64, 5, 8, 8): "it has 5 rows, fewer than the 8 ranks. --tables.item.sharding column_wise",
        ("table_row_wise", 64, 100, 8, 8): "it needs several nodes. --tables.item.sharding row_wise",
        ("grid", 64, 100, 16, 16): "it needs several nodes",
        ("grid", 12, 100, 16, 8): "12 columns are not equal blocks of a multiple of 4 for up to 2 nodes",
        ("planner", 66, 100, 2, 2): "not a multiple of 4, and cannot be trained in shards",
        ("table_wise", 66, 100, 2, 2): "--tables.item.sharding data_parallel would fit",
    }
    for (sharding, dim, rows, world, local), message in wrong.items():
        with pytest.raises(InputError) as error:
            choose_one(rows, dim, world, local, sharding=sharding)
        assert message in str(error.value)
        assert f"the item table cannot be sharded {sharding}: " in str(error.value)


def plan_of(options: Sharding, device: str = "cuda", **more: Any) -> dict[str, tuple[str, str]]:
    model = make_tables(64, {"user": 10 * MILLION, "item": MILLION})
    plan = make_plan(model, options, BAGS, world_size=16, local_world_size=8, device_type=device, **more)
    (module,) = plan.plan.values()
    return {name: (table.sharding_type, table.compute_kernel) for name, table in module.items()}


def test_tables_are_sharded_and_held_as_their_own_options_say():
    own = TableChoice(sharding="row_wise", kernel="uvm")
    assert plan_of(Sharding(sharding="grid", user=own)) == {
        "user": ("row_wise", "fused_uvm"),
        "item": ("grid_shard", "fused"),
    }
    cached = plan_of(Sharding(kernel="uvm_caching", item=TableChoice(kernel="fused")))
    assert [kernel for _, kernel in cached.values()] == ["fused_uvm_caching", "fused"]
    with pytest.raises(InputError, match="--tables.kernel uvm of the user table needs CUDA"):
        plan_of(Sharding(sharding="grid", user=own), device="cpu")


def test_auto_keeps_in_the_hosts_memory_what_the_gpus_cannot_hold():
    assert {kernel for _, kernel in plan_of(Sharding(), hbm_bytes=2**33).values()} == {"fused"}
    kernels = plan_of(Sharding(), hbm_bytes=210 * 2**20)
    assert {kernel for _, kernel in kernels.values()} == {"fused", "fused_uvm_caching"}
    with pytest.raises(InputError, match="2.6 GiB of weights, which 16 GPUs of 0.2 GiB cannot hold"):
        plan_of(Sharding(kernel="fused"), hbm_bytes=210 * 2**20)


def test_the_planner_chooses_types_that_the_tables_can_have():
    for device in ("cpu", "cuda"):
        chosen = plan_of(Sharding(sharding="planner"), device)
        assert {kernel for _, kernel in chosen.values()} <= {"dense", "fused", "fused_uvm", "fused_uvm_caching"}


def test_placements_count_weights_and_moments_of_the_fullest_rank():
    model = make_tables(64, {"user": 1_000_001, "item": 300})
    options = Sharding(user=TableChoice(sharding="row_wise"))
    plan = make_plan(model, options, BAGS, world_size=8, local_world_size=8, device_type="cpu")
    user, item = placements(plan, model, "rowwise_adagrad")
    assert (user.ranks, user.bytes_per_rank) == (8, 125_001 * 65 * 4) and user.total_bytes == 1_000_001 * 65 * 4
    assert (item.ranks, item.total_bytes) == (8, 8 * item.bytes_per_rank) and item.bytes_per_rank == 300 * 65 * 4
    grid = make_plan(model, Sharding(sharding="grid"), BAGS, world_size=8, local_world_size=4, device_type="cpu")
    user = placements(grid, model, "rowwise_adagrad")[0]
    assert (user.blocks, user.bytes_per_rank) == (2, 250_001 * 33 * 4)  # a moment per block
    assert placements(grid, model)[0].bytes_per_rank == 250_001 * 32 * 4
    assert placements(grid, model, "adam")[0].bytes_per_rank == 3 * 250_001 * 32 * 4
    lines = table_text(placements(grid, model, "adam")).splitlines()
    assert lines[0].split() == "table rows x dim dtype sharding kernel ranks MiB per rank".split()
    assert lines[1].split() == "user 1,000,001 x 64 float32 grid fused 8 91.6".split()
    assert len({len(line) for line in lines}) == 1
