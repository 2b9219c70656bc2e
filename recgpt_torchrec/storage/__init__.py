"""Files and folders, local or on an object store.

`files` reads and writes, `folders` commits, `parts` holds Parquet, `manifests` says what is in a folder, `finished`
whether that is what was asked for.
"""

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
