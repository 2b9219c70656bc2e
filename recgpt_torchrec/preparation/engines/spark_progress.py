"""Shows how far Spark's jobs are: tasks done of all, per step."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recgpt_torchrec.progress import progress_bar

if TYPE_CHECKING:
    from pyspark import SparkContext

EVERY = 0.3
"""Seconds between looks at Spark's counters."""


@contextmanager
def shown(context: "SparkContext", name: str, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Show the tasks of the jobs that the `with` starts; cancel them as soon as `stop` says so.

    Tasks of a job's later stages are counted when they begin, so the total may grow.
    """
    group, ended = uuid.uuid4().hex, threading.Event()
    outer = context.getLocalProperty("spark.jobGroup.id")
    context.setJobGroup(group, name, interruptOnCancel=True)
    watcher = threading.Thread(target=_watch, args=(context, group, name, stop, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        if stop():
            context.setLogLevel("ERROR")
        context.setLocalProperty("spark.jobGroup.id", outer)  # None takes it away


def _watch(context: "SparkContext", group: str, name: str, stop: Callable[[], bool], ended: threading.Event) -> None:
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
