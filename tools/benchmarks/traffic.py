"""Bytes that ranks send per training step by sharding type: counted on 1 to 4 ranks, and by formula up to 64.

    OMP_NUM_THREADS=1 python -m tools.benchmarks.traffic --output traffic.json

Runs one step of pre-training on gloo, four ranks as two nodes of two. `Collectives` sees every collective where torch
dispatches it, those of DDP's reducer included, and adds up what this rank sends to each other rank: of an all-to-all
the parts for the others; of the other collectives what a ring sends (see `distributed.traffic`), whatever gloo does.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from recgpt_torchrec.config import Loss, Model, Pretrain, Tables
from recgpt_torchrec.data.batch import make_batch
from recgpt_torchrec.data.candidates import Candidates
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity
from recgpt_torchrec.distributed.placements import Placement, placements
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.distributed.sharding import make_plan
from recgpt_torchrec.distributed.sharding_types import Ranks
from recgpt_torchrec.distributed.traffic import Traffic, all_reduced, bytes_sent
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.recgpt import RecGPT
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.storage import write_json
from recgpt_torchrec.training.building import build
from tools.ranks import run_ranks
from tools.small_run import walks

USERS, ITEMS, DIM = 500, 3_000, 64
SEQUENCES, LENGTH = 40, 20
"""Of a rank's batch."""
NEGATIVES = 500
CAPACITY = Capacity.of(SEQUENCES, SEQUENCES * (LENGTH + 1) + NEGATIVES)
LARGE_USERS, LARGE_ITEMS, LARGE_TOKENS = 10**9, 10**8, 32_768
"""What the extrapolation is for, tokens per rank, with vectors of the same width."""
PARTS = ("ids", "vectors", "gradients", "decoder")
MEASURED = {1: 1, 2: 1, 4: 2}
"""Numbers of nodes by number of ranks."""
TYPES = ("data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid")


class Collectives(TorchDispatchMode):
    """Counts the bytes that this rank sends in the collectives within the `with`, by kind and destination's node."""

    def __init__(self, local_world_size: int) -> None:
        super().__init__()
        self.local_world_size = local_world_size
        self.part = ""
        self.sent: Counter[tuple[str, bool]] = Counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count collectives of vectors as this part."""
        self.part = part
        yield

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0].strip("_"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        group = boxed[0] if boxed else None
        if group is None:
            return
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        others = len(ranks) - 1
        if name == "alltoall_base":
            _, source, _, _, splits, *_ = args
            row = source.numel() // max(1, source.shape[0]) * source.itemsize
            splits = splits or [source.shape[0] // len(ranks)] * len(ranks)
            part = self.part if source.is_floating_point() else "ids"
            if source.numel() <= 4 * len(ranks) and part == "ids":
                return  # the sizes of what follows
            for peer, rows in zip(ranks, splits, strict=True):
                self._add(part, peer, rows * row)
        elif name in ("reduce_scatter", "reduce_scatter_base", "allgather", "allgather_base", "allreduce"):
            tensors = args[0] if name == "allreduce" else args[1]
            size = sum(tensor.numel() * tensor.itemsize for tensor in _flat(tensors))
            # A ring: of the whole input each rank sends all but one part, of gathered parts each to all but one rank.
            scattered = 1 / len(ranks)
            sent = {"allreduce": 2 * scattered, "reduce_scatter": scattered, "reduce_scatter_base": scattered}
            part = "decoder" if name == "allreduce" else self.part
            place = ranks.index(dist.get_rank())
            self._add(part, ranks[(place + 1) % len(ranks)], size * others * sent.get(name, 1.0))

    def _add(self, part: str, peer: int, size: float) -> None:
        own = dist.get_rank()
        if peer != own:
            self.sent[part, peer // self.local_world_size != own // self.local_world_size] += round(size)


def _flat(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for each in value:
            yield from _flat(each)


def configuration(sharding: Any) -> Pretrain:
    """The run that is measured."""
    return Pretrain(
        data="",
        output="",
        model=Model(dim=DIM, heads=2, layers=1, max_len=LENGTH, dropout=0, attention_dropout=0, user_dropout=0),
        loss=Loss(candidates="sampled", negatives=NEGATIVES),
        tables=Tables(sharding=sharding),
    )


def measure(rank: int, world_size: int, nodes: int, types: list[str]) -> dict[str, Any]:
    """What one rank sends in a step, by sharding type, and the ids that it looks up of each table."""
    silence_libraries()
    local = world_size // nodes
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    dataset = Dataset(path="", manifest=Manifest(users=USERS, items=ITEMS))
    sequences = walks(SEQUENCES, ITEMS, seed=rank, shortest=LENGTH, longest=LENGTH)
    histories = Histories(
        users=np.random.default_rng(rank).permutation(USERS)[:SEQUENCES],
        items=np.concatenate(sequences),
        offsets=np.arange(SEQUENCES + 1) * LENGTH,
    )
    candidates = Candidates(np.arange(NEGATIVES), np.zeros(NEGATIVES, dtype=np.float32))
    result: dict[str, Any] = {}
    for sharding in types:
        config = configuration(sharding)
        model, optimizer = build(config, config.model, dataset, capacity=CAPACITY, device=torch.device("cpu"))
        batch = make_batch(histories, row_length=LENGTH, capacity=CAPACITY, predict=True, draw=lambda _: candidates)
        result["parameters"] = sum(each.numel() for each in unwrapped(model).dense.parameters())
        result["ids"] = [batch.bags.length_per_key()[0], sum(batch.bags.length_per_key()[1:])]
        counter = Collectives(local)
        for _ in range(2):  # the first one agrees on sizes
            optimizer.zero_grad()
            counter.sent.clear()
            with counter:
                with counter.of("vectors"):
                    loss, _ = model(batch)
                with counter.of("gradients"):
                    loss.backward()
            optimizer.step()
        result[sharding] = dict(counter.sent)
    return result


def estimate(
    placed: list[Placement], bags: dict[str, int], ids: dict[str, int], parameters: int, ranks: Ranks
) -> dict[str, Traffic]:
    """What a rank sends in a step by formula, by part; gradients of copies are summed with the decoder's."""
    world, local = ranks.world_size, ranks.local_world_size
    parts = dict.fromkeys(PARTS, Traffic())
    parts["decoder"] = all_reduced(4 * parameters, ranks)
    for each in placed:
        sent = bytes_sent(each, bags[each.table], world, local, ids=ids[each.table])
        parts["ids"] += sent.ids
        parts["vectors"] += sent.vectors
        parts["decoder" if each.sharding == "data_parallel" else "gradients"] += sent.gradients
    return parts


