"""The two layouts hold the same, padded or not; and packing needs neither torchrec nor Arrow."""

import subprocess
import sys

import numpy as np
import pytest

from recgpt_torchrec.data.packed import number_behind, number_distinct

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


@pytest.mark.parametrize("ids", [[], [7], [5, 2**62, 5, 0, 2**62]])
def test_distinct_ids_are_numbered_by_order(ids):
    distinct, index = number_distinct("item", np.array(ids, dtype=np.int64), 3)
    assert distinct.tolist() == sorted(set(ids)) and (distinct.dtype, index.dtype) == (np.int64, np.int64)
    assert distinct[index].tolist() == ids


def test_more_distinct_ids_than_there_is_room_for_are_refused():
    with pytest.raises(ValueError, match="5000 distinct item ids in a batch with room for 4999"):
        number_distinct("item", np.arange(5000), 4999)


@pytest.mark.parametrize("ids", [[], [3, 4], [9, 0, 9, 4, 2**40, 3]])
def test_ids_of_a_range_come_first_and_others_behind_them(ids):
    of_range = np.array([3, 4, 5])
    distinct, index = number_behind("item", np.array(ids, dtype=np.int64), of_range, 6)
    assert distinct.tolist() == [3, 4, 5, *sorted(set(ids) - {3, 4, 5})]
    assert distinct[index].tolist() == ids
    with pytest.raises(ValueError, match="3 distinct item ids in a batch with room for 2"):
        number_behind("item", np.array([0, 1, 2, 3]), of_range, 5)
