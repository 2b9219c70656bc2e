"""Files and folders, local or on an object store: `files` reads and writes, `folder` commits, `parts` holds Parquet."""

from recgpt_torchrec.storage.files import (
    Streams,
    append,
    exists,
    filesystem,
    fsspec_filesystem,
    is_folder,
    make_folder,
    names,
    read,
    read_json,
    remote,
    remove,
    write,
    write_json,
)

__all__ = [
    "Streams",
    "append",
    "exists",
    "filesystem",
    "fsspec_filesystem",
    "is_folder",
    "make_folder",
    "names",
    "read",
    "read_json",
    "remote",
    "remove",
    "write",
    "write_json",
]
