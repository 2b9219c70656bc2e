"""The file of results by user beside an evaluation's JSON: its name, its record in the JSON, and reading it.

One row a user that was ranked, in order of user ids:

    user_id            int64 dense user id
    item_id            int64 the held-out item
    history_length     int64 items of the history before it
    train_count        int64 training interactions of the held-out item
    item_age           int64 time from the item's first interaction in the log to the held-out one, in the unit of the
                       dataset's timestamps; only where the dataset has times
    PATH_masked, PATH_unmasked   float32 rank of the held-out item by each recall path and baseline, from 0; ties share
                       ranks, so that halves occur; inf: not among the items of the list. See `catalogue.ranks`
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from recgpt_torchrec import storage
from recgpt_torchrec.data.ragged import to_numpy
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.parts import checksum_of, open_parquet
from recgpt_torchrec.storage.typed import check_counts, make_typed

ENDING = ".users.parquet"
ROWS = 2**16
"""Rows that are read at once."""
FACTS_OF_USERS = ("item_id", "history_length", "train_count", "item_age")
Columns = dict[str, npt.NDArray[Any]]


@dataclass(kw_only=True)
class PerUser:
    """What an evaluation's JSON says of its results by user, under `per_user`."""

    file: str
    """Name of the file, in the folder of the JSON."""
    rows: int
    bytes: int
    checksum: str
    """crc32 of the file's bytes as eight hex digits."""
    paths: list[str] = field(default_factory=list)
    """Recall paths and baselines with ranks."""
    age_unit: float | None = None
    """Seconds of a unit of `item_age`; None: not known, or there is no such column."""
    has_age: bool = False


def file_beside(output: str) -> str:
    """Path of the results by user of the evaluation `output`.

    Example: `file_beside("runs/test.json")` is `"runs/test.users.parquet"`
    """
    return output.removesuffix(".json") + ENDING


def column_of(path: str, protocol: str) -> str:
    """The column with a recall path's ranks."""
    return f"{path}_{protocol}"


class UserResults:
    """An evaluation's results by user, checked against what its JSON says.

    Example: `UserResults.of("test.json", evaluation).read(["pretrain_masked"])`
    """

    def __init__(self, path: str, record: PerUser) -> None:
        self.path, self.record = path, record

    @classmethod
    def of(cls, output: str, evaluation: dict[str, Any]) -> "UserResults | None":
        """Those of the evaluation that was read from `output`; None: it was made without.

        Raises:
            InputError: the file is missing, or is not the one that the evaluation names.
        """
        values = evaluation.get("per_user")
        if values is None:
            return None
        try:
            record = make_typed(PerUser, values, "per_user.")
            check_counts({"per_user.rows": record.rows, "per_user.bytes": record.bytes})
            if "/" in record.file or not record.file.endswith(ENDING):
                raise ValueError(f"per_user.file is {record.file!r:.60}, which is not a file beside it")
        except ValueError as error:
            raise storage.damaged(output, error) from None
        path = os.path.join(os.path.dirname(output), record.file)
        if not storage.exists(path):
            raise InputError(f"{output} names its results by user, {path}, which does not exist; evaluate again")
        if (checksum := checksum_of(*storage.filesystem(path))) != record.checksum:
            raise InputError(
                f"{path} is not the file that {output} names: its checksum is {checksum}, not {record.checksum}. "
                "Evaluate again"
            )
        return cls(path, record)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of facts."""
        return [name for name in FACTS_OF_USERS if name != "item_age" or self.record.has_age]

    def read(self, columns: Sequence[str]) -> Iterator[Columns]:
        """Yield `user_id` and the columns, [rows] each, in order of user ids; at most `ROWS` rows at once.

        Raises:
            InputError: the file cannot be read.
        """
        fs, root = storage.filesystem(self.path)
        try:
            with open_parquet(fs, root) as file:
                names = ["user_id", *columns]
                if missing := sorted({*names} - {*file.schema_arrow.names}):
                    raise InputError(f"{self.path} has no column {', '.join(missing)}; evaluate again")
                for batch in file.iter_batches(ROWS, columns=names, use_threads=False):
                    if batch.num_rows:
                        yield {name: _to_numpy(batch[name]) for name in names}
        except (OSError, pa.ArrowException) as error:
            storage.raise_storage_failure(error, self.path)
            raise InputError(f"{self.path} cannot be read ({' '.join(str(error).split())}); evaluate again") from None


def _to_numpy(column: pa.Array) -> npt.NDArray[Any]:
    """A column without nulls as an array.

    Raises:
        ArrowInvalid: a value is null.
    """
    if column.null_count:
        raise pa.ArrowInvalid("a value is null")
    return to_numpy(column)
