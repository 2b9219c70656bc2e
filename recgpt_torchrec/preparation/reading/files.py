"""Lists the files that `--input` names, and opens them.

Knows their names, sizes and endings, and of their contents only what the first bytes tell.
"""

import bz2
import glob
import gzip
import lzma
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast

import pyarrow as pa

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage import fsspec_filesystem, remote

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".inter": "recbole",
    ".txt": "sequences",
}
TABLE_ENDINGS = {**ENDINGS, ".item": "recbole", ".user": "recbole", ".txt": "csv", "": "csv"}
"""The same for tables of attributes, which are no histories; any other text is read as csv."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FORMATS = "csv, tsv, jsonl, parquet, sequences or recbole"
TABLE_FOLDERS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
"""Folders in a table whose other files also hold rows that were deleted or replaced since."""


@dataclass(kw_only=True)
class InputFile:
    """One raw file."""

    path: str
    format: str
    bytes: int
    modified: str
    """Time of the last change, as the file system gives it."""

    @property
    def compression(self) -> str:
        """Ending that tells how the file is compressed, such as `.gz`; empty if it is not."""
        return next((ending for ending in COMPRESSED if self.path.lower().endswith(ending)), "")

    @property
    def partitions(self) -> dict[str, str]:
        """Names and values of the folders NAME=VALUE that the file is in."""
        folders = self.path.replace(os.sep, "/").split("/")[:-1]
        return {folder.partition("=")[0]: folder.partition("=")[2] for folder in folders if "=" in folder}

    def open(self) -> IO[Any]:
        """Open for reading, decompressed."""
        fs, root = fsspec_filesystem(self.path)
        stream = cast(IO[Any], fs.open(root, "rb") if remote(self.path) else open(self.path, "rb"))
        match self.compression:
            case ".gz":
                return cast(IO[Any], gzip.GzipFile(fileobj=stream))
            case ".bz2":
                return cast(IO[Any], bz2.BZ2File(stream))
            case ".xz":
                return cast(IO[Any], lzma.LZMAFile(stream))
            case ".zst":
                return cast(IO[Any], pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"))
        return stream


@dataclass
class InputFiles:
    """The files to read, in order, and those in the same folders that are left out."""

    files: list[InputFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Paths of files with unknown endings, and of hidden files with known ones."""
    repeated: list[str] = field(default_factory=list)
    """Paths of files that were named before, and are read once."""


def list_files(
    patterns: list[str], config: Prepare, option: str = "--input", endings: Mapping[str, str] = ENDINGS
) -> InputFiles:
    """The files that an option names: files, folders (searched to the bottom) and globs, in the given order.

    Files in a folder are sorted by path. Hidden files, files starting with `_` and anything under the output are left
    out; with the format `auto`, so are files of a folder with an unknown ending.

    Args:
        patterns: values of the option.
        config: options of the stage.
        option: for messages.
        endings: the format of each known ending; that of the ending "" is that of files named themselves whose ending
            and first bytes say nothing.

    Raises:
        InputError: there is no such file, or `auto` does not know the format of a file that is named itself.
    """
    found: dict[str, InputFile] = {}
    result = InputFiles()
    for pattern in patterns:
        has_files = False
        for path, size, modified, named, visible in _find_files(pattern, config.output, option):
            file = InputFile(path=path, format="", bytes=size, modified=modified)
            file.format = _choose_format(file, config, named, endings)
            if not visible or not file.format:
                if size and (file.format or visible):
                    result.left_out.append(path)
                continue
            has_files = True
            key = path if remote(path) else os.path.realpath(path)
            if key in found:
                result.repeated.append(path)
            found.setdefault(key, file)
        if not has_files:
            raise InputError(
                f"{option} {pattern}: no file there has a known ending ({' '.join(endings).strip()}); "
                + ("pass --input_format" if endings is ENDINGS else "name the files themselves")
            )
    result.files = list(found.values())
    return result


