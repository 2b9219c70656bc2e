"""What `--tables.sharding auto` chooses for a table."""

import pytest

from recgpt_torchrec.config import Sharding
from recgpt_torchrec.distributed.sharding import sharding_type

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("rows", "dim", "ranks", "bags", "expected"),
    [
        (12_101, 64, 2, 4_920, "table_wise"),  # a step looks up a part of it
        (12_101, 64, 1, 4_920, "table_wise"),
        (12_101, 64, 8, 4_920, "data_parallel"),  # one rank would look up for all
        (12_101, 64, 2, 12_101, "data_parallel"),  # every row in each step
        (12_101, 64, 2, None, "data_parallel"),  # not trained
        (2_000, 64, 2, 300, "data_parallel"),  # small
        (12_101, 66, 2, 4_920, "data_parallel"),  # fused kernels cannot train it
        (MILLION, 64, 2, 4_920, "column_wise"),
        (MILLION, 64, 16, 4_920, "column_wise"),  # blocks of 4
        (MILLION, 64, 32, 4_920, "row_wise"),
        (MILLION, 64, 3, 4_920, "row_wise"),
        (MILLION, 12, 2, None, "row_wise"),  # blocks of 6
    ],
)
def test_auto_follows_size_ranks_and_what_a_step_looks_up(rows, dim, ranks, bags, expected):
    assert sharding_type(Sharding(), rows, dim, ranks, bags) == expected


def test_what_is_given_is_taken():
    assert sharding_type(Sharding(sharding="row_wise"), 5, 4, 2, 1) == "row_wise"
