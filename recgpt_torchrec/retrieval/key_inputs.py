"""The files of keys that the options of `retrieve` name: of items (allow, deny, items), and of users."""

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.distributed.processes import run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.duckdb_engine import SCRATCH_ERRORS, DuckDBEngine
from recgpt_torchrec.preparation.key_files import KeyFile
from recgpt_torchrec.retrieval.filters import FilterRecord
from recgpt_torchrec.storage import other_scratch, scratch_beside

MEMORY = "4GB"
"""Memory that a join of keys takes before it spills to disk."""


def item_files(config: Retrieve) -> dict[str, KeyFile]:
    """The lists and tables of keys that the options name, by option: allow, deny, items."""
    named = {"allow": config.allow, "deny": config.deny, "items": config.items}
    return {
        name: KeyFile(
            option=f"--{name}",
            path=path,
            column=config.item_column,
            output=config.output,
            where=config.where if name == "items" else None,
        )
        for name, path in named.items()
        if path is not None
    }


def user_file(config: Retrieve) -> KeyFile:
    """The list or table of the users whose lists are asked for."""
    assert config.users is not None
    return KeyFile(option="--users", path=config.users, column=config.user_column, output=config.output, kind="user")


def start_records(config: Retrieve) -> dict[str, FilterRecord]:
    """The records of the filters and of the choice of users, with the checksums of what they name (collective).

    Raises:
        InputError: a file is missing or cannot be read.
    """
    files = item_files(config) | ({} if config.users is None else {"users": user_file(config)})
    return run_on_first_rank(
        lambda: {name: FilterRecord(path=file.path, checksum=file.checksum()) for name, file in files.items()}
    )


@contextmanager
def open_engine(config: Retrieve) -> Iterator[DuckDBEngine]:
    """An engine with a scratch folder beside the output, or in the machine's temporary folder if that is remote.

    Raises:
        InputError: it lacks memory or scratch space.
    """
    scratch, remedy = scratch_beside(config.output), other_scratch(config.output)
    with explain_shortage(config), DuckDBEngine(scratch, MEMORY, remedy=remedy) as engine:
        yield engine


@contextmanager
def explain_shortage(config: Retrieve) -> Iterator[None]:
    """Make an `InputError` of an engine's errors about memory and scratch space."""
    try:
        yield
    except (duckdb.OutOfMemoryException, *SCRATCH_ERRORS) as error:
        message = str(error).split("\n")[0]
        raise InputError(
            f"keys cannot be joined in a scratch folder in {scratch_beside(config.output)}: {message}; free space "
            f"there, or {other_scratch(config.output)}"
        ) from None