def _choose_format(file: InputFile, config: Prepare, named: bool, endings: Mapping[str, str]) -> str:
    """The format of a file; empty: unknown, and the file is one of a folder.

    Raises:
        InputError: it is unknown, and the file is named itself.
    """
    if config.input_format != "auto":
        return config.input_format
    ending = os.path.splitext(file.path[: len(file.path) - len(file.compression)])[1].lower()
    known = endings.get(ending, "") if ending else ""
    if ending == ".json" and not named:
        return known if _starts_with(file, b"{") else ""  # settings and results are JSON too
    if known or not named:
        return known
    if config.separator is not None or not config.header:
        return "csv"
    for start, format in ((b"PAR1", "parquet"), (b"{", "jsonl")):
        if _starts_with(file, start):
            return format
    if "" in endings:
        return endings[""]
    raise InputError(
        f"{file.path}: its ending does not say what format it is (known: {' '.join(ENDINGS)}, also with "
        f"{' '.join(COMPRESSED)}); pass --input_format {FORMATS}, for text with columns --separator and, if its first "
        "line holds no names, --header false"
    )


def _starts_with(file: InputFile, start: bytes) -> bool:
    try:
        with file.open() as stream:
            return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException):
        return False  # reading it says why


def _find_files(pattern: str, output: str, option: str) -> Iterator[tuple[str, int, str, bool, bool]]:
    """Each file that `pattern` names: path, bytes, modification time, whether it is named itself, whether visible."""
    if remote(pattern):
        try:
            fs, root = fsspec_filesystem(pattern)
        except InputError as error:
            raise InputError(f"{option} {error}") from None
        matches = [root] if fs.exists(root) else sorted(fs.glob(root)) if glob.has_magic(root) else []
        for match in matches:
            inside = sorted(fs.find(match)) if fs.isdir(match) else [match]
            _check_no_table(match, inside)
            for path in inside:
                info = fs.info(path)
                changed = str(info.get("mtime") or info.get("LastModified") or info.get("ETag") or "")
                yield fs.unstrip_protocol(path), info["size"], changed, path == match, _is_visible(path, match)
    else:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        below = os.path.join(os.path.abspath(output), "")
        for match in matches:
            inside = [match]
            if os.path.isdir(match):
                inside = sorted(_walk(match))
                _check_no_table(match, inside)
            for path in inside:
                named = path == match
                if os.path.islink(path) and not os.path.exists(path):
                    raise InputError(f"{option} {path}: this link leads nowhere; mend it, or remove it from the folder")
                if not os.path.isdir(path) and not os.path.abspath(path).startswith(below):
                    status = os.stat(path)
                    yield path, status.st_size, str(status.st_mtime_ns), named, _is_visible(path, match)
    if not matches:
        raise InputError(f"{option} {pattern}: no such file or folder, and no file matches it as a pattern")


def _walk(folder: str) -> Iterator[str]:
    """Every file below a folder; links to folders are followed once."""
    visited = set()
    for current, folders, names in os.walk(folder, followlinks=True):
        visited.add(os.path.realpath(current))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(current, name)) not in visited]
        yield from (os.path.join(current, name) for name in names)


def _is_visible(path: str, match: str) -> bool:
    return path == match or not any(part.startswith((".", "_")) for part in os.path.relpath(path, match).split(os.sep))


def _check_no_table(folder: str, paths: list[str]) -> None:
    """Raise an `InputError` if the folder is a table whose files also hold rows that are no longer in it."""
    for path in paths:
        parts = os.path.relpath(path, folder).split(os.sep)
        name = next((TABLE_FOLDERS[part] for part in parts[:-1] if part in TABLE_FOLDERS), "")
        if parts[-2:-1] == ["metadata"] and parts[-1].endswith(".metadata.json"):
            name = "an Iceberg table"
        if name:
            raise InputError(
                f"{folder} is {name}: its files also hold rows that were deleted or replaced since. Write the table's "
                "current rows to plain Parquet with the program that owns it, and give that folder"
            )
