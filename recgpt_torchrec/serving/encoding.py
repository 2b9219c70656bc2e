"""Encodes histories of requests with a whole model in this process, in batches as large as the requests are."""

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.checkpoints.trained import Trained
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.packed import Capacity, pack_histories
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.model.tabled.base import TabledModel, unwrapped, unwrapped_dense
from recgpt_torchrec.serving.keys import UNKNOWN


class RequestEncoder:
    """From histories to interest vectors, with the model of `checkpoints.trained.load_unsharded`.

    Example: `RequestEncoder(trained, device).encode(histories)`
    """

    def __init__(self, trained: Trained, device: torch.device) -> None:
        self.model, self.device = unwrapped(trained.model), device
        self.dense, self.max_len = unwrapped_dense(self.model), trained.config.max_len

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        """[sequences, dim] float32 outputs at the newest entry of each history; none of them may be empty."""
        lengths = histories.lengths
        packed, ids = pack_histories(
            histories,
            row_length=int(lengths.max(initial=1)),
            capacity=Capacity(users=lengths.size, items=histories.items.size),
            predict=False,
            max_position=self.max_len - 1,
            inputs=self.model.inputs,
        )
        packed = packed.to(self.device)
        users, items = look_up_strangers(self.model, ids.users, ids.items, self.device)
        vectors: Tensor = self.dense.decode(
            users,
            items,
            packed.item_bag,
            packed.user_bag,
            packed.position,
            packed.segment,
            packed.sequence,
            packed.target_slot,
            packed.last_slot,
            packed.cu_seqlens,
            packed.max_seqlen,
            packed.features,
        )[1]
        return vectors.float()


def look_up_strangers(model: TabledModel, users: Int64, items: Int64, device: torch.device) -> tuple[Tensor, Tensor]:
    """Vectors of users [n, dim] and of items [m, dim], float32, with their attributes.

    A stranger (-1) has the vector 0, as a user in training whose vector was dropped.
    """
    is_known = users != UNKNOWN
    found = model.look_up(device, users=users[is_known], items=items)
    if is_known.all():
        return found.users, found.items
    vectors = found.items.new_zeros(users.size, found.items.shape[1])
    vectors[torch.from_numpy(np.flatnonzero(is_known)).to(device)] = found.users
    return vectors, found.items
