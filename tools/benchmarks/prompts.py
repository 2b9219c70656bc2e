"""Generating prompts with a cache of keys and values, against a plain way: a full forward for each generated item.

Both run on the same users, with the same batching and the same search of the catalogue.
"""

import copy
from collections.abc import Callable

import pyarrow as pa
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Prompts
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.tabled.base import unwrapped, unwrapped_dense
from recgpt_torchrec.prompts.decoding import Decoding
from recgpt_torchrec.prompts.intervals import Intervals, intervals_of
from recgpt_torchrec.prompts.prompt_dataset import UserVectors, read_rows
from recgpt_torchrec.prompts.prompting import Prompter
from tools.benchmarks.measuring import Figures, Kind, Ratio, stopwatch
from tools.benchmarks.settings import Settings

K = 2
"""Prompts per interval."""
BATCH_USERS = 512


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
        self,
        items: Tensor,
        user_vectors: Tensor,
        positions: Tensor,
        segments: Tensor,
        active: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """See `Decoding.step`."""
        assert active is None and features is None, "the benchmark fills every interval with k prompts, of ids alone"
        self.fed.append((items, positions, segments))
        self.steps += 1
        if self.steps % (self.k + 1) == 0:  # after the last prompt of an interval nothing is generated
            return items
        x, at, kinds = (torch.stack(column, dim=1) for column in zip(*self.fed, strict=True))
        attention = DenseAttention(torch.zeros_like(at))
        return self.decoder(x, user_vectors[:, None].expand_as(x), at, kinds, attention)[:, -1]


class RecomputingPrompter(Prompter):
    """Algorithm 1 without a cache."""

    def decoding(self, users: int, capacity: int) -> Decoding:
        """An empty state."""
        return Recomputing(self, users)


def prompts(settings: Settings) -> Kind:
    """Histories per second of prompt generation with the cache, over a full forward per generated item.

    The model has initial values: how long a prompt takes does not depend on which item it is.
    """
    training = settings.training(steps=settings.pick(40, 2))
    dataset, max_len = training.dataset, training.config.model.max_len
    model, device = unwrapped(training.model), training.trainer.device
    wanted = settings.pick(200, 16)
    parts: list[pa.Table] = []
    for group in row_groups(dataset):
        parts.append(read_rows(dataset, group))
        if sum(part.num_rows for part in parts) >= wanted:
            break
    histories = intervals_of(pa.concat_tables(parts).slice(0, wanted), K, max_len, ())
    filled: dict[str, Intervals] = {}

    def way(name: str, prompter: type[Prompter]) -> Callable[[], Figures]:
        def turn() -> Figures:
            training.trainer.pipeline.detach()
            model.eval()
            catalogue = Catalogue.of_model(model, dataset.manifest.items, device)
            users = UserVectors(model, catalogue.rounds, device).of(histories.users)
            filled[name] = copy.deepcopy(histories)
            with stopwatch() as figures:
                prompter(unwrapped_dense(model), catalogue, Prompts(k=K), max_len, BATCH_USERS).fill(
                    filled[name], users
                )
            model.train()
            made = int((filled[name].prompts >= 0).sum())
            rates = {"histories_s": histories.users.size / figures["seconds"], "prompts_s": made / figures["seconds"]}
            return {**rates, **figures}

        return turn

    ways = {"with the cache": way("cache", Prompter), "full forwards": way("full", RecomputingPrompter)}
    return Kind(
        ways, {"cache over full forwards": Ratio(("with the cache", "histories_s"), ("full forwards", "histories_s"))}
    )
