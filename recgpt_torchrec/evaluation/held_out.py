"""Whether a dataset holds items out for a split, and the messages where it does not or where a user has none."""

from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.split import FEWEST_ITEMS, SplitName
from recgpt_torchrec.errors import InputError


def check_has_targets(dataset: Dataset, split: SplitName, remedy: str) -> None:
    """Check that a user has a target in `validation` or `test`, as far as the manifest tells.

    Args:
        dataset: opened.
        split: `validation` or `test`.
        remedy: what to do, the second sentence of the message.

    Raises:
        InputError: no user has one.
    """
    if dataset.manifest.count_targets(split) != 0:
        return
    reason = _reason(dataset.manifest, split)
    raise InputError(f"{dataset.path}: no user has a {split} item, because {reason}. {remedy}")


def explain_left_out(manifest: Manifest, split: SplitName) -> str:
    """Why users have no history in a split, as the end of a sentence about them."""
    if split == "all":
        return "they have no interactions in this dataset"
    if manifest.hold_out == "last":
        return f"they have fewer than {FEWEST_ITEMS} items, so none is held out"
    if manifest.hold_out == "targets":
        return "they have fewer than two interactions of --target_events, or nothing before them"
    return f"they have no interaction in the {split} part, or none before it"


def _reason(manifest: Manifest, split: SplitName) -> str:
    if manifest.hold_out == "none":
        return "it was prepared with --hold_out none"
    if manifest.hold_out == "last":
        longest = manifest.preparation.get("lengths", {}).get("max", 0)
        return f"--hold_out last takes {FEWEST_ITEMS} interactions and the longest history has {longest:,}"
    if manifest.hold_out == "given" and split == "validation" and not manifest.has_validation:
        return "it was prepared with --hold_out given without --validation_input"
    if manifest.hold_out == "targets":
        return "nobody has two interactions of --target_events and one before them"
    return f"with --hold_out {manifest.hold_out} nobody has an interaction in the {split} part and one before it"
