"""Validation between epochs: the model as it stands, ranked against the whole catalogue."""

import torch
from torch import nn

from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.evaluation.ranking import encode, gather_table, measure
from recgpt_torchrec.model.recgpt import unwrapped


class Validation:
    """Callable that measures a model on the validation split (collective).

    Example: `trainer.fit(Validation(model, stream, device), metric="NDCG@10")`
    """

    def __init__(self, model: nn.Module, stream: SequenceStream, device: torch.device) -> None:
        self.model, self.stream, self.device = model, stream, device

    def __call__(self) -> dict[str, float]:
        """Masked HR and NDCG at 5 and 10 over all users with a validation item."""
        items = self.stream.maker.dataset.manifest.items
        self.model.eval()
        catalogue = gather_table(unwrapped(self.model).scoring_table, items, self.device)
        batches = encode(self.model, self.stream, self.device)
        _, results = measure(batches, lambda _, vectors: vectors @ catalogue.t(), items, (5, 10))
        return results["masked"]
