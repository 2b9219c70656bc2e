"""`SequenceBatch`: the packed histories that one rank trains on in one step, with the ids that its tables look up."""

from dataclasses import dataclass, field, fields
from typing import Any

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from recgpt_torchrec.data.bags import bags_of
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs.attributes import Attributes
from recgpt_torchrec.data.packed import Capacity, PackedBatch, pack_histories
from recgpt_torchrec.data.windows import Cursor


@dataclass(kw_only=True)
class SequenceBatch(PackedBatch, Pipelineable):
    """A packed batch with its lookups; see `PackedBatch` for the rest."""

    bags: KeyedJaggedTensor
    """One bag per distinct user, and one per distinct item of histories, targets, soft targets and candidates."""
    histories: Histories
    """The histories that were packed; they stay on the host."""
    cursor: Cursor = field(default_factory=Cursor)
    """How far the queue is read once this batch is trained; it stays on the host."""

    def _tensors(self) -> dict[str, Any]:
        return {**super()._tensors(), "bags": self.bags}


def make_batch(
    histories: Histories,
    *,
    capacity: Capacity,
    cursor: Cursor | None = None,
    attributes: Attributes | None = None,
    **packing: Any,
) -> SequenceBatch:
    """Pack histories into a batch.

    Args:
        histories: they may be none.
        capacity: number of bags.
        cursor: how far the queue is read after this batch.
        attributes: of the users and items, where the model reads any.
        packing: see `pack_histories`.

    Raises:
        ValueError: a history does not fit a row, or there are more distinct ids than bags.
    """
    packed, ids = pack_histories(histories, capacity=capacity, **packing)
    return SequenceBatch(
        **{f.name: getattr(packed, f.name) for f in fields(packed)},
        bags=bags_of(ids.users, ids.items, capacity, attributes),
        histories=histories,
        cursor=cursor or Cursor(),
    )
