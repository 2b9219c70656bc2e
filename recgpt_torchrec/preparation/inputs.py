"""Lists the files that `--input` names, and opens them.

Knows their names, sizes and endings, and nothing of their contents.
"""

import glob
import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import fsspec_filesystem

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".inter": "recbole",
    ".txt": "sequences",
}


@dataclass(kw_only=True)
class InputFile:
    """One raw file."""

    path: str
    format: str
    bytes: int
    modified: str
    """Time of the last change, as the file system gives it."""

    def open(self) -> IO[Any]:
        """Open for reading, decompressed."""
        fs, root = fsspec_filesystem(self.path)
        stream = fs.open(root, "rb") if "://" in self.path else open(self.path, "rb")
        return cast(IO[Any], gzip.GzipFile(fileobj=stream)) if self.path.endswith(".gz") else stream


def list_files(patterns: list[str], input_format: str, output: str) -> list[InputFile]:
    """The files that `--input` names: files, folders (searched to the bottom) and globs, in the given order.

    Files in a folder are sorted by path. Hidden files, files starting with `_` and anything under `output` are left
    out; with `auto`, so are files with an unknown ending.

    Raises:
        InputError: there is no such file, or `auto` does not know the ending of a file that is named itself.
    """
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        has_files = False
        for path, size, modified, named in _find_files(pattern, output):
            plain = path.removesuffix(".gz")
            kind = input_format if input_format != "auto" else ENDINGS.get(os.path.splitext(plain)[1].lower(), "")
            if not kind and not named:
                continue
            if not kind:
                known = " ".join(ENDINGS)
                raise InputError(
                    f"{path}: its ending does not say what format it is (known: {known}, also with .gz); "
                    "pass --input_format csv, tsv, jsonl, parquet, sequences or recbole"
                )
            has_files = True
            key = path if "://" in path else os.path.realpath(path)
            files.setdefault(key, InputFile(path=path, format=kind, bytes=size, modified=modified))
        if not has_files:
            raise InputError(
                f"--input {pattern}: no file there has a known ending ({' '.join(ENDINGS)}); pass --input_format"
            )
    return list(files.values())


def _find_files(pattern: str, output: str) -> Iterator[tuple[str, int, str, bool]]:
    """Path, bytes and modification time of each file that `pattern` names; whether it is named itself."""
    if "://" in pattern:
        try:
            fs, root = fsspec_filesystem(pattern)
        except InputError as error:
            raise InputError(f"--input {error}") from None
        matches = sorted(fs.glob(root)) if glob.has_magic(root) else [root] if fs.exists(root) else []
        for match in matches:
            inside = sorted(fs.find(match)) if fs.isdir(match) else [match]
            for path in inside:
                if path == match or _is_visible(os.path.relpath(path, match)):
                    info = fs.info(path)
                    changed = str(info.get("mtime") or info.get("LastModified") or info.get("ETag") or "")
                    yield fs.unstrip_protocol(path), info["size"], changed, path == match
    else:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        below = os.path.join(os.path.abspath(output), "")
        for match in matches:
            inside = [match]
            if os.path.isdir(match):
                inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(match) for name in names)
                inside = [path for path in inside if _is_visible(os.path.relpath(path, match))]
            for path in inside:
                if not os.path.isdir(path) and not os.path.abspath(path).startswith(below):
                    status = os.stat(path)
                    yield path, status.st_size, str(status.st_mtime_ns), path == match
    if not matches:
        raise InputError(f"--input {pattern}: no such file or folder, and no file matches it as a pattern")


def _is_visible(path: str) -> bool:
    return not any(part.startswith((".", "_")) for part in path.split(os.sep))
