"""Gives the engine each raw file under a name and in a form in which it reads just that file.

The engine takes `*`, `?` and `[` in a path for a pattern, reads columns out of folders named NAME=VALUE, and knows only
some encodings and compressions. A local file gets a link with a plain name; what the engine cannot read is copied,
decompressed and in UTF-8, one file at a time.
"""

import codecs
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.reading.files import InputFile
from recgpt_torchrec.storage import remote

ENGINE_COMPRESSIONS = {"": "none", ".gz": "gzip", ".zst": "zstd"}
"""Compressions that the engine reads in text, and its names for them."""
CHUNK = 2**22
"""Bytes copied at once."""


@dataclass(frozen=True)
class Copy:
    """A file as the engine reads it."""

    path: str
    compression: str
    """The engine's name for it; `none` if there is none."""


@contextmanager
def engine_copy(file: InputFile, scratch: Path, encoding: str) -> Iterator[Copy]:
    """Link or copy a file for the engine; the copy is deleted when the `with` ends.

    Raises:
        InputError: the file is not in that encoding.
        OSError: it cannot be read or copied.
    """
    is_text = file.format != "parquet"
    transcodes = is_text and codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig")
    copies = transcodes or file.compression not in (ENGINE_COMPRESSIONS if is_text else ("",))
    if remote(file.path) and not copies and not glob.has_magic(file.path):
        yield Copy(file.path, ENGINE_COMPRESSIONS[file.compression])
        return
    path = scratch / f"input{'' if is_text else '.parquet'}"
    path.unlink(missing_ok=True)
    try:
        if not copies and not remote(file.path):
            path.symlink_to(os.path.abspath(file.path))
            yield Copy(str(path), ENGINE_COMPRESSIONS[file.compression])
        else:
            _copy(file, path, encoding if transcodes else None)
            yield Copy(str(path), "none")
    finally:
        path.unlink(missing_ok=True)


def _copy(file: InputFile, path: Path, encoding: str | None) -> None:
    """Copy a file, decompressed and, given its encoding, in UTF-8."""
    with file.open() as source, path.open("wb") as target:
        if encoding is None:
            shutil.copyfileobj(source, target, CHUNK)
            return
        decoder = codecs.getincrementaldecoder(encoding)()
        done = 0
        try:
            while chunk := source.read(CHUNK):
                text = decoder.decode(chunk)
                target.write((text if done else text.removeprefix("\ufeff")).encode())
                done += len(chunk)
            target.write(decoder.decode(b"", final=True).encode())
        except UnicodeError as error:
            raise InputError(
                f"{file.path} is not in --encoding {encoding}: {error} in the {CHUNK:,} bytes from byte {done:,} on; "
                "give another --encoding"
            ) from None
