"""Whether a pod finds what its stage reads, and may write where it writes."""

import posixpath
from collections.abc import Iterator

from recgpt_torchrec.config.launch.manifest import SCRATCH, Manifest
from recgpt_torchrec.errors import InputError

READ = {"data", "checkpoint", "export", "input", "initial", "items", "users", "vocabulary", "previous", "since"}
READ |= {"deltas", "allow", "deny", "runs", "evaluations", "validation_input", "test_input", "compare", "pretrained"}
"""Options of stages that name files and folders which are read."""
WRITTEN = {"output", "scratch"}
"""Options that name files and folders which are written."""


def check_places(config: Manifest, values: dict[str, object]) -> tuple[str, ...]:
    """Check where a stage reads and writes; returns what must be on the volumes before it starts.

    Args:
        config: of the job.
        values: options of the stage.

    Raises:
        InputError: it cannot work.
    """
    data = values.get("data")
    if config.copy_data and (not isinstance(data, str) or not is_in(data, SCRATCH) or data.rstrip("/") == SCRATCH):
        raise InputError(f"--copy_data is copied to the stage's --data, which is {data}; give it a folder in {SCRATCH}")
    required = set()
    for name, path in paths(values):
        in_scratch = is_in(path, SCRATCH)
        if in_scratch and config.scratch is not None and name in ("data", "scratch"):
            if name == "data" and not config.copy_data:
                raise InputError(f"--data is {path}, which is empty at first; give --copy_data what is copied there")
            continue
        found = [(claim, only_read) for claim, place, only_read in config.mounts if is_in(path, place)]
        if not found:
            raise InputError(
                f"--{name} is {path}, which no volume of the pods holds; mount a claim with --volumes CLAIM:/FOLDER "
                "and give a path in it, or a URI as s3://..."
            )
        if name in WRITTEN and found[-1][1]:
            raise InputError(f"--{name} is {path}, but claim {found[-1][0]} is mounted to be read; leave its :ro out")
        if name in READ and not in_scratch:
            required.add(path)
    return tuple(sorted(required))


def paths(values: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the option's name and the path of each file or folder of the pod that a stage names; URIs are left out."""
    for name, value in values.items():
        for path in value if isinstance(value, list) else [value]:
            if name in READ | WRITTEN and isinstance(path, str) and path != "null" and "://" not in path:
                # A pattern is there if its folder is.
                yield name, path.partition("*")[0].rpartition("/")[0] if "*" in path else path


def is_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return f"{posixpath.normpath(path)}/".startswith(f"{folder.rstrip('/')}/")
