"""Several interests per user (paper, section 4.4): autoregressive steps of the model on its own answers.

The first interest is the output at the newest entry of a history. Its best new item is appended as a generated entry;
the output at that entry is the second interest, and so on. `retrieval.merging` merges the lists they recall.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.features import UNKNOWN
from recgpt_torchrec.data.ragged import Int64, Ragged, join, offsets_of
from recgpt_torchrec.data.segments import GENERATED
from recgpt_torchrec.retrieval.merging import Lists
from recgpt_torchrec.retrieval.weighed import Weighed

if TYPE_CHECKING:  # they need torchrec, and the lists of vectors that are there need none
    from recgpt_torchrec.data.stream import BatchMaker
    from recgpt_torchrec.retrieval.encoding import Encoded


def append_generated(histories: Histories, items: Int64, max_len: int) -> Histories:
    """Append one generated entry, `items` [sequences] int64, to each history, and keep its newest `max_len` entries.

    It has the time of the entry before it, as in Algorithm 1, and the event type of the request.
    """
    start, stop = histories.offsets[:-1], histories.offsets[1:]
    start = np.maximum(start, stop - (max_len - 1))
    offsets = offsets_of(stop - start + 1)
    ends = offsets[1:] - 1
    segments = histories.segments if histories.segments is not None else np.zeros(histories.items.size, dtype=np.int8)

    def with_last(values: np.ndarray, last: np.ndarray | int | None) -> np.ndarray:
        assert last is not None, "a history without the time or the event type of its request"
        out = np.empty(offsets[-1], dtype=values.dtype)
        is_old = np.ones(out.size, dtype=bool)
        is_old[ends] = False
        out[is_old] = Ragged(values, histories.offsets).cut(start, stop).values
        out[ends] = last
        return out

    return Histories(
        users=histories.users,
        items=with_last(histories.items, items),
        offsets=offsets,
        segments=with_last(segments, GENERATED),
        times=None if histories.times is None else with_last(histories.times, newest_times(histories)),
        events=None if histories.events is None else with_last(histories.events, histories.asked_events),
        places=None if histories.places is None else with_last(histories.places, UNKNOWN),
        request_times=histories.request_times,
        asked_events=histories.asked_events,
        seen=histories.seen,
    )


def newest_times(histories: Histories) -> Int64:
    """[sequences] int64 time of each history's newest entry; that of the request, where there is none."""
    assert histories.times is not None
    newest = np.append(histories.times, 0)[histories.offsets[1:] - 1]
    requests = np.zeros_like(newest) if histories.request_times is None else histories.request_times
    return np.where(histories.lengths > 0, newest, requests)


@torch.no_grad()
def predict_interests(
    model: nn.Module, maker: "BatchMaker", batches: "list[Encoded]", catalogue: Catalogue, count: int
) -> Tensor:
    """Compute `count` interest vectors per history (collective: every rank takes part, even without histories).

    Args:
        model: to encode the growing histories, in evaluation mode meanwhile.
        maker: packs the growing histories of a batch into the next one.
        batches, catalogue, count: see `extend_interests`.

    Returns:
        [sequences of all batches, count, dim] float32.
    """
    was_training = model.training
    model.eval()

    def encode(histories: Histories) -> Tensor:
        vectors: Tensor = model(maker.make(histories).to(catalogue.device))[1][1]
        return vectors.float()

    vectors = extend_interests(encode, maker.max_len, batches, catalogue, count)
    model.train(was_training)
    return vectors


def extend_interests(
    encode: Callable[[Histories], Tensor], max_len: int, batches: "list[Encoded]", catalogue: Catalogue, count: int
) -> Tensor:
    """Compute `count` interest vectors per history, by whatever encodes histories (collective).

    Args:
        encode: returns the first interest of each of some histories, [sequences, dim] float32.
        max_len: maximum number of entries of a history.
        batches: equally many on every rank. Histories with `seen`, whose items are never appended, and the first
            interest of each, [sequences, dim] float32. All of them are scored together.
        catalogue: all items, to find the best one of an interest.
        count: number of interests per history.

    Returns:
        [sequences of all batches, count, dim] float32.
    """
    growing = [histories for histories, _ in batches]
    vectors = [torch.cat([first for _, first in batches])]
    seen = join([histories.seen for histories in growing if histories.seen is not None])
    appended = torch.zeros(len(vectors[0]), 0, dtype=torch.int64, device=vectors[0].device)
    for _ in range(count - 1):
        # Where no new item is left, item 0 is appended, so that there is a next interest.
        best = catalogue.top_k(vectors[-1], 1, seen, appended).items.clamp(min=0)
        appended = torch.cat([appended, best], dim=1)
        items = np.split(best[:, 0].cpu().numpy(), np.cumsum([len(first) for _, first in batches])[:-1])
        outputs = []
        for number, of_batch in enumerate(items):
            growing[number] = append_generated(growing[number], of_batch, max_len)
            outputs.append(encode(growing[number]))
        vectors.append(torch.cat(outputs))
    return torch.stack(vectors, dim=1)


def recall_items(
    vectors: Tensor, catalogue: Catalogue, n: int, left_out: Ragged | None, weighed: Weighed | None = None
) -> Lists:
    """The `n` best items of every interest, by exact search (collective).

    Args:
        vectors: [users, interests, dim] float32.
        catalogue: all items, with the scores.
        n: length of each list.
        left_out: items that do not compete, by user, repeats allowed; None: none.
        weighed: items that compete with another score; None: none.
    """
    users, interests, dim = vectors.shape
    # All interests at once: where item vectors are looked up anew, a call is a pass over all of them.
    owners = np.repeat(np.arange(users), interests)
    left_out = None if left_out is None else left_out.take(owners)
    # A bias of 0, as of a model that was never validated, would be added to every pair for nothing.
    items, bias = (None, 0.0) if weighed is None or weighed.is_zero else weighed.take(owners)
    best = catalogue.top_k(vectors.reshape(users * interests, dim), n, left_out, weighed=items, bias=bias)
    return Lists(best.items.view(users, interests, n), best.scores.view(users, interests, n))
