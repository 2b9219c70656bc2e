"""The two layouts hold the same, padded or not; and packing needs neither torchrec nor Arrow."""

import subprocess
import sys

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
