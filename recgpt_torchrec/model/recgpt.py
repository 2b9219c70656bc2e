"""RecGPT: user and item tables around the dense part, from a `SequenceBatch` to a loss and interest vectors."""

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from recgpt_torchrec.config import Loss, Model, Tuning
from recgpt_torchrec.data.bags import ITEM, USER
from recgpt_torchrec.data.batch import SequenceBatch
from recgpt_torchrec.model.dense import Dense


def table(name: str, feature: str, rows: int, dim: int) -> EmbeddingBagCollection:
    """One table of `rows` x `dim` float32, not materialised until it is sharded; one bag is one entity."""
    config = EmbeddingBagConfig(name=name, embedding_dim=dim, num_embeddings=rows, feature_names=[feature])
    return EmbeddingBagCollection(tables=[config], device=torch.device("meta"))


class RecGPT(nn.Module):
    """The whole model, from a batch of distinct ids to a loss (paper, section 4.2).

    `forward` itself calls the sharded tables, with jagged tensors straight from the batch, so that the train pipeline
    can start their all-to-all one step ahead.
    """

    def __init__(self, model: Model, loss: Loss, users: int, items: int, tuning: Tuning | None = None) -> None:
        super().__init__()
        self.tuning = tuning
        self.user_table = table("user", USER, users, model.dim)
        self.item_table = table("item", ITEM, items, model.dim)
        if tuning is not None and tuning.output_table:
            self.output_table = table("output", ITEM, items, model.dim)
        self.dense = Dense(model, loss, segments=tuning is not None and tuning.prompts)

    def forward(self, batch: SequenceBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `Dense.forward`."""
        users, items = self.user_table(batch.users), self.item_table(batch.items)
        if self.tuning is not None and self.tuning.output_table:
            outputs = self.output_table(batch.items)
            return self.dense(users.values(), items.values(), outputs.values(), batch)
        vectors = items.values()
        return self.dense(users.values(), vectors, vectors, batch)

    @property
    def scoring_table(self) -> nn.Module:
        """The table that scores outputs: W_l of the paper (section 4.3) where there is one, else the item table."""
        return self.output_table if self.tuning is not None and self.tuning.output_table else self.item_table


def unwrapped(model: nn.Module) -> RecGPT:
    """The RecGPT inside DistributedModelParallel and DDP; its tables are sharded, and calling them is collective."""
    while not isinstance(model, RecGPT):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def unwrapped_dense(model: RecGPT) -> Dense:
    """The dense part of a model, without DDP around it."""
    dense = getattr(model.dense, "module", model.dense)
    assert isinstance(dense, Dense)
    return dense
