"""Applies deltas to an export: writes the export that is whole after them, row group by row group."""

from collections.abc import Iterator

import pyarrow as pa

from recgpt_torchrec.errors import InputError
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.retrieval.exports.chain import Chain
from recgpt_torchrec.retrieval.exports.manifest import DeltaManifest, ExportManifest
from recgpt_torchrec.retrieval.exports.share import CHANGED_GROUP_BYTES, GROUPS_PER_PART, rows_per_group
from recgpt_torchrec.retrieval.exports.vectors import parquet_options
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.parts import Part, regroup, write_parts

SAME = (
    "items users dim interests dtype metric repeat_bias dataset vocabulary dataset_fingerprint checkpoint "
    "checkpoint_fingerprint settings"
).split()
"""Fields of a manifest that an export has of the last delta applied to it."""


def apply_deltas(path: str, chain: Chain) -> ExportManifest:
    """Write the state of a chain as an export, and commit it whole.

    Some row groups are held at a time: those that are written, and those in which it looks for ids (see `Lookup`).

    Args:
        path: folder or URI of the export; must be empty or not exist.
        chain: an export and at least one delta.

    Raises:
        InputError: `path` is not empty or cannot be written, or a part of the chain is damaged; nothing is written.
    """
    last = chain.last.manifest
    assert isinstance(last, DeltaManifest)
    manifest = ExportManifest(state=chain.state, **{name: getattr(last, name) for name in SAME})
    folders.check_free(path, manifest.KIND.name)
    with folders.stage_folder(path) as (fs, folder):

        def write(kind: str) -> list[Part]:
            interests = manifest.interests if kind == "users" else 1
            rows = rows_per_group((interests, manifest.dim), CHANGED_GROUP_BYTES)
            groups = regroup(_rows(chain, kind, rows), rows)
            options = parquet_options(manifest.dtype, f"{kind[:-1]}_id", interests)
            parts = write_parts(fs, folder, kind, groups, GROUPS_PER_PART, options=options)
            expected, written = getattr(last, kind), sum(part.rows for part in parts)
            if written != expected:
                raise InputError(
                    f"{' '.join(chain.paths)} lead to {written:,} {kind}, but {chain.last.path} promises {expected:,}: "
                    "one of them is damaged; restore it, or export again without --since"
                )
            return parts

        manifest.item_parts, manifest.user_parts = write("items"), write("users")
        folders.write_manifest(fs, folder, manifest.to_json())
    return manifest


def _rows(chain: Chain, kind: str, rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of a chain's state, at most `rows` per batch, with progress."""
    columns = [f"{kind[:-1]}_id", "key", *chain.last.columns_of(kind)]
    with progress_bar(getattr(chain.last.manifest, kind), kind) as bar:
        for batch in chain.rows(kind, columns, rows):
            bar.update(batch.num_rows)
            yield batch
