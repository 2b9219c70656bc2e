"""Shows how far Spark's jobs are: tasks done of all, per step."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from recgpt_torchrec.preparation.engines.spark_errors import has_ended
from recgpt_torchrec.progress import progress_bar

if TYPE_CHECKING:
    from pyspark import SparkContext

PROPERTIES = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
"""What `setJobGroup` sets for the jobs of this thread."""
EVERY = 0.3
"""Seconds between looks at Spark's counters."""


@contextmanager
def shown(context: "SparkContext", name: str, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Show the tasks of the jobs that the `with` starts; cancel them as soon as `stop` says so.

    Tasks of a job's later stages are counted when they begin, so the total may grow.
    """
    group, ended = uuid.uuid4().hex, threading.Event()
    outer = {name: context.getLocalProperty(name) for name in PROPERTIES}
    context.setJobGroup(group, name, interruptOnCancel=True)
    watcher = threading.Thread(target=_watch, args=(context, group, name, stop, ended), daemon=True)
    watcher.start()
    with ExitStack() as ending:
        ending.callback(_reset, context, outer, stop)
        ending.callback(watcher.join)
        ending.callback(ended.set)
        yield


def _reset(context: "SparkContext", properties: dict[str, str], stop: Callable[[], bool]) -> None:
    """Leave the thread's properties and the log's level as they were, if Spark still runs."""
    try:
        if stop():
            context.setLogLevel("ERROR")
        for name, value in properties.items():
            context.setLocalProperty(name, value)  # None takes it away
    except Exception as error:
        if not has_ended(error):  # else the error of the `with` says so
            raise


def _watch(context: "SparkContext", group: str, name: str, stop: Callable[[], bool], ended: threading.Event) -> None:
    try:
        _update_bar(context, group, name, stop, ended)
    except Exception as error:
        if not has_ended(error):  # else the thread that waits for the jobs says so
            raise


def _update_bar(
    context: "SparkContext", group: str, name: str, stop: Callable[[], bool], ended: threading.Event
) -> None:
    tracker = context.statusTracker()
    stages: dict[int, tuple[int, int]] = {}
    with progress_bar(1, "tasks", desc=f"{name}: ", leave=False) as bar:
        while not ended.wait(EVERY):
            for job in tracker.getJobIdsForGroup(group):
                info = tracker.getJobInfo(job)
                for stage in info.stageIds if info else []:
                    if counts := tracker.getStageInfo(stage):
                        stages[stage] = counts.numTasks, counts.numCompletedTasks
            bar.total = sum(total for total, _ in stages.values()) or 1
            bar.update(sum(done for _, done in stages.values()) - bar.n)
            if stop():
                context.setLogLevel("OFF")  # Spark would write a page of Java about each task that is cancelled
                context.cancelJobGroup(group)
                return
