"""Writes folders of exports and deltas: each process its share of the vectors, rank 0 the manifest, last."""

from collections.abc import Iterable
from typing import Any

from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.processes import run_on_first_rank
from recgpt_torchrec.retrieval.exports.chain import Chain
from recgpt_torchrec.retrieval.exports.changes import Changes, removed_users
from recgpt_torchrec.retrieval.exports.manifest import DeltaManifest, ExportManifest
from recgpt_torchrec.retrieval.exports.share import Share, VectorBatch, write_groups
from recgpt_torchrec.storage.parts import regroup

REMOVED_ROWS = 2**17
"""Number of removed users per row group."""


def write_export(
    path: str,
    dataset: Dataset,
    *,
    items: Iterable[VectorBatch],
    users: Iterable[VectorBatch],
    dim: int,
    interests: int,
    everyone: bool,
    checkpoint: str,
    checkpoint_fingerprint: str,
    settings: dict[str, Any],
    dtype: str = "float32",
    repeat_bias: float = 0.0,
) -> ExportManifest:
    """Write an export and commit it whole (collective: each process gives its share).

    Args:
        path: folder or URI of the export; must be empty or not exist.
        dataset: provides the keys of the ids.
        items: this process's share of the item vectors, [n, dim]; read to the end before `users` begins.
        users: this process's share of the user vectors: [n, dim], or [n, interests, dim] where `interests` > 1.
        dim: length of a vector.
        interests: number of vectors per user.
        everyone: whether every user of the dataset must have vectors; False: at least one.
        checkpoint: folder the vectors come from, for the manifest.
        checkpoint_fingerprint: its fingerprint, for the manifest.
        settings: the stage's options, for the manifest.
        dtype: of the stored numbers, see `vectors`.
        repeat_bias: of the model, for the manifest.

    Returns:
        The manifest, on every process.

    Raises:
        InputError: `path` is not empty, a file cannot be written, or a vector cannot be stored (on every process).
            Nothing is written then.
        ValueError: wrong shapes, or an id is missing or repeated.
    """
    manifest = ExportManifest(
        dim=dim,
        interests=interests,
        dtype=dtype,
        repeat_bias=repeat_bias,
        dataset=dataset.path,
        vocabulary=dataset.manifest.vocabulary,
        dataset_fingerprint=histories_fingerprint(dataset),
        checkpoint=checkpoint,
        checkpoint_fingerprint=checkpoint_fingerprint,
        settings=settings,
    )
    with shared_folder.stage_shared_folder(path, manifest.KIND.name) as (fs, folder):
        share = Share(dataset, "items", (dim,), dtype)
        manifest.item_parts = share.write(items, fs, folder, path)
        manifest.items = share.check_complete(dataset.manifest.items)
        share = Share(dataset, "users", user_shape(manifest), dtype)
        manifest.user_parts = share.write(users, fs, folder, path)
        manifest.users = share.check_complete(dataset.manifest.users, everyone)
        run_on_first_rank(lambda: shared_folder.write_shared_manifest(fs, folder, manifest))
    return manifest


def write_delta(
    path: str,
    dataset: Dataset,
    chain: Chain,
    tolerance: float,
    *,
    items: Iterable[VectorBatch],
    users: Iterable[VectorBatch],
    everyone: bool,
    checkpoint: str,
    checkpoint_fingerprint: str,
    settings: dict[str, Any],
    repeat_bias: float = 0.0,
) -> DeltaManifest:
    """Write what changes from a chain to new vectors, and commit it whole (collective: each process gives its share).

    Args:
        path: folder or URI of the delta; must be empty or not exist.
        dataset: of the new vectors; its vocabulary is that of the chain or extends it.
        chain: an export and the deltas after it; `check_fits` was called.
        tolerance: vectors that moved by no more than this, relative to their length, are left out.
        items: as for `write_export`, and so are the other arguments.

    Returns:
        The manifest, on every process.

    Raises:
        InputError: as for `write_export`; or a part of the chain is damaged.
        ValueError: wrong shapes, or an id is missing or repeated.
    """
    before = chain.last.manifest
    manifest = DeltaManifest(
        base=chain.state,
        since=chain.paths,
        tolerance=tolerance,
        dim=before.dim,
        interests=before.interests,
        dtype=before.dtype,
        metric=before.metric,
        repeat_bias=repeat_bias,
        dataset=dataset.path,
        vocabulary=dataset.manifest.vocabulary,
        dataset_fingerprint=histories_fingerprint(dataset),
        checkpoint=checkpoint,
        checkpoint_fingerprint=checkpoint_fingerprint,
        settings=settings,
    )
    with shared_folder.stage_shared_folder(path, manifest.KIND.name) as (fs, folder):
        changed = Changes(chain, "items", dataset.manifest.items, tolerance)
        share = Share(dataset, "items", (manifest.dim,), manifest.dtype, changed)
        manifest.item_parts = share.write(items, fs, folder, path)
        manifest.items = share.check_complete(dataset.manifest.items)
        manifest.new_items = changed.count_new()
        changed = Changes(chain, "users", dataset.manifest.users, tolerance)
        share = Share(dataset, "users", user_shape(manifest), manifest.dtype, changed)
        manifest.user_parts = share.write(users, fs, folder, path)
        manifest.users = share.check_complete(dataset.manifest.users, everyone)
        manifest.new_users = changed.count_new()
        if manifest.users - manifest.new_users < before.users:
            gone = regroup(removed_users(chain, changed.gather_seen()), REMOVED_ROWS)
            options = {"use_dictionary": False}
            manifest.removed_user_parts = write_groups(gone, fs, folder, path, "removed_users", options)
        run_on_first_rank(lambda: shared_folder.write_shared_manifest(fs, folder, manifest))
    return manifest


def user_shape(manifest: ExportManifest | DeltaManifest) -> tuple[int, ...]:
    """Shape of a user's vectors."""
    return (manifest.dim,) if manifest.interests == 1 else (manifest.interests, manifest.dim)
