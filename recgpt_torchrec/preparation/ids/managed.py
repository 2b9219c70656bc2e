"""torchrec's managed collision as a table of keys: `MCHManagedCollisionModule`, fed with counts in place of batches.

A training step feeds the module the ids of its batch; `prepare` feeds it each key once, with the number of its new
interactions and the step of the last one, which is what the module makes of a batch itself. So nothing depends on the
order of interactions, and the module needs no buffer for them.

torchrec's zero-collision hashing by probing (`HashZchManagedCollisionModule`) is not used: it takes slots all over the
table, so that unused ones would lie between the ids of items, and it evicts before the table is full.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)

from recgpt_torchrec.data.ragged import Int64

Policy = Literal["lru", "lfu", "distance_lfu"]
EMPTY = torch.iinfo(torch.int64).max
"""The module's raw id of an unused slot; hashes are smaller."""
SEEN, LAST_SEEN = "_mch_counts", "_mch_last_access_iter"
"""The module's buffers of what its policy knows of each key."""


class ManagedTable:
    """Which hash has which slot, for a table of fixed size.

    Slots are numbered in the order in which they are first taken: 0 to `used` - 1 are taken, and stay so. Slots first
    taken between two calls of `number_new` are numbered in the order of the hashes, so that their order tells nothing
    of counts or times.

    Example:
        table = ManagedTable(1000, "lru")
        table.count(hashes, counts, steps, now=3)
        table.number_new()
        table.find(hashes)  # slots, -1 where a hash has none
    """

    def __init__(self, rows: int, policy: Policy) -> None:
        # Exponents are whole numbers, so that ages are not rounded to float32.
        policies: dict[Policy, MCHEvictionPolicy] = {
            "lru": LRU_EvictionPolicy(decay_exponent=1),
            "lfu": LFU_EvictionPolicy(),
            "distance_lfu": DistanceLFU_EvictionPolicy(decay_exponent=1),
        }
        self.rows, self.used = rows, 0
        # The module's last slot is that of all ids without one: it is one more than the table has.
        self._module = MCHManagedCollisionModule(rows + 1, torch.device("cpu"), policies[policy], eviction_interval=1)

    def restore(self, hashes: Int64, seen: Int64, last_seen: Int64) -> None:
        """Fill an empty table.

        Args:
            hashes: [used] int64, distinct: of the key of each slot, from 0 on.
            seen, last_seen: [used] int64 number of interactions, and step of the last one.
        """
        used, state = len(hashes), dict(self._module.named_buffers())
        order = np.argsort(hashes, kind="stable")
        state["_mch_sorted_raw_ids"][:used] = torch.from_numpy(hashes[order])
        # The module takes unused slots from the end of its table, so that is where slot 0 is.
        state["_mch_remapped_ids_mapping"][:used] = torch.from_numpy(self.rows - 1 - order)
        state["_mch_remapped_ids_mapping"][used:-1] = torch.arange(self.rows - used)
        for name, values in ((SEEN, seen), (LAST_SEEN, last_seen)):
            if name in state:
                state[name][:used] = torch.from_numpy(values[order])
        self.used = used

    def count(self, hashes: Int64, counts: Int64, steps: Int64, now: int) -> None:
        """Count interactions of some keys; keys without a slot may take one that is free, or another key's.

        Args:
            hashes: [n] int64, distinct, from 0 on and below `EMPTY`.
            counts: [n] int64, at least 1.
            steps: [n] int64 step of the last interaction, from 1 to `now`.
            now: the newest step.
        """
        if not len(hashes):
            return
        order = np.argsort(hashes)
        values, numbers, last = (torch.from_numpy(array[order]) for array in (hashes, counts, steps))
        self._module._current_iter = now
        self._module._update_and_evict(values, numbers, {"last_access_iter": last})

    def number_new(self) -> None:
        """Number the slots that were first taken since the last call, in the order of the hashes."""
        hashes, slots = self._buffers()
        before, self.used = self.used, int((hashes != EMPTY).sum())
        (new,) = torch.nonzero((hashes != EMPTY) & (slots < self.rows - before), as_tuple=True)
        slots[new] = self.rows - 1 - torch.arange(before, self.used)

    def find(self, hashes: Int64) -> Int64:
        """[n] int64 slots of `hashes` [n] int64; -1 where there is none."""
        known, slots = self._buffers()
        place = torch.searchsorted(known[:-1], torch.from_numpy(hashes))
        found = self.rows - 1 - slots[place]
        return torch.where(known[place] == torch.from_numpy(hashes), found, -1).numpy()

    def state(self) -> tuple[Int64, Int64, Int64]:
        """hashes, seen and last_seen, [used] int64 each, by slot; 0 where the policy does not know one."""
        known, slots = self._buffers()
        places = torch.empty(self.used, dtype=torch.int64)
        places[self.rows - 1 - slots[: self.used]] = torch.arange(self.used)
        buffers = dict(self._module.named_buffers())
        nothing = torch.zeros(self.rows + 1, dtype=torch.int64)
        seen, last_seen = (buffers.get(name, nothing)[places].numpy() for name in (SEEN, LAST_SEEN))
        return known[places].numpy(), seen, last_seen

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """The module's sorted hashes, and the slot of each as the module counts: from the end."""
        return self._module._mch_sorted_raw_ids, self._module._mch_remapped_ids_mapping
