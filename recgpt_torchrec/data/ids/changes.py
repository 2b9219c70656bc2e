"""Which items of a folder of days lost their slots after a day: a history entry of before means nothing now."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import filesystem, raise_storage_failure
from recgpt_torchrec.storage.parts import Part, open_part

KEPT = 256
"""Number of row groups that are held, each of about 512 KiB."""


@dataclass
class SlotChanges:
    """The column `since` of a day's items, read by row group.

    Example: `changes.find_lost(np.array([3, 17]), day=2)`
    """

    folder: str
    """Folder that the paths of the parts are relative to."""
    parts: list[Part]
    """Of the items of the last day."""
    versions: list[int]
    """[days + 1] version of the vocabulary of each day, from day 1 on."""
    reassigned: int
    """The newest version in which a slot was given to another key."""
    _starts: Int64 | None = field(default=None, repr=False, compare=False)
    """[groups] first id of each row group."""
    _places: list[tuple[Part, int]] = field(default_factory=list, repr=False, compare=False)
    """Part and number in it of each row group."""
    _groups: dict[int, Int64] = field(default_factory=dict, repr=False, compare=False)

    def find_lost(self, items: Int64, day: int) -> npt.NDArray[np.bool_]:
        """[items] whether each slot was given to another key after a day, given ids in any order.

        Raises:
            InputError: a part cannot be read.
        """
        version, lost = self.versions[day], np.zeros(items.size, dtype=bool)
        if version >= self.reassigned or not items.size:
            return lost
        starts = self._find_starts()
        of_group = np.searchsorted(starts, items, side="right") - 1
        for group in np.unique(of_group).tolist():
            mine = np.flatnonzero(of_group == group)
            lost[mine] = self._read(group)[items[mine] - starts[group]] > version
        return lost

    def _find_starts(self) -> Int64:
        if self._starts is None:
            fs, root = filesystem(self.folder)
            sizes = []
            for part in self.parts:
                try:
                    with open_part(fs, root, part) as file:
                        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                except (OSError, pa.ArrowException) as error:
                    raise self._damaged(part.path, error) from None
                sizes += rows
                self._places += [(part, group) for group in range(len(rows))]
            self._starts = np.cumsum([0, *sizes[:-1]])
        return self._starts

    def _read(self, group: int) -> Int64:
        if group not in self._groups:
            fs, root = filesystem(self.folder)
            part, within = self._places[group]
            try:
                with open_part(fs, root, part) as file:
                    column = file.read_row_group(within, columns=["since"], use_threads=False)["since"]
            except (OSError, KeyError, pa.ArrowException) as error:
                raise self._damaged(part.path, error) from None
            while len(self._groups) >= KEPT:
                del self._groups[next(iter(self._groups))]
            self._groups[group] = column.to_numpy()
        return self._groups[group]

    def _damaged(self, path: str, error: Exception) -> InputError:
        raise_storage_failure(error, f"{self.folder}/{path}")
        reason = " ".join(str(error).split())
        return InputError(f"{self.folder}: {path} cannot be read ({reason}); restore the file")
