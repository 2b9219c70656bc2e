"""Rows of tables that another user or item has now: they begin anew when a run starts from an earlier checkpoint.

A row gets the values that it would have at the start of a run, and no optimizer state. Each rank changes its shards.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

from recgpt_torchrec.checkpoints.state import state_of
from recgpt_torchrec.data.bags import table_name, tables_of
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.distributed.initial_values import initialise_rows, shards_of


@torch.no_grad()
def reset_rows(
    model: nn.Module,
    optimizer: CombinedOptimizer,
    rows: Mapping[str, Callable[[], Iterator[Int64]]],
    std_of: Callable[[str], float],
    seed: int,
) -> dict[str, int]:
    """Give rows of tables their initial values and no optimizer state, in place (collective).

    Args:
        model, optimizer: restored from a checkpoint; tables are sharded in any way.
        rows: by the name of a table, reads the rows to reset in blocks of ascending ids [n] int64, on all ranks the
            same.
        std_of: standard deviation of a table's initial values, by its name.
        seed: of the run.

    Returns:
        The number of rows that were reset, by the name of the table.
    """
    state = state_of(model, optimizer)["optimizer"]["state"]
    counts = dict.fromkeys(rows, 0)
    for parameter, value in tables_of(model).items():
        table = table_name(parameter)
        if table not in rows:
            continue
        for ids in rows[table]():
            counts[table] += len(ids)
            initialise_rows(value, ids, table=table, std=std_of(table), seed=seed)
            for moment in state.get(parameter, {}).values():
                for tensor, row, _ in shards_of(moment):
                    own = ids[(ids >= row) & (ids < row + tensor.shape[0])]
                    tensor[torch.from_numpy(own - row).to(tensor.device)] = 0
    return counts
