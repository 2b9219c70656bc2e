"""Which items are never a training target, in words, from what a dataset's manifest records."""

from recgpt_torchrec.data.dataset import Manifest


def describe_untargeted(manifest: Manifest, reads_attributes: bool = False) -> list[str]:
    """A note about items that are never a training target, which lists hardly hold; none where there are no such items.

    Args:
        manifest: of the dataset.
        reads_attributes: whether the model tells items by attributes.
    """
    without = manifest.preparation.get("split", {}).get("items_without_target", 0)
    if not without:
        return []
    cures = (
        [] if manifest.hold_out == "none" else ["prepare --hold_out none trains on what is held out (for production)"]
    )
    if not reads_attributes:
        cures.append("prepare --items TABLE --item_attributes NAMES lets attributes speak for new items")
    end = f": {', or '.join(cures)}" if cures else ""
    return [
        f"note        {without:,} of {manifest.items:,} items are never a training target, so they are in hardly any "
        f"list{end}"
    ]
