"""A table of few rows, row-wise over ranks of which the last holds none: trained, saved and restored as any other."""

from typing import Any

import torch

from recgpt_torchrec.checkpoints.folder import Checkpoints
from recgpt_torchrec.checkpoints.saving import Saver
from recgpt_torchrec.checkpoints.state import restore, state_of
from recgpt_torchrec.config import Saving
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.training.building import build
from tests.distributed.training_helpers import Case, gather_table
from tools.ranks import run_ranks
from tools.reshard import CAPACITY, ITEMS, STEPS, train_steps

FEW = 5
"""Users: in blocks of 2 on four ranks, so that none is left for rank 3."""


def save_and_restore(rank: int, world_size: int, folder: str) -> tuple[list[int], dict[str, bool]]:
    case = Case("row_wise", "adagrad", "sampled")
    dataset = Dataset(path="", manifest=Manifest(users=FEW, items=ITEMS))

    def make() -> tuple[Any, Any]:
        return build(case.config, case.config.model, dataset, capacity=CAPACITY, device=torch.device("cpu"))

    model, optimizer = make()
    train_steps(model, optimizer, range(STEPS), users=FEW)
    saver = Saver(Checkpoints(folder, keep=1), Saving())
    saver.save(STEPS, state_of(model, optimizer), {})
    saver.finish()
    again, optimizer_again = make()
    path = Checkpoints(folder, keep=1).latest()
    assert path is not None
    restore(again, optimizer_again, path, STEPS)
    before, after = ({table_name(n): gather_table(v) for n, v in sorted(tables_of(m).items())} for m in (model, again))
    moments = [
        {name: [gather_table(moment) for moment in state.values()] for name, state in sorted(tables.items())}
        for m, o in ((model, optimizer), (again, optimizer_again))
        for tables in [{n: s for n, s in state_of(m, o)["optimizer"]["state"].items() if "embedding_bags" in n}]
    ]
    same = {name: torch.equal(before[name], after[name]) for name in before}
    same["moments"] = all(
        torch.equal(a, b) for n in moments[0] for a, b in zip(moments[0][n], moments[1][n], strict=True)
    )
    same["trained"] = bool(before["user"].abs().sum() > 0)
    (users,) = (value for name, value in tables_of(model).items() if table_name(name) == "user")
    return [shard.tensor.shape[0] for shard in users.local_shards()], same


def test_a_rank_without_rows_trains_saves_and_restores(tmp_path):
    results = run_ranks(save_and_restore, 4, str(tmp_path), timeout=150)
    assert [rows for rows, _ in results] == [[2], [2], [1], [0]]
    for _, same in results:
        assert same == dict.fromkeys(("item", "user", "moments", "trained"), True)
