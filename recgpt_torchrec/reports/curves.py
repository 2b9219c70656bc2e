"""The curves of a run by step, from TensorBoard's event files, with a bounded number of points."""

import os

from recgpt_torchrec import storage
from recgpt_torchrec.reports.values import Points

POINTS = 400
"""Maximum number of points of a curve in a report."""
READ = 20_000
"""Maximum number of points of a curve that are held while it is read; of longer ones a random sample is kept."""
CURVES = ("loss", "lr_share", "data_wait", "targets_per_s", "share_of_peak", "memory_mib")


def read_curves(run: str) -> dict[str, Points] | None:
    """Curves of a run by name of what `RunLog.log_step` records; None: the event files are damaged.

    Points that a resumed run repeated are read once, as TensorBoard does. On an object store curves are left out, as
    the events are read from local files alone.
    """
    folder = os.path.join(run, "tensorboard")
    if storage.remote(run) or not os.path.isdir(folder):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    try:
        events = EventAccumulator(folder, size_guidance={"scalars": READ})
        events.Reload()
        known = set(events.Tags()["scalars"])
        curves = {}
        for name in CURVES:
            if (tag := f"train/{name}") in known:
                curves[name] = thin([(float(each.step), float(each.value)) for each in events.Scalars(tag)])
        return curves
    except Exception:  # a damaged event file has errors of many kinds, and only costs these curves
        return None


def thin(points: Points, most: int = POINTS) -> Points:
    """At most `most` points: each the mean of neighbours, in order; the last is kept as it is."""
    points = [point for point in sorted(points) if all(abs(value) < float("inf") for value in point)]
    if len(points) <= most:
        return points
    bounds = [len(points) * number // (most - 1) for number in range(most)]
    means = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = points[start:stop]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [*means, points[-1]]
