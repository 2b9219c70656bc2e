"""Manifests of committed folders: reading them, and checking the files in a folder against its manifest.

Knows nothing of what a kind of folder is for. `folders` commits folders, `finished` compares them with a request.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import pyarrow.fs

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.storage.failing import raise_storage_failure
from recgpt_torchrec.storage.files import exists, filesystem, is_folder, names, read
from recgpt_torchrec.storage.folders import MANIFEST
from recgpt_torchrec.storage.parts import Part, checksum_of
from recgpt_torchrec.storage.typed import JSON_BYTES, SHOWN, check_seal, make_typed, parse_object
from recgpt_torchrec.texts.commands import command, program


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of folder, and the version of it that this program reads and writes."""

    name: str
    """For messages, for example `dataset`."""
    stage: str
    """Program that writes such folders."""
    version_field: str
    """Field of the manifest that holds the version; each kind has its own."""
    version: int
    parts: tuple[str, ...]
    """Fields of the manifest that list parts."""
    use: str = ""
    """What to do with such a folder that is given where another kind is wanted."""

    @property
    def repair(self) -> str:
        """What the user can do about a damaged folder."""
        return f"restore the file or run {self.stage} again"


@dataclass(kw_only=True)
class FolderManifest:
    """The contents of `manifest.json` of one kind of folder; subclasses add the fields, in the order of the file."""

    KIND: ClassVar[Kind]

    @property
    def all_parts(self) -> list[Part]:
        """All parts that the manifest promises."""
        return [part for name in self.KIND.parts for part in getattr(self, name)]

    @property
    def size(self) -> int:
        """Total size of all parts, in bytes."""
        return sum(part.bytes for part in self.all_parts)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse the text of `manifest.json`.

        Raises:
            ValueError: it is not JSON, or a field is missing, unknown or invalid.
        """
        return cls.from_values(parse_object(text))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make a manifest of the values of `manifest.json`, and check what it promises.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        for name in cls.KIND.parts:  # they have a default, but a folder without parts says so
            if name not in values:
                raise ValueError(f"it has no '{name}'")
        manifest = make_typed(cls, values)
        parts = manifest.all_parts
        for part in parts:
            part.check()
        counts = Counter(part.path for part in parts)
        if repeated := [path for path, count in counts.items() if count > 1]:
            raise ValueError(f"it lists {', '.join(repeated[:3])} more than once")
        return manifest

    @classmethod
    def read(cls, path: str) -> Self:
        """Read the manifest in the folder `path`.

        Raises:
            InputError: there is none, or it is damaged or of another kind or version.
        """
        kind, file = cls.KIND, f"{path}/{MANIFEST}"
        if not exists(file):
            remedy = suggest_below(path, cls._is_of_kind) or _make_remedy(kind, path)
            raise InputError(f"{path} is not {_with_article(kind)}: it has no {MANIFEST}. {remedy}")
        try:
            values = parse_object(read(file, JSON_BYTES), sealed=False)
        except (OSError, ValueError) as error:
            raise_storage_failure(error, file)
            raise InputError(f"{file} is not valid JSON ({error}); run {kind.stage} again into a new folder") from None
        if kind.version_field not in values:
            for other in (each.KIND for each in FolderManifest.__subclasses__()):
                if other.use and other.version_field in values:
                    raise InputError(f"{path} is {_with_article(other)}, not {_with_article(kind)}: {other.use}")
            raise InputError(f"{path} holds something other than {_with_article(kind)}; name another folder")
        version = values[kind.version_field]
        if version != kind.version or isinstance(version, bool):
            newer = isinstance(version, int) and version > kind.version
            raise InputError(
                f"{path} has {kind.name} format version {str(version)[:SHOWN]}, this program reads version "
                f"{kind.version}; {'update the program, or ' if newer else ''}run {kind.stage} again with this version "
                "into a new folder"
            )
        try:
            return cls.from_values(check_seal(values))
        except ValueError as error:
            raise InputError(f"{file} is damaged: {error}; restore it or run {kind.stage} again") from None

    @classmethod
    def _is_of_kind(cls, path: str) -> bool:
        """Whether a folder has a manifest that begins like one of this kind."""
        try:
            return cls.KIND.version_field in parse_object(read(f"{path}/{MANIFEST}", JSON_BYTES), sealed=False)
        except (OSError, ValueError):
            return False

    def check_parts(
        self,
        path: str,
        *,
        checksums: bool = False,
        report: Callable[[Part, str], object] | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Check the files in the folder `path` against the manifest.

        Args:
            path: folder of this manifest.
            checksums: also read every part and compare its checksum, not only its size.
            report: called with each part that is missing or differs, and the reason; None: the first is an error.
            advance: called with 1 for each part.

        Raises:
            InputError: a part is missing or differs, and there is no `report`; names the part.
        """
        fs, root = filesystem(path)
        parts = self.all_parts
        for part, info in zip(parts, fs.get_file_info([f"{root}/{part.path}" for part in parts]), strict=True):
            advance(1)
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


def suggest_below(path: str, is_meant: Callable[[str], bool]) -> str:
    """A question where a folder in `path` may be meant, such as runs/all/data for runs/all; else an empty text."""
    below = sorted(f"{path.rstrip('/')}/{name}" for name in names(path)) if is_folder(path) else []
    meant = [each for each in below if is_folder(each) and is_meant(each)]
    return f"Did you mean {' or '.join(meant[:3])}?" if meant else ""


def _make_remedy(kind: Kind, path: str) -> str:
    if kind.stage != "prepare":
        return f"Make one with the stage {kind.stage}: {program(kind.stage)} --help"
    return f"Make one of a log: {command('prepare', {'input': 'LOG', 'output': path})}"


def _with_article(kind: Kind) -> str:
    return f"{'an' if kind.name[0] in 'aeiou' else 'a'} {kind.name}"
