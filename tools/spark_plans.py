"""Reads what Spark did in a run: the physical plans of its statements, and how many rows came to the driver.

Both come from Spark itself: plans from its event log, rows from its own methods that bring any. So nothing that a
program does can be missed, whichever part of it does it.
"""

import json
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BOUNDED_KEYS = {"bucket"}
"""Columns of which a table has few values, whatever the number of rows (`queries.number_rows`)."""
MAX_LIMIT = 4096
"""Rows of each task that a LIMIT may bring to one place (`preparation.moments`)."""
MAX_ROWS = 2**16 + 1
"""Rows that a statement may bring to the driver: as many as `preparation.moments` counts ranges of time."""
UNARY = ("AQEShuffleRead", "ShuffleQueryStage", "Project", "Sort", "Exchange", "WholeStageCodegen", "InputAdapter")
"""Names of nodes that pass rows on as they are."""
COLLECTING = ("collect", "toLocalIterator", "toPandas", "toArrow", "take", "head", "first")
"""Methods of a DataFrame that bring rows to the driver."""


@dataclass
class Collected:
    """One call that brought rows to the driver, or from it."""

    caller: str
    """File and function of the project that made it."""
    statement: str
    """The SQL or the plan that was run, shortened."""
    rows: int = 0


@dataclass
class Watch:
    """What `watch` has seen."""

    collected: list[Collected] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    """The physical plan of each statement, as Spark ran it: trees of `nodeName`, `simpleString` and `children`."""

    def too_large(self) -> list[Collected]:
        """The calls that brought more rows than `MAX_ROWS`."""
        return [call for call in self.collected if call.rows > MAX_ROWS]


def settings(folder: Path) -> dict[str, str]:
    """Spark's settings for a run that is watched; they take effect where Spark is started.

    With automatic broadcasts off, a broadcast that is left in a plan is one that Spark cannot do without.
    """
    return {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": folder.resolve().as_uri(),
        "spark.eventLog.rolling.enabled": "false",
        "spark.eventLog.compress": "false",
        "spark.sql.autoBroadcastJoinThreshold": "-1",
        "spark.sql.adaptive.autoBroadcastJoinThreshold": "-1",
    }


def as_arguments(values: dict[str, str]) -> str:
    """Settings as PYSPARK_SUBMIT_ARGS, for the Spark that a process starts next."""
    return " ".join([*(f"--conf {name}={value}" for name, value in values.items()), "pyspark-shell"])


@contextmanager
def watch(folder: Path) -> Iterator[Watch]:
    """Watch what Spark does while the `with` runs.

    Args:
        folder: of the event log, see `settings`.
    """
    from pyspark import RDD
    from pyspark.sql import SparkSession
    from pyspark.sql.classic.dataframe import DataFrame

    seen = Watch()
    before = {file: file.stat().st_size for file in _event_logs(folder)}
    originals = {(kind, name): getattr(kind, name) for kind, name in [(RDD, "collect"), *_methods(DataFrame)]}
    create = SparkSession.createDataFrame
    originals[SparkSession, "createDataFrame"] = create

    def counting_create(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        rows = data.num_rows if hasattr(data, "num_rows") else len(data)
        if rows:
            seen.collected.append(Collected(_find_caller(traceback.extract_stack()), "createDataFrame", rows))
        return create(self, data, *args, **kwargs)

    try:
        for (kind, name), original in originals.items():
            setattr(kind, name, counting_create if kind is SparkSession else _counting(original, seen))
        yield seen
    finally:
        for (kind, name), original in originals.items():
            setattr(kind, name, original)
    plans: dict[tuple[Path, int], dict[str, Any]] = {}
    for file in _event_logs(folder):
        with file.open() as stream:
            stream.seek(before.get(file, before.get(Path(f"{file}.inprogress"), 0)))
            for line in stream:
                event = json.loads(line)
                if "sparkPlanInfo" in event:  # at the start of a statement, and whenever Spark changes its plan
                    plans[file, event["executionId"]] = event["sparkPlanInfo"]
    seen.plans = list(plans.values())


def find_faults(plan: dict[str, Any]) -> list[str]:
    """What in a plan puts rows in one place whose number grows with the log."""
    faults = []
    name, text = plan["nodeName"], plan["simpleString"]
    children = plan["children"]
    # REPARTITION_BY_NUM: as many partitions as a folder has parts, here one; a part has a bounded number of ids.
    gathers = name == "Exchange" and "SinglePartition" in text and "REPARTITION_BY_NUM" not in text
    if gathers and not _is_bounded(children[0]):
        faults.append(f"all rows in one task: {_outline(plan)}")
    if name == "BroadcastExchange" and not _is_bounded(children[0]):
        faults.append(f"all rows on every executor: {_outline(plan)}")
    if name in ("TakeOrderedAndProject", "CollectLimit", "GlobalLimit", "LocalLimit"):
        limit = re.search(r"(?:limit=| )(\d+)", text)
        if limit is None or int(limit[1]) > MAX_LIMIT:
            faults.append(f"a limit that is none: {text[:200]}")
    if name in ("CartesianProduct", "BroadcastNestedLoopJoin"):
        faults.append(f"every row with every row: {_outline(plan)}")
    for child in children:
        faults += find_faults(child)
    return faults


def _is_bounded(plan: dict[str, Any]) -> bool:
    """Whether a plan's rows are few per task: sums over all rows, or by one of `BOUNDED_KEYS`."""
    name = plan["nodeName"]
    if name.endswith("Aggregate"):
        keys = re.search(r"keys=\[([^\]]*)\]", plan["simpleString"])
        return keys is not None and {re.sub(r"#\d+L?", "", key.strip()) for key in keys[1].split(",")} <= {
            "",
            *BOUNDED_KEYS,
        }
    passes = name.startswith(UNARY) or name == "Window"
    return passes and len(plan["children"]) == 1 and _is_bounded(plan["children"][0])


def _outline(plan: dict[str, Any], depth: int = 6) -> str:
    """The first nodes of a plan on one line."""
    first = plan["children"][0] if plan["children"] else None
    rest = f" <- {_outline(first, depth - 1)}" if first and depth else ""
    return plan["simpleString"][:120] + rest


def _methods(kind: type) -> list[tuple[type, str]]:
    return [(kind, name) for name in COLLECTING if hasattr(kind, name)]


def _counting(original: Callable[..., Any], seen: Watch) -> Callable[..., Any]:
    """The method, which records its calls and their rows; a method that calls another of them counts once."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        stack = traceback.extract_stack()
        result = original(self, *args, **kwargs)
        frames = [frame for frame in stack if "recgpt_torchrec" in frame.filename]
        if not frames or any("_counting" in frame.name or frame.name == "method" for frame in stack[:-1]):
            return result
        call = Collected(_find_caller(stack), str(self).replace("\n", " ")[:150])
        seen.collected.append(call)
        if hasattr(result, "__len__"):
            call.rows = len(result)
            return result
        return _count_rows(result, call)

    return method


def _find_caller(stack: Sequence[traceback.FrameSummary]) -> str:
    """File and function of the project, outside its engines, that made a call."""
    frames = [frame for frame in stack if "recgpt_torchrec" in frame.filename]
    caller = next((frame for frame in reversed(frames) if "/engines/" not in frame.filename), (frames or stack)[-1])
    return f"{Path(caller.filename).name}:{caller.name}"


def _count_rows(rows: Iterator[Any], call: Collected) -> Iterator[Any]:
    for row in rows:
        call.rows += 1
        yield row


def _event_logs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
