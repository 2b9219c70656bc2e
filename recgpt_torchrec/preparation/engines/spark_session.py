"""Connects to Apache Spark, or starts it on this machine."""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis

from recgpt_torchrec.errors import InputError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

JAVA = 17
"""Oldest major version of Java that this Spark runs on."""
INSTALL_JAVA = (
    f"install Java {JAVA} or newer (`make spark`, or `apt-get install openjdk-17-jre-headless`), or name one that is "
    "there with JAVA_HOME"
)
NAME_MASTER = "and name a master: spark-submit --master, or PYSPARK_SUBMIT_ARGS"
OPTIONS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.ansi.enabled": "true",  # overflows and bad casts are errors, as in DuckDB
    "spark.sql.variable.substitute": "false",  # a click value or a key may hold ${...}
}
"""Options of the session, which Spark lets a program change at any time."""
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files of Linux with the bytes that the container may use, by the version of its control groups."""
LOCAL_OPTIONS = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
"""Options where Spark runs on this machine alone, unless the user's own settings say otherwise."""


def open_session(scratch: str) -> tuple["SparkSession", bool]:
    """A session of Spark with `OPTIONS`, and whether Spark was started for it, so is to be stopped.

    Spark's own settings hold: spark-submit, SPARK_CONF_DIR, PYSPARK_SUBMIT_ARGS. Without a master there, it runs on all
    cores of this machine. Where the program runs Spark already, in whichever thread, the session shares its executors.

    Args:
        scratch: local folder for what Spark spills, if it runs on this machine.

    Raises:
        InputError: pyspark or a Java virtual machine is missing, Spark does not start, or it is Spark Connect.
    """
    # pandas is no part of what is asked of Spark here.
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas", category=FutureWarning)
    try:
        from pyspark import SparkContext
        from pyspark.sql import SparkSession

        _ = ibis.pyspark  # Ibis makes the options of this SQL when its backend is first named
    except ImportError as error:
        raise InputError(
            f"--engine pyspark: pyspark is not installed ({error}); run `make spark`, or "
            "pip install 'recgpt-torchrec[spark]'"
        ) from None
    _check_classic()
    is_owner = SparkContext._active_spark_context is None  # getActiveSession knows those of this thread alone
    session = _start(scratch) if is_owner else SparkSession.builder.getOrCreate().newSession()
    try:
        for name, value in OPTIONS.items():
            session.conf.set(name, value)
    except BaseException:
        if is_owner:
            session.stop()
        raise
    return session, is_owner


def _check_classic() -> None:
    """Raise an `InputError` where pyspark is told to be a client of Spark Connect, which has no tasks of Python's."""
    given = _given_settings()
    for name in ("SPARK_REMOTE", "SPARK_CONNECT_MODE_ENABLED", "SPARK_API_MODE"):
        if os.environ.get(name, "classic").lower() != "classic":
            raise InputError(f"--engine pyspark does not run over Spark Connect; unset {name}, {NAME_MASTER}")
    if found := re.search(r"--remote\b|spark\.remote(?=[ =:\t])|spark\.api\.mode[ =:\t]+connect", given):
        raise InputError(f"--engine pyspark does not run over Spark Connect; take {found[0]!r} away, {NAME_MASTER}")


def _start(scratch: str) -> "SparkSession":
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    if SparkContext._gateway is None and "PYSPARK_GATEWAY_PORT" not in os.environ:
        check_java()
        # What Java and Spark say before a level can be set goes to a file, which is shown if Spark does not start.
        with tempfile.TemporaryFile() as said:
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
            try:
                gateway = launch_gateway(_local_settings(scratch), popen_kwargs={"stderr": said})
            except PySparkRuntimeError:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                raise InputError(
                    f"--engine pyspark: Spark does not start: {_find_reason(lines)}; check its settings "
                    "(PYSPARK_SUBMIT_ARGS, SPARK_CONF_DIR)"
                ) from None
            SparkContext._ensure_initialized(gateway=gateway)
    SparkContext._ensure_initialized()  # only now are the settings of spark-submit known
    settings = SparkConf()
    if not settings.contains("spark.master"):
        settings.setMaster("local[*]")
    if not settings.contains("spark.app.name"):
        settings.setAppName("recgpt prepare")
    session = SparkSession.builder.config(conf=settings).getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def _local_settings(scratch: str) -> Any:
    """Settings of a Spark on this machine that the user's own settings do not make; none for a cluster."""
    from pyspark import SparkConf

    settings = SparkConf(loadDefaults=False)
    given = _given_settings()
    master = re.search(r"(?:--master[ =]|spark\.master[ =:\t]+)['\"]?(\S+)", given)
    if master is not None and not master[1].startswith("local"):
        return settings
    defaults = {**LOCAL_OPTIONS, "spark.driver.memory": f"{_total_memory() // 3 >> 20}m"}
    if "spark.local.dir" not in given:
        # Spark empties it when it ends, but not if it is killed.
        folder = defaults["spark.local.dir"] = tempfile.mkdtemp(prefix=".spark-", dir=scratch)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, value in defaults.items():
        if name not in given and not (name == "spark.driver.memory" and "--driver-memory" in given):
            settings.set(name, value)
    return settings


def _total_memory() -> int:
    """Bytes of memory of this machine, or of the container if it is limited to fewer."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CONTAINER_LIMITS:
        if path.is_file() and (limit := path.read_text().strip()).isdigit():  # else it is `max`
            sizes.append(int(limit))
    return min(sizes)


def _given_settings() -> str:
    """The text of the user's settings, as far as it is known before Spark reads them."""
    from pyspark.find_spark_home import _find_spark_home

    folder = os.environ.get("SPARK_CONF_DIR") or os.path.join(_find_spark_home(), "conf")
    path = Path(folder, "spark-defaults.conf")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return "\n".join([os.environ.get("PYSPARK_SUBMIT_ARGS", ""), *(line for line in lines if line[:1] != "#")])


def check_java() -> None:
    """Raise an `InputError` unless there is a Java virtual machine that is new enough."""
    home = os.environ.get("JAVA_HOME")
    path = os.path.join(home, "bin", "java") if home else shutil.which("java")
    where = f"JAVA_HOME={home} holds no bin/java" if home else "there is no java on PATH"
    if path is None or not os.access(path, os.X_OK):
        raise InputError(f"--engine pyspark needs Java, and {where}; {INSTALL_JAVA}")
    said = subprocess.run([path, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?([0-9]+)', said)
    if version is None or int(version[1]) < JAVA:
        found = f"is Java {version[1]}" if version else f"does not say its version: {said.strip()[:200]!r}"
        raise InputError(f"--engine pyspark needs Java {JAVA}, and {path} {found}; {INSTALL_JAVA}")


def _find_reason(lines: list[str]) -> str:
    """The line that tells most of why Spark did not start."""
    errors = [line for line in lines if re.search(r"(Exception|Error|error)\b", line)]
    return (errors or lines or ["it gives no reason"])[0].strip()[:300]
