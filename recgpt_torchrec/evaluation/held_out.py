"""Whether a dataset holds items out for a split, and the messages where it does not or where a user has none."""

from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.reading.damage import SetAside
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.split import FEWEST_ITEMS, SplitName
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.distributed.processes import run_on_first_rank
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


def check_has_event(
    dataset: Dataset, split: SplitName, inputs: Inputs, request: Request, set_aside: SetAside | None = None
) -> None:
    """Check that a user has a held-out item of the event type that a request ranks (collective).

    Raises:
        InputError: no user has one.
    """
    if not has_users(dataset, split, inputs, request, set_aside):
        word = f" of the event type {dataset.manifest.events[request.held_out_event - 1]}"
        cure = "prepare the log with --hold_out targets --target_events TYPE to hold items of a type out"
        raise InputError(
            f"{dataset.path}: no user with a history that the model reads has a {split} item"
            f"{word if request.held_out_event else ''}; {cure}"
        )


def has_users(
    dataset: Dataset, split: SplitName, inputs: Inputs, request: Request, set_aside: SetAside | None = None
) -> bool:
    """Whether a user can be ranked of those that the manifest counts (collective).

    Row groups are read up to the first one with such a user, of the model's columns only those that decide.
    """
    if not (request.held_out_event or inputs.history_events):
        return True
    inputs = Inputs(events=inputs.events, history_events=inputs.history_events)
    reader = HistoryReader(dataset=dataset, split=split, max_len=1, inputs=inputs, request=request, set_aside=set_aside)
    groups = row_groups(dataset)
    return run_on_first_rank(lambda: any(reader.read([group]).users.size > 0 for group in groups))


def explain_left_out(manifest: Manifest, split: SplitName, inputs: Inputs) -> str:
    """Why a model has no history of users in a split, as the end of a sentence about them."""
    if inputs.history_events:
        return f"they have no history of {', '.join(inputs.history_events)}, which the model reads"
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
