"""Manifests: what a committed folder says of itself, read back and compared with the files that are there.

Knows nothing of what a kind of folder is for. `folders` commits one, `finished` compares it with what is asked for.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, Self

import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.files import exists, filesystem, read
from recgpt_torchrec.storage.folders import MANIFEST
from recgpt_torchrec.storage.parts import Part, checksum_of


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of folder, and the version of it that this program reads and writes."""

    name: str
    """For messages, for example `dataset`."""
    stage: str
    """Program that writes such folders."""
    version_field: str
    """Entry of the manifest that holds the version; only this kind has it."""
    version: int
    parts: tuple[str, ...]
    """Fields of the manifest that list parts."""

    @property
    def repair(self) -> str:
        """What a user can do about a damaged folder."""
        return f"restore the file or run {self.stage} again"


@dataclass(kw_only=True)
class FolderManifest:
    """What `manifest.json` of one kind of folder holds; subclasses give the fields, in the order of the file."""

    KIND: ClassVar[Kind]

    @property
    def all_parts(self) -> list[Part]:
        """Every part that the manifest promises."""
        return [part for name in self.KIND.parts for part in getattr(self, name)]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.all_parts)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The manifest that `text` holds.

        Raises:
            ValueError: it holds none, or one with values that cannot be.
        """
        values = json.loads(text)
        try:
            lists = {name: [Part(**part) for part in values[name]] for name in cls.KIND.parts}
            return cls(**{**values, **lists})
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error).replace(".__init__()", "")) from None

    @classmethod
    def read(cls, path: str) -> Self:
        """The manifest in the folder `path`.

        Raises:
            InputError: there is none, or it is damaged, of another kind of folder or of another version.
        """
        kind, file = cls.KIND, f"{path}/{MANIFEST}"
        article = "an" if kind.name[0] in "aeiou" else "a"
        if not exists(file):
            raise InputError(
                f"{path} is not {article} {kind.name}: it has no {MANIFEST}. "
                f"Make one with: python -m recgpt_torchrec.{kind.stage} --output {path} ..."
            )
        try:
            text = read(file)
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not valid JSON ({error}); run {kind.stage} again into a new folder") from None
        if kind.version_field not in values:
            raise InputError(f"{path} holds something else than {article} {kind.name}; name another folder")
        version = values[kind.version_field]
        if version != kind.version:
            newer = isinstance(version, int) and version > kind.version
            raise InputError(
                f"{path} has {kind.name} format version {version}, this program reads version {kind.version}; "
                f"{'update the program, or ' if newer else ''}run {kind.stage} again with this version into a new "
                "folder"
            )
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise InputError(f"{file} is damaged: {error}; restore it or run {kind.stage} again") from None

    def check_parts(
        self, path: str, *, checksums: bool = False, report: Callable[[Part, str], object] | None = None
    ) -> None:
        """Compare the files in the folder `path` with the manifest.

        Args:
            path: folder of this manifest.
            checksums: read every part and compare its checksum, too; not only its size.
            report: called with each part that is missing or differs, and why; None: that is an error.

        Raises:
            InputError: names the first part that is missing or differs, and what to do.
        """
        fs, root = filesystem(path)
        parts = self.all_parts
        for part, info in zip(parts, fs.get_file_info([f"{root}/{part.path}" for part in parts]), strict=True):
            if info.type == pyarrow.fs.FileType.NotFound:
                reason = f"is missing (the manifest promises {part.rows} rows in {part.bytes} bytes)"
            elif info.size != part.bytes:
                reason = f"is damaged: it has {info.size} bytes, the manifest promises {part.bytes}"
            elif checksums and (checksum := checksum_of(fs, f"{root}/{part.path}")) != part.checksum:
                reason = f"is damaged: its checksum is {checksum}, the manifest promises {part.checksum}"
            else:
                continue
            if report is None:
                raise InputError(f"{path}: the part {part.path} {reason}; {self.KIND.repair}")
            report(part, reason)
