"""Benchmarks prompt generation with the key/value cache against a full forward pass for each generated item.

Both run on the same users, with the same batching and the same search of the catalogue. Also says whether the prompts
are identical.

Example:
    python -m tools.benchmark_prompts --data runs/beauty/data --checkpoint runs/beauty/pretrain --users 2000
    python -m tools.benchmark_prompts --items 12000 --layers 2          # a random model, no files needed
"""

import argparse
import copy
import time

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.config import Loss, Model, Prompts, Tables
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.distributed.processes import process_group
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.model.recgpt import unwrapped, unwrapped_dense
from recgpt_torchrec.prompts.decoding import Decoding
from recgpt_torchrec.prompts.prompt_dataset import LOOKUP, UserVectors, read_rows
from recgpt_torchrec.prompts.prompting import Intervals, Prompter, intervals_of
from recgpt_torchrec.training.loading import load


class Recomputing(Decoding):
    """Stores entries instead of keys and values, and decodes all of them again for each output that is scored."""

    def __init__(self, prompter: "RecomputingPrompter", users: int) -> None:
        super().__init__(prompter.dense.decoder, users, capacity=1)
        self.k, self.steps = prompter.prompts.k, 0
        self.fed: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(self, users: int) -> None:
        """See `Decoding.keep`."""
        super().keep(users)
        self.fed = [(items[:users], at[:users], segments[:users]) for items, at, segments in self.fed]

    @torch.no_grad()
    def step(
        self, items: Tensor, user_vectors: Tensor, positions: Tensor, segments: Tensor, active: Tensor | None = None
    ) -> Tensor:
        """See `Decoding.step`."""
        assert active is None, "the benchmark fills every interval with k prompts"
        self.fed.append((items, positions, segments))
        self.steps += 1
        if self.steps % (self.k + 1) == 0:  # after the last prompt of an interval nothing is generated
            return items
        x, at, kinds = (torch.stack(column, dim=1) for column in zip(*self.fed, strict=True))
        return self.decoder(x, user_vectors[:, None].expand_as(x), at, kinds, torch.zeros_like(at))[:, -1]


class RecomputingPrompter(Prompter):
    """Algorithm 1 without a cache."""

    def decoding(self, users: int, capacity: int) -> Decoding:
        """An empty state."""
        return Recomputing(self, users)


def make_synthetic(
    options: argparse.Namespace, device: torch.device
) -> tuple[Dense, Catalogue, Intervals, Tensor, int]:
    """Make a random model, and histories with lengths like Beauty's (5 and more, 9 on average)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    lengths = np.minimum(5 + rng.geometric(0.22, options.users), 50)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    items = pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, options.items, int(lengths.sum()))))
    table = pa.table({"user_id": pa.array(np.arange(options.users)), "item_ids": items})
    dense = Dense(Model(layers=options.layers), Loss()).eval().to(device)
    vectors, users = torch.randn(options.items, 64, device=device), torch.randn(options.users, 64, device=device)
    histories = intervals_of(table, options.k, dense.model.max_len, ())
    return dense, Catalogue(vectors), histories, users, dense.model.max_len


def load_real(options: argparse.Namespace, device: torch.device) -> tuple[Dense, Catalogue, Intervals, Tensor, int]:
    """Load a checkpoint, and the first users of a dataset."""
    dataset = Dataset.open(options.data)
    trained = load(find_checkpoint(options.checkpoint), dataset, Tables(), batch_size=LOOKUP, device=device)
    model = unwrapped(trained.model.eval())
    table, groups = pa.table({}), []
    for group in row_groups(dataset):
        groups.append(read_rows(dataset, group))
        if sum(part.num_rows for part in groups) >= options.users:
            break
    table = pa.concat_tables(groups).slice(0, options.users)
    histories = intervals_of(table, options.k, trained.config.max_len, ())
    users = UserVectors(model.user_table, [[histories.users.size]], device).of(histories.users)
    catalogue = Catalogue.gather(model.item_table, dataset.manifest.items, device)
    dense = unwrapped_dense(model)
    return dense, catalogue, histories, users, trained.config.max_len


def main() -> None:
    """Measure both ways in turn, and print users/s, prompts/s and the ratio of times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="dataset; without it a random model and histories")
    parser.add_argument("--checkpoint", help="run or checkpoint folder of the dataset")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=12000, help="items of the random model")
    parser.add_argument("--layers", type=int, default=1, help="decoder blocks of the random model")
    parser.add_argument("--k", type=int, default=2, help="prompts per interval")
    parser.add_argument("--batch_users", type=int, default=512)
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds, which measure each way in turn; the fastest counts"
    )
    options = parser.parse_args()
    if bool(options.data) != bool(options.checkpoint):
        parser.error("--data and --checkpoint go together")
    with process_group() as device:
        dense, catalogue, histories, users, max_len = (load_real if options.data else make_synthetic)(options, device)
        ways = {"cache": Prompter, "recomputing": RecomputingPrompter}
        best: dict[str, float] = {}
        filled = {}
        for _ in range(options.rounds):
            for name, way in ways.items():
                filled[name] = copy.deepcopy(histories)
                since = time.perf_counter()
                way(dense, catalogue, Prompts(k=options.k), max_len, options.batch_users).fill(filled[name], users)
                best[name] = min(best.get(name, np.inf), time.perf_counter() - since)
        prompts = int((filled["cache"].prompts >= 0).sum())
        differ = int((filled["cache"].prompts != filled["recomputing"].prompts).sum())
        blocks, threads = len(dense.decoder.blocks), torch.get_num_threads()
        print(
            f"{users.shape[0]:,} users, {histories.items.size:,} items, {prompts:,} prompts (k = {options.k}), "
            f"{len(catalogue):,} items to choose from, {blocks} blocks, {threads} threads, {device}"
        )
        for name, seconds in best.items():
            print(f"{name:<12} {users.shape[0] / seconds:>10,.0f} users/s {prompts / seconds:>12,.0f} prompts/s")
        print(f"ratio        {best['recomputing'] / best['cache']:>10.2f}")
        print(f"prompts that differ: {differ} of {prompts:,}")


if __name__ == "__main__":
    main()
