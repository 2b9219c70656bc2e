"""The newest day of every user: which of a user's rows in a folder of days counts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.data.ids.changes import SlotChanges
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import filesystem, raise_storage_failure
from recgpt_torchrec.storage.parts import Part, open_part, write_parts

ROWS = 65_536
"""Users per row group."""
GROUPS_PER_PART = 1024
KEPT = 32
"""Number of row groups that are held, each of at most 1 MiB."""
SCHEMA = pa.schema([("day", pa.int32()), ("row", pa.int64())])


@dataclass
class Newest:
    """The newest day of every user, and their row in it: Parquet with one row per user id, read by row group.

    Example: `day, row = newest.find(np.array([3, 17]))`
    """

    folder: str
    """Folder that the paths of the parts are relative to."""
    parts: list[Part]
    changes: SlotChanges | None = None
    """Which items lost their slots after a day; None: all keep their ids."""
    _groups: dict[int, tuple[npt.NDArray[np.int32], Int64]] = field(default_factory=dict, repr=False, compare=False)

    def find(self, users: Int64) -> tuple[npt.NDArray[np.int32], Int64]:
        """[users] int32 newest day (0: none), and [users] int64 row of that day, given user ids in any order."""
        days, rows = np.zeros(users.size, dtype=np.int32), np.zeros(users.size, dtype=np.int64)
        of_group = users // ROWS
        for group in np.unique(of_group).tolist():
            mine = np.flatnonzero(of_group == group)
            day, row = self.read(group)
            place = users[mine] - group * ROWS
            mine, place = mine[place < day.size], place[place < day.size]
            days[mine], rows[mine] = day[place], row[place]
        return days, rows

    def read(self, group: int) -> tuple[npt.NDArray[np.int32], Int64]:
        """Days and rows of the users of a row group; none beyond the last one.

        Raises:
            InputError: the file cannot be read.
        """
        if group not in self._groups:
            number, within = divmod(group, GROUPS_PER_PART)
            if number >= len(self.parts) or within * ROWS >= self.parts[number].rows:
                return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
            fs, root = filesystem(self.folder)
            part = self.parts[number]
            try:
                with open_part(fs, root, part) as file:
                    table = file.read_row_group(within, columns=SCHEMA.names, use_threads=False).cast(SCHEMA)
            except (OSError, KeyError, pa.ArrowException) as error:
                raise_storage_failure(error, f"{self.folder}/{part.path}")
                reason = " ".join(str(error).split())
                raise InputError(f"{self.folder}: {part.path} cannot be read ({reason}); restore the file") from None
            while len(self._groups) >= KEPT:
                del self._groups[next(iter(self._groups))]
            self._groups[group] = table["day"].to_numpy(), table["row"].to_numpy()
        return self._groups[group]


def write_newest(
    fs: pyarrow.fs.FileSystem,
    root: str,
    before: Newest | None,
    users: int,
    day: int,
    active: Iterable[Int64],
    reassigned: Int64,
) -> list[Part]:
    """Write the newest day of every user to `root`/newest, one row group in memory at a time.

    Args:
        fs: file system of `root`.
        root: folder of the day.
        before: of the day before; None: this is the first one.
        users: number of users.
        day: number of the day.
        active: ids of the day's users, ascending, in pieces; the n-th of all is row n of the day.
        reassigned: [n] ids, ascending, that other users had before the day, so that no earlier row is theirs.
    """

    def groups() -> Iterator[pa.Table]:
        pieces, pending, done = iter(active), np.zeros(0, dtype=np.int64), 0
        for first in range(0, users, ROWS):
            last = min(first + ROWS, users)
            days, rows = np.zeros(last - first, dtype=np.int32), np.zeros(last - first, dtype=np.int64)
            if before is not None:
                earlier, places = before.read(first // ROWS)
                days[: earlier.size], rows[: places.size] = earlier, places
                others = reassigned[slice(*np.searchsorted(reassigned, [first, last]).tolist())] - first
                days[others], rows[others] = 0, 0
            while not pending.size or pending[-1] < last:
                piece = next(pieces, None)
                if piece is None:
                    break
                pending = np.concatenate([pending, piece])
            count = int(np.searchsorted(pending, last))
            own = pending[:count] - first
            days[own], rows[own] = day, done + np.arange(count)
            pending, done = pending[count:], done + count
            yield pa.table([days, rows], schema=SCHEMA)

    return write_parts(fs, root, "newest", groups(), GROUPS_PER_PART)
