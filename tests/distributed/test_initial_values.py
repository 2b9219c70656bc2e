"""Initial values depend on (seed, table, row, column) alone: any part of a table is drawn as if it were drawn whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt_torchrec.config import Tables
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.distributed import initial_values
from recgpt_torchrec.distributed.initial_values import BLOCK_ROWS, fill_shard, initialise_tables, key_of
from recgpt_torchrec.distributed.processes import silence_libraries
from tests.distributed.training_helpers import gather_table
from tools.ranks import run_ranks
from tools.reshard import DIM, ITEMS, Layout, build_model

KEY = key_of(3, "item")


def filled(rows: int, columns: int, row: int = 0, column: int = 0, std: float = 1.0, key: int = KEY) -> torch.Tensor:
    tensor = torch.full((rows, columns), torch.nan)
    fill_shard(tensor, row, column, std=std, key=key)
    return tensor


@settings(deadline=None, max_examples=30)
@given(
    width=st.integers(1, 21),
    rows=st.tuples(st.integers(0, 3 * BLOCK_ROWS), st.integers(0, 2 * BLOCK_ROWS)),
    blocks=st.tuples(st.integers(0, 5), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_a_part_is_that_part_of_the_whole(width, rows, blocks, dtype):
    first, count = rows
    column = min(4 * blocks[0], 4 * ((width - 1) // 4))
    columns = min(4 * blocks[1], width - column)
    whole = filled(first + count, width)
    part = torch.full((count, columns), torch.nan, dtype=dtype)
    fill_shard(part, first, column, std=1.0, key=KEY)
    assert torch.equal(part, whole[first:, column : column + columns].to(dtype))


def plain_value(seed: int, table: str, row: int, column: int) -> float:
    """One value as the module describes it, in double precision: a Philox stream per block, Box and Muller's method."""
    rows, columns = 4096, 4
    stream = np.random.Philox(key=key_of(seed, table), counter=[0, row // rows, column // columns, 0])
    bits = stream.random_raw(rows * columns // 2).view(np.uint32)
    place = row % (rows // 2) * columns + column % columns
    uniform = (int(bits[place]) % 2**31 + 1) / 2**31
    angle = float(bits[rows * columns // 2 + place].view(np.int32)) / 2**31 * np.pi
    trigonometric = np.cos if row % rows < rows // 2 else np.sin
    return float(np.sqrt(-2 * np.log(uniform)) * trigonometric(angle))


def test_values_are_those_of_the_description():
    whole = filled(9000, 10, std=0.5)
    for row, column in ((0, 0), (1, 3), (2047, 4), (2048, 0), (4095, 7), (4096, 5), (8191, 9), (8192, 8), (8999, 9)):
        assert whole[row, column].item() == pytest.approx(0.5 * plain_value(3, "item", row, column), abs=1e-5)


def test_known_values():
    """They may never change: runs would start from other values."""
    expected = [[-1.229305, -0.828021, -0.878703], [-1.168570, 1.048148, -0.280069], [0.291783, -0.304138, -0.071970]]
    assert filled(4097, 8)[[0, 1, 4096]][:, [0, 1, 7]].tolist() == [pytest.approx(row, abs=1e-5) for row in expected]


def test_they_are_normal_and_independent_of_their_neighbours():
    values = filled(40_000, 24).double()
    count = values.numel()
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.std() - 1) < 5 / (2 * count) ** 0.5
    assert abs(values.pow(3).mean()) < 5 * (15 / count) ** 0.5
    assert abs(values.pow(4).mean() - 3) < 5 * (96 / count) ** 0.5
    for quantile in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        share = (values < torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(quantile))).double().mean()
        assert abs(share - quantile) < 5 * (quantile * (1 - quantile) / count) ** 0.5
    assert 4.5 < values.abs().max() < 6.6
    # Neighbours, and the two numbers of one pair, half a block apart: values, and their squares.
    for power in (1, 2):
        v = (values**power - (values**power).mean()) / (values**power).std()
        for other in (v.roll(1, 0), v.roll(1, 1), v.roll(4, 1), v.roll(BLOCK_ROWS // 2, 0), v.roll(BLOCK_ROWS, 0)):
            assert abs((v * other).mean()) < 5 / count**0.5


@pytest.mark.parametrize("other", [key_of(4, "item"), key_of(3, "output"), key_of(3, "user")])
def test_seeds_and_tables_have_values_of_their_own(other):
    mine, others = filled(2000, 8).flatten(), filled(2000, 8, key=other).flatten()
    assert abs(torch.corrcoef(torch.stack([mine, others]))[0, 1]) < 5 / mine.numel() ** 0.5


def test_nothing_is_drawn_for_zeros(monkeypatch):
    monkeypatch.setattr(initial_values, "_draw", None)
    assert not filled(5000, 3, std=0.0).any()


def tables_of_layout(rank: int, world_size: int, sharding: str) -> dict[str, torch.Tensor | None]:
    silence_libraries()
    model, _ = build_model(Layout(world_size, sharding, "sgd"))
    tables: dict[str, torch.Tensor | None] = {
        table_name(name): gather_table(value) for name, value in tables_of(model).items()
    }
    # From row 11 on, with another seed: the rows before stay.
    names = {table_name(name): name for name in tables_of(model)}
    initialise_tables(model, Tables().init_std_of, 8, {names["item"]: 11, names["user"]: 5})
    return tables | {f"{table_name(name)} later": gather_table(value) for name, value in tables_of(model).items()}


@pytest.mark.parametrize("sharding", ["data_parallel", "table_wise", "column_wise", "row_wise"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_sharding_has_the_same_values(sharding, ranks):
    tables = run_ranks(tables_of_layout, ranks, sharding)[0]
    items = filled(ITEMS, DIM, std=0.02, key=key_of(7, "item"))
    assert torch.equal(tables["item"], items) and not tables["user"].any()
    items[11:] = filled(ITEMS, DIM, std=0.02, key=key_of(8, "item"))[11:]
    assert torch.equal(tables["item later"], items) and not tables["user later"].any()
