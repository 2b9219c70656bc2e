"""Validation between epochs: ranks held-out items among the whole catalogue."""

from collections.abc import Callable

import torch
from torch import nn

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Batch, Model
from recgpt_torchrec.data.stream import SequenceStream, encoding_stream
from recgpt_torchrec.evaluation.held_out import check_has_targets
from recgpt_torchrec.evaluation.ranking import measure_ranks
from recgpt_torchrec.model.recgpt import unwrapped
from recgpt_torchrec.retrieval.encoding import encode

METRIC = "NDCG@10"
"""The metric that decides which checkpoint is best and when training stops early."""


def validation_of(
    training: SequenceStream, model: Model, batch: Batch, device: torch.device
) -> Callable[[nn.Module], "Validation"] | None:
    """A function from a model to its `Validation`, on the histories of a training stream.

    None: the dataset has no validation part, so a fixed number of epochs is trained.

    Raises:
        InputError: it should have one, but no user has a validation item.
    """
    reader = training.maker.reader
    if not reader.dataset.manifest.has_validation:
        return None
    check_has_targets(
        reader.dataset,
        "validation",
        "To train on everything for a fixed number of epochs, prepare the log with --hold_out none",
    )
    stream = encoding_stream(
        reader.dataset,
        "validation",
        model,
        batch,
        prompts=reader.prompts,
        set_aside=reader.set_aside,
        item_keys=training.maker.capacity.item_keys,
    )
    return lambda model: Validation(model, stream, device)


class Validation:
    """Callable that measures a model on the validation split (collective).

    Example: `trainer.fit(Validation(model, stream, device), METRIC)`
    """

    def __init__(self, model: nn.Module, stream: SequenceStream, device: torch.device) -> None:
        self.model, self.stream, self.device = model, stream, device

    def __call__(self) -> dict[str, float]:
        """Masked HR and NDCG at 5 and 10 over all users with a validation item."""
        self.model.eval()
        items = self.stream.dataset.manifest.items
        catalogue = Catalogue.of_model(unwrapped(self.model), items, self.device)
        _, results = measure_ranks(encode(self.model, self.stream, self.device), catalogue, (5, 10))
        return results["masked"]
