"""Prompts drawn among the best items: item j with the probability softmax(score / temperature)_j.

Drawn by the Gumbel-max trick: the item with the largest score / temperature + g_j, where g_j = -log(-log(u_j)) and u_j
is uniform between 0 and 1 (Gumbel 1954; Maddison, Tarlow and Minka 2014). Each u_j is a hash of the seed, the user, the
place in the history, the number of the prompt and the item, so a prompt is the same on any number of ranks, in batches
of any size, and in a request that names the user and holds the whole history.
"""

import numpy as np
import torch
from torch import Tensor

from recgpt_torchrec.config import Prompts
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.reading.hashing import hash_numbers


def draw_items(items: Tensor, scores: Tensor, prompts: Prompts, users: Int64, places: Int64, slot: int) -> Tensor:
    """[rows] int64 the item drawn in each row; -1 where the row has none.

    Args:
        items: [rows, candidates] int64 the best items of each row; -1: none.
        scores: [rows, candidates] float32 their scores.
        prompts: temperature, above 0, and seed.
        users: [rows] int64 user ids.
        places: [rows] int64 place, in the user's whole history, of the interaction before the prompt.
        slot: number of the prompt in its interval, from 0.
    """
    of_place = hash_numbers(places, hash_numbers(users, prompts.seed))
    of_prompt = hash_numbers(np.asarray(slot), of_place)
    hashes = hash_numbers(items.cpu().numpy(), of_prompt[:, None])
    uniform = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # neither 0 nor 1
    noise = torch.from_numpy(-np.log(-np.log(uniform))).to(scores.device)
    drawn = (scores.double() / prompts.temperature + noise).masked_fill(items < 0, -torch.inf).argmax(1, keepdim=True)
    return items.gather(1, drawn)[:, 0]
