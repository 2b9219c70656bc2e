"""Files and folders, local or on an object store.

`files` reads and writes files, `folders` commits folders, `parts` writes Parquet, `manifests` checks them against their
manifest, `finished` compares an output with what is asked for, `typed` checks the types of what JSON files hold.
"""

from recgpt_torchrec.storage.files import (
    Streams,
    append,
    damaged,
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
    scratch_beside,
    write,
    write_json,
)

__all__ = [
    "Streams",
    "append",
    "damaged",
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
    "scratch_beside",
    "write",
    "write_json",
]
