"""Adds what is made of a finished export to it: an index, an encoder. Each has a folder of its own below one name.

Its files are written first; then the manifest, which lists them, is replaced in one step. So the export has the old one
or the new one whole, and none before that. The folder of the old one is deleted then, and those that nothing was
written to for a day: a killed run left them. Another run may be writing to a newer one.
"""

import json
import secrets
from datetime import timedelta
from typing import TypeVar

import pyarrow.fs

from recgpt_torchrec.distributed.processes import LONG_WORK_S, log_message, run_on_first_rank
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.encoder_manifest import ENCODER_FOLDER, EncoderManifest
from recgpt_torchrec.retrieval.exports.index_manifest import FOLDER, IndexManifest
from recgpt_torchrec.retrieval.exports.manifest import ExportManifest
from recgpt_torchrec.retrieval.exports.reading import Export
from recgpt_torchrec.storage import exists, filesystem, names, raise_storage_failure, remove, write
from recgpt_torchrec.storage.folders import MANIFEST
from recgpt_torchrec.storage.typed import seal

FOLDERS = {"index": FOLDER, "encoder": ENCODER_FOLDER}
"""Field of the manifest, and folder below the export's."""
Addition = TypeVar("Addition", IndexManifest, EncoderManifest)


def new_folder(name: str) -> str:
    """A folder for the files of a new index or encoder, relative to the export's (collective)."""
    return f"{FOLDERS[name]}/{run_on_first_rank(lambda: secrets.token_hex(4))}"


def commit_addition(export: Export, name: str, added: Addition) -> Addition:
    """Put an index or encoder into the manifest, and delete the files of others (collective).

    Args:
        export: opened; its manifest has it afterwards.
        name: `index` or `encoder`.
        added: its files are there.

    Raises:
        InputError: on every rank, where the export or these files were replaced meanwhile, or it cannot be written.
    """
    folder = FOLDERS[name]

    def replace_manifest() -> None:
        current = ExportManifest.read(export.path)
        if Export(path=export.path, manifest=current).fingerprint != export.fingerprint:
            raise InputError(f"{export.path} was written anew while its {name} was built; run the same command again")
        if not all(exists(f"{export.path}/{path}") for path in added.paths):
            raise InputError(f"{export.path}: its {name} was replaced meanwhile; run the same command again")
        replaced = getattr(current, name)
        setattr(current, name, added)
        text = json.dumps(seal(json.loads(current.to_json())), indent=1)
        try:
            write(f"{export.path}/{MANIFEST}", text.encode())
        except OSError as error:
            raise_storage_failure(error, export.path, "write")
            raise InputError(f"cannot write {export.path}: {error}") from None
        old, new = (_folders([] if each is None else each.paths, folder) for each in (replaced, added))
        try:
            for each in names(f"{export.path}/{folder}"):
                if each not in new and (each in old or _is_abandoned(export, f"{folder}/{each}")):
                    remove(f"{export.path}/{folder}/{each}")
        except OSError as error:
            log_message(f"Files of another {name} stay in {export.path}/{folder}: {' '.join(str(error).split())}")

    run_on_first_rank(replace_manifest)
    setattr(export.manifest, name, added)
    return added


def _folders(paths: list[str], folder: str) -> set[str]:
    """Names of the folders below `folder` that hold some files."""
    steps = [path.split("/") for path in paths]
    return {path[1] for path in steps if path[0] == folder and len(path) > 1}


def _is_abandoned(export: Export, folder: str) -> bool:
    """Whether nothing was written for a day to a folder that the export does not use.

    By the clock of the disk, which has just written the manifest: that of this node may be another.
    """
    fs, root = filesystem(f"{export.path}/{folder}")
    infos = [fs.get_file_info(root), *fs.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))]
    now = fs.get_file_info(filesystem(f"{export.path}/{MANIFEST}")[1]).mtime
    limit = now - timedelta(seconds=LONG_WORK_S)
    times = [info.mtime for info in infos if info.mtime is not None]  # a store's folders have none
    return bool(times) and max(times) < limit
