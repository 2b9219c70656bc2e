"""The two layouts hold the same, padded or not; and packing needs neither torchrec nor Arrow."""

import subprocess
import sys

import numpy as np
import pytest

from recgpt_torchrec.data.packed import SORTED, number_distinct

PACK_WITHOUT = """
import sys
for name in ("torchrec", "pyarrow", "fbgemm_gpu"):
    sys.modules[name] = None  # importing it is an error
import numpy as np
from recgpt_torchrec.data.candidates import Uniform, Candidates
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity, FixedShape, pack_histories
histories = Histories(users=np.array([4, 2]), items=np.array([7, 3, 7, 5, 7]), offsets=np.array([0, 3, 5]))
batch, ids = pack_histories(
    histories, row_length=8, capacity=Capacity(2, 9), predict=True, layout="row", pad=FixedShape(8, 2, 4),
    draw=lambda targets: Candidates(*Uniform(9, 4).draw(np.random.default_rng(0))),
)
print(ids.items[batch.item_bag[0, :3]].tolist(), ids.items[batch.target_bag[:3]].tolist(), batch.targets)
"""


def test_histories_are_packed_where_neither_torchrec_nor_arrow_is_installed():
    done = subprocess.run([sys.executable, "-c", PACK_WITHOUT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[7, 3, 5] [3, 7, 7] 3"


@pytest.mark.parametrize("items", [1, 50, 10**4, 2**62], ids=["one item", "few", "many", "ids of any size"])
@pytest.mark.parametrize("count", [0, 1, SORTED - 1, SORTED, 30_000])
def test_distinct_ids_are_numbered_as_by_sorting(count, items):
    ids = np.random.default_rng(0).integers(items, size=count)
    distinct, index = number_distinct("item", ids, 30_000)
    assert np.array_equal(np.sort(distinct), np.unique(ids))
    assert np.array_equal(distinct[index], ids) and (distinct.dtype, index.dtype) == (np.int64, np.int64)
    assert np.array_equal(number_distinct("item", ids.copy(), 30_000)[0], distinct)


@pytest.mark.parametrize("count", [100, 2 * SORTED])
def test_consecutive_ids_and_multiples_of_powers_of_two_are_numbered_in_few_rounds(count):
    """Hashes of such ids are the likeliest to collide."""
    for ids in (np.arange(count), np.arange(count) << 32, np.arange(count) * 2**12, np.repeat(np.arange(count), 3)):
        distinct, index = number_distinct("item", ids, count)
        assert np.array_equal(np.sort(distinct), np.unique(ids)) and np.array_equal(distinct[index], ids)


def test_more_distinct_ids_than_there_is_room_for_are_refused():
    with pytest.raises(ValueError, match="5000 distinct item ids in a batch with room for 4999"):
        number_distinct("item", np.arange(5000), 4999)
