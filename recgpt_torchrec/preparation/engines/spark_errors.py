"""Says in a sentence what Spark says in a page of Java, for what the user can mend."""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recgpt_torchrec.errors import InputError

SETTINGS = "spark-submit, PYSPARK_SUBMIT_ARGS or SPARK_CONF_DIR"
OF_TASK = r"recgpt_torchrec\.errors\.InputError: ([^\n]*)"
"""An error that a task raised: its message is for the user as it is, whichever engine."""
CAUSES = (
    (
        r"PYTHON_VERSION_MISMATCH|Python in worker has different version",
        "its executors run another version of Python than this program; name the right one with PYSPARK_PYTHON",
    ),
    (
        r"No module named '?([\w.]+)|ModuleNotFoundError: ([^\n]*)",
        "a Python package is missing on its executors ({0}); install this package there, and name that Python with "
        "PYSPARK_PYTHON",
    ),
    (
        r"Cannot run program \"([^\"]*)\"|([^\n]*python[^\n]*: No such file)",
        "its executors cannot run Python ({0}); name one that is there with PYSPARK_PYTHON",
    ),
    (
        r"No FileSystem for scheme \"?(\w+)",
        "it knows no file system {0}://; give another --scratch, or Spark the package for it",
    ),
    (r"(Mkdirs failed to create [^\n]*|Permission denied[^\n]*)", "{0}; give another folder with --scratch"),
    (r"No space left on device", "a disk is full; give another folder with --scratch, or a larger spark.local.dir"),
    (
        r"OutOfMemoryError: ([^\n]*)",
        f"memory is short ({{0}}); give more by spark.driver.memory and spark.executor.memory with {SETTINGS}",
    ),
    (
        r"ExecutorLostFailure \([^\n]*\) Reason: ([^\n]*)|Python worker exited unexpectedly",
        "an executor or its Python ended ({0}); if memory is short, give more by spark.executor.memoryOverhead with "
        f"{SETTINGS}, or a smaller --memory_limit",
    ),
    (
        r"(All masters are unresponsive|Could not parse Master URL[^\n]*|Invalid master URL[^\n]*)",
        f"{{0}}; name the master with {SETTINGS}",
    ),
)
"""Patterns of what Spark says, and what to make of it; {0} is the group that matched."""
DRIVER_ENDED = (
    "--engine pyspark: Spark's driver process ended; if memory was short, give it more by spark.driver.memory with "
    f"{SETTINGS}, or less if the machine has no more"
)


def has_ended(error: Exception) -> bool:
    """Whether an error says that the driver's Java process, to which this program speaks through a socket, is gone."""
    if type(error).__name__ == "Py4JNetworkError":
        return True
    if isinstance(error, (ConnectionError, EOFError)):  # of Spark's sockets, not of a store
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        return any({"py4j", "pyspark"} & {*Path(file).parts} for file in files)
    # What py4j makes of an empty answer. An error of Java has its text on the lines below.
    silent = r"An error occurred while calling \S+|.* does not exist in the JVM"
    return type(error).__name__ == "Py4JError" and re.fullmatch(silent, str(error)) is not None


@contextmanager
def explain_spark() -> Iterator[None]:
    """Make an `InputError` of Spark's errors about its surroundings; others are faults of this program, and stay."""
    root = logging.getLogger()
    root.addFilter(_is_no_echo)
    try:
        yield
    except Exception as error:
        if has_ended(error):
            raise InputError(DRIVER_ENDED) from None
        if type(error).__module__.partition(".")[0] not in ("pyspark", "py4j"):
            raise
        text = str(error)
        if found := re.search(OF_TASK, text):
            raise InputError(found[1].strip()) from None
        for pattern, meaning in CAUSES:
            if found := re.search(pattern, text):
                said = next((group for group in found.groups() if group), "Spark does not say why")
                raise InputError(f"--engine pyspark: {meaning.format(said.strip()[:300])}") from None
        raise
    finally:
        root.removeFilter(_is_no_echo)


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Whether a record is none of py4j's, which logs the page of an error that it raises as well."""
    return record.module not in ("java_gateway", "clientserver")
