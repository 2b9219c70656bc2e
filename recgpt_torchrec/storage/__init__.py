"""Files and folders, local or on an object store.

`files` reads and writes files, `folders` commits folders, `parts` writes Parquet, `manifests` checks them against their
manifest, `finished` compares an output with what is asked for, `typed` checks the types of what JSON files hold,
`failing` tells storage that fails from a file that is damaged.
"""

from recgpt_torchrec.storage.failing import find_storage_failure, is_full, raise_storage_failure
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
    other_scratch,
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
    "find_storage_failure",
    "fsspec_filesystem",
    "is_folder",
    "is_full",
    "make_folder",
    "names",
    "other_scratch",
    "raise_storage_failure",
    "read",
    "read_json",
    "remote",
    "remove",
    "scratch_beside",
    "write",
    "write_json",
]