def compare(world_size: int, nodes: int) -> list[dict[str, Any]]:
    """Counted bytes of a step beside those of the formulas, as means over the ranks, by sharding type and part."""
    types = [kind for kind in TYPES if nodes > 1 or kind not in ("table_row_wise", "grid")]
    of_ranks = run_ranks(measure, world_size, nodes, types, timeout=240)
    ranks = Ranks(world_size, world_size // nodes)
    bags = {"user": CAPACITY.stride, "item": CAPACITY.stride * CAPACITY.item_keys}
    ids = {table: round(sum(each["ids"][n] for each in of_ranks) / world_size) for n, table in enumerate(bags)}
    rows = []
    for kind in types:
        config = configuration(kind)
        model = RecGPT(config.model, config.loss, USERS, ITEMS, item_keys=CAPACITY.item_keys)
        plan = make_plan(
            model,
            config.tables,
            CAPACITY.items,
            world_size=world_size,
            local_world_size=ranks.local_world_size,
            device_type="cpu",
        )
        parts = estimate(placements(plan, model), bags, ids, of_ranks[0]["parameters"], ranks)
        for part in PARTS:
            counted = [sum(each[kind].get((part, between), 0) for each in of_ranks) / world_size for between in (0, 1)]
            row = {"ranks": world_size, "nodes": nodes, "sharding": kind, "part": part}
            rows.append(row | {"counted": asdict(Traffic(*counted)), "formula": asdict(parts[part])})
    return rows


def extrapolate() -> list[dict[str, Any]]:
    """Bytes that a rank sends in a step on 8 to 64 GPUs, eight per node, for two large tables, by sharding type."""
    items, users = int(1.4 * LARGE_TOKENS), LARGE_TOKENS // 20
    capacity = Capacity.of(users, items)
    bags = {"user": capacity.stride, "item": capacity.stride * capacity.item_keys}
    rows = []
    for world in (8, 16, 32, 64):
        for kind in ("row_wise", "table_row_wise", "grid", "column_wise", "auto"):
            config = configuration(kind)
            model = RecGPT(config.model, config.loss, LARGE_USERS, LARGE_ITEMS, item_keys=capacity.item_keys)
            try:
                plan = make_plan(model, config.tables, items, world_size=world, local_world_size=8, device_type="cuda")
            except InputError:
                continue  # a grid on one node, columns for more ranks than they have blocks
            placed = placements(plan, model, "rowwise_adagrad")
            parts = estimate(placed, bags, {"user": users, "item": items}, 0, Ranks(world, 8))
            total = parts["ids"] + parts["vectors"] + parts["gradients"]
            largest = sum(each.bytes_per_rank for each in placed)
            row = {"ranks": world, "sharding": kind, "sent": asdict(total), "bytes_per_rank": largest}
            rows.append({**row, "types": [each.sharding for each in placed]})
    return rows


def main() -> None:
    """Count, compare, extrapolate; print two tables and write both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="file for the figures, as JSON")
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted(MEASURED), choices=MEASURED)
    options = parser.parse_args()
    silence_libraries()
    compared = [row for world in options.ranks for row in compare(world, MEASURED[world])]
    print("Bytes that a rank sends in a step, mean over the ranks: counted and by formula")
    print(f"{'ranks':>5} {'nodes':>5} {'sharding':15} {'part':10} {'within a node':>21} {'between nodes':>21}")
    for row in compared:
        if not any({**row["counted"], **row["formula"]}.values()):
            continue
        cells = [f"{row['counted'][way]:>10,.0f} {row['formula'][way]:>10,.0f}" for way in ("within", "between")]
        print(f"{row['ranks']:5} {row['nodes']:5} {row['sharding']:15} {row['part']:10} {' '.join(cells)}")
    extrapolated = extrapolate()
    print(f"\nBy formula, {LARGE_USERS:,} users and {LARGE_ITEMS:,} items x {DIM}, {LARGE_TOKENS:,} tokens per rank")
    print(f"{'ranks':>5} {'sharding':15} {'MB within':>10} {'MB between':>10} {'GiB on the fullest rank':>23}  types")
    for row in extrapolated:
        sent = row["sent"]
        print(
            f"{row['ranks']:5} {row['sharding']:15} {sent['within'] / 1e6:10,.1f} {sent['between'] / 1e6:10,.1f} "
            f"{row['bytes_per_rank'] / 2**30:23,.1f}  {', '.join(row['types'])}"
        )
    if options.output:
        write_json(options.output, {"counted": compared, "extrapolated": extrapolated})


if __name__ == "__main__":
    main()
