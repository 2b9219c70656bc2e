"""Several interests of a user (paper, section 4.4): the model answers, is given its own answer, and answers again.

The first interest is the output at the newest entry of a history. Its best item is appended as a generated entry, the
output there is the second interest, and so on. Each interest recalls items; `retrieval.merging` makes one list of them.
"""

import numpy as np
import torch
from torch import Tensor, nn

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.ragged import Int64, Ragged, offsets_of
from recgpt_torchrec.data.segments import GENERATED
from recgpt_torchrec.data.stream import BatchMaker
from recgpt_torchrec.retrieval.merging import Lists


def append_generated(histories: Histories, items: Int64, max_len: int) -> Histories:
    """Each history with one generated entry `items` [sequences] at its end, the newest `max_len` entries kept."""
    start, stop = histories.offsets[:-1], histories.offsets[1:]
    start = np.maximum(start, stop - (max_len - 1))
    offsets = offsets_of(stop - start + 1)
    ends = offsets[1:] - 1
    segments = histories.segments if histories.segments is not None else np.zeros(histories.items.size, dtype=np.int8)

    def with_last(values: np.ndarray, last: Int64 | int) -> np.ndarray:
        out = np.empty(offsets[-1], dtype=values.dtype)
        old = np.ones(out.size, dtype=bool)
        old[ends] = False
        out[old] = Ragged(values, histories.offsets).cut(start, stop).values
        out[ends] = last
        return out

    return Histories(
        users=histories.users,
        items=with_last(histories.items, items),
        offsets=offsets,
        segments=with_last(segments, GENERATED),
        seen=histories.seen,
    )


@torch.no_grad()
def predict_interests(
    model: nn.Module, maker: BatchMaker, histories: Histories, first: Tensor, catalogue: Catalogue, count: int
) -> Tensor:
    """`count` interest vectors of each history by autoregressive steps (collective: every rank, also with no history).

    Args:
        model: in evaluation mode.
        maker: makes the batches of the histories that grow.
        histories: with `seen`: no item of them is appended.
        first: [sequences, dim] the first interest.
        catalogue: what interests are scored against.
        count: interests of each history.

    Returns:
        [sequences, count, dim] float32.
    """
    vectors = [first]
    answered = torch.zeros(len(first), 0, dtype=torch.int64, device=first.device)
    for _ in range(count - 1):
        # Where no new item is left, item 0 is appended: the next interest has to follow something.
        best = catalogue.top_k(vectors[-1], 1, histories.seen, answered).items.clamp(min=0)
        answered = torch.cat([answered, best], dim=1)
        histories = append_generated(histories, best[:, 0].cpu().numpy(), maker.max_len)
        _, (_, outputs) = model(maker.make(histories).to(first.device))
        vectors.append(outputs.float())
    return torch.stack(vectors, dim=1)


def recall_items(vectors: Tensor, catalogue: Catalogue, n: int, seen: Ragged | None) -> Lists:
    """The `n` best items of every interest, by exact search.

    Args:
        vectors: [users, interests, dim] float32.
        catalogue: what they are scored against.
        n: length of each list.
        seen: items of each user that do not compete; None: all compete.
    """
    found = [catalogue.top_k(vectors[:, i], n, seen) for i in range(vectors.shape[1])]
    return Lists(torch.stack([best.items for best in found], 1), torch.stack([best.scores for best in found], 1))
