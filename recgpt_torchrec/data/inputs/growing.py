"""Whether a run may start from a checkpoint that reads other attributes and features: `pretrain --initial`."""

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.errors import InputError

OPTIONS = {"event": "--events.input true", "asked_event": "--events.ask true"}
"""What makes a run read a feature; others are named by --time.use."""


def check_growth(earlier: Inputs, inputs: Inputs, checkpoint: str, dataset: Dataset) -> list[str]:
    """Check that a run's attributes and features are those of a checkpoint, with the same values or more, and perhaps
    new ones.

    Args:
        earlier: what the checkpoint's model reads beside ids.
        inputs: what the run's model reads.
        checkpoint: its folder, for messages.
        dataset: the run's.

    Returns:
        What grows, a line for each attribute.

    Raises:
        InputError: an attribute is missing or not used, means other values, or is pooled in another way; or a feature
            is not used.
    """
    features = {each.name for each in inputs.features}
    if left_out := [each.name for each in earlier.features if each.name not in features]:
        option = OPTIONS.get(left_out[0], f"--time.use {left_out[0]}")
        raise InputError(
            f"--initial: the checkpoint {checkpoint} reads {left_out[0]}, which the run leaves out; give {option}, or "
            "leave --initial out"
        )
    read = {each.table: each for each in inputs.attributes}
    present = {each.table: each for each in dataset.manifest.attributes}
    lines = []
    for each in earlier.attributes:
        reads = f"--initial: the checkpoint {checkpoint} reads the attribute {each.full_name}"
        if (found := present.get(each.table)) is None:
            raise InputError(f"{reads}, and {dataset.path} lacks it; prepare the log with it, or leave --initial out")
        if (now := read.get(each.table)) is None:
            raise InputError(f"{reads}, which --attributes.use leaves out; name it too, or leave --initial out")
        known = {vocabulary.fingerprint for vocabulary in found.lineage} | {found.fingerprint}
        if each.fingerprint not in known or now.values < each.values:
            raise InputError(
                f"{reads}, whose values have other ids in {dataset.path}; prepare the log with --vocabulary and the "
                "dataset that it was trained on, so that known values keep their ids, or leave --initial out"
            )
        if now.weight != each.weight:
            raise InputError(
                f"{reads} with the weight {each.weight:g}, not {now.weight:g}; give the same one: --attributes.weights "
                f"{each.full_name}={each.weight:g}"
            )
        if now.pooling != each.pooling:
            raise InputError(f"{reads} as the {each.pooling} of its values; give --attributes.pooling {each.pooling}")
        if now.values > each.values:
            more = now.values - each.values
            lines.append(f"{each.full_name}: {more:,} new value{'s' * (more > 1)}")
    old = {each.table for each in earlier.attributes}
    lines += [f"{each.full_name}: new, starts at 0" for each in inputs.attributes if each.table not in old]
    return lines
