"""The users whose lists are asked for (`--users`), found among those of an export by their keys, batch by batch."""

from contextlib import ExitStack

import numpy as np
import pyarrow as pa

from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import DuckDBEngine
from recgpt_torchrec.preparation.key_files import KeyFile
from recgpt_torchrec.retrieval.filters import FilterRecord
from recgpt_torchrec.retrieval.key_inputs import explain_shortage, open_engine, user_file


class ChosenUsers:
    """The keys that `--users` names, on every rank: in a table of DuckDB, which spills, and a byte for each.

    Example: `with ChosenUsers(config) as chosen: batch = chosen.select(batch)`
    """

    def __init__(self, config: Retrieve) -> None:
        """Read the keys (collective).

        Raises:
            InputError: on every rank, where the file cannot be read or holds no key for one.
        """
        self.file: KeyFile = user_file(config)
        self.config, self._resources = config, ExitStack()
        failure = None
        try:
            with ExitStack() as resources:
                self.engine: DuckDBEngine = resources.enter_context(open_engine(config))
                keys = self.file.load(self.engine, "listed_users").keys
                # The same places on every rank, so that they can tell each other which keys they found.
                self.engine.connection.execute(
                    "CREATE TABLE chosen_users AS SELECT key, row_number() OVER (ORDER BY key) - 1 AS place "
                    "FROM listed_users; DROP TABLE listed_users"
                )
                self.is_found = np.zeros(keys, dtype=bool)
                self._resources = resources.pop_all()  # the engine stays open
        except Exception as error:
            failure = error
        try:
            raise_first_error(failure)
        except Exception:
            self._resources.close()
            raise

    def __enter__(self) -> "ChosenUsers":
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def keys(self) -> int:
        """Number of distinct keys."""
        return len(self.is_found)

    def select(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of a batch with a column `key` whose key is among those chosen, in their order."""
        run, rows = self.engine.connection.execute, pa.array(np.arange(batch.num_rows))
        with explain_shortage(self.config):
            self.engine.connection.register("incoming", pa.table({"key": batch["key"], "row": rows}))
            found = run("SELECT row, place FROM incoming JOIN chosen_users USING (key) ORDER BY row").fetchnumpy()
            self.engine.connection.unregister("incoming")
        self.is_found[np.asarray(found["place"], dtype=np.int64)] = True
        return batch.take(pa.array(found["row"], pa.int64()))

    def complete(self, record: FilterRecord, config: Retrieve) -> None:
        """Record how many keys were found, after the last batch of every rank (collective).

        Args:
            record: to be completed.
            config: of the stage, for the message.

        Raises:
            InputError: none was, on every rank.
        """
        bits = gather_objects(np.packbits(self.is_found).tobytes())
        found = np.bitwise_or.reduce([np.frombuffer(each, np.uint8) for each in bits])
        is_found = np.unpackbits(found, count=self.keys).view(bool)
        record.keys, record.fits = self.keys, int(is_found.sum())
        record.unknown = self.keys - record.fits
        if record.unknown:
            place = int(np.argmin(is_found))
            ((record.example,),) = self.engine.connection.execute(
                f"SELECT key FROM chosen_users WHERE place = {place}"
            ).fetchall()
        if not record.fits:
            source = config.export if config.fallback == "none" else config.data
            raise InputError(
                f"{self.file}: none of its {self.keys:,} keys, such as {record.example!r}, is a user of {source}. Give "
                "keys as the log has them, in a table in the column that --user_column names"
            )
