"""Chooses what a model reads beside ids, and checks that a dataset has what a checkpoint's model reads."""

from dataclasses import replace

from recgpt_torchrec.config import AttributeChoice, Pretrain, Tuning
from recgpt_torchrec.config.command_line import nearest
from recgpt_torchrec.config.inputs.attributes import ALL
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.events import add_events, check_events
from recgpt_torchrec.data.inputs.places import PLACE_VALUES
from recgpt_torchrec.data.inputs.records import DatasetAttribute
from recgpt_torchrec.data.inputs.spec import PLACES, TIMES, Attribute, Feature, Inputs
from recgpt_torchrec.data.inputs.time_units import check_times, choose_unit
from recgpt_torchrec.data.inputs.times import VALUES
from recgpt_torchrec.errors import InputError


def choose_inputs(config: Pretrain, dataset: Dataset) -> Inputs:
    """What the model of a run reads beside ids: by default every attribute and the event types that the dataset has.

    Raises:
        InputError: the options name an attribute that the dataset lacks, or one in two ways; or see `choose_unit` and
            `add_events`.
    """
    attributes, time = choose_attributes(config.attributes, dataset), config.time
    of_items = any(each.entity == "item" for each in attributes)
    inputs = Inputs(
        attributes=attributes,
        id_dropout=config.attributes.id_dropout if of_items else 0.0,
        features=[Feature(name=name, values=VALUES[name]) for name in time.use],
        time_unit=choose_unit(time, dataset) if time.use else 1.0,
        utc_offset_hours=time.utc_offset_hours,
    )
    return add_events(inputs, config.events, dataset)


def choose_attributes(choice: AttributeChoice, dataset: Dataset) -> list[Attribute]:
    """The attributes of a dataset that are read, in its order.

    Raises:
        InputError: see `choose_inputs`.
    """
    present = dataset.manifest.attributes
    used = [each.table for each in present]
    if choice.use != [ALL]:
        used = [_find(name, "use", dataset).table for name in choice.use]
    weights: dict[str, float] = {}
    for name, weight in choice.weight_of().items():
        found = _find(name, "weights", dataset)
        if found.table not in used:
            raise InputError(f"--attributes.weights names {name}, which is not among those of --attributes.use; add it")
        _check_once(found.table in weights, name, "weights")
        weights[found.table] = weight
    for place, table in enumerate(used):
        _check_once(table in used[:place], choice.use[place] if choice.use != [ALL] else table, "use")
    return [
        Attribute(
            entity=each.entity,
            name=each.name,
            values=each.values,
            fingerprint=each.fingerprint,
            weight=weights.get(each.table, 1.0),
            pooling=choice.pooling,
        )
        for each in present
        if each.table in used
    ]


def _check_once(again: bool, name: str, option: str) -> None:
    if again:
        raise InputError(f"--attributes.{option} names the attribute {name} twice; name it once")


def _find(name: str, option: str, dataset: Dataset) -> DatasetAttribute:
    """The attribute of a dataset that a name of an option stands for.

    Raises:
        InputError: it has none of that name, or users and items have one.
    """
    present = dataset.manifest.attributes
    full = {each.full_name: each for each in present}
    if name in full:
        return full[name]
    found = [each for each in present if each.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"--attributes.{option} names {name}, which users and items both have; write "
            + " or ".join(each.full_name for each in found)
        )
    names = [*full, *(each.name for each in present)]
    if not names:
        hint = "it has none; prepare the log with --item_attributes or --user_attributes"
    elif close := nearest(name, names):
        hint = f"did you mean {' or '.join(close)}?"
    else:
        hint = f"it has {', '.join(full)}"
    raise InputError(f"--attributes.{option} names {name}, an attribute that {dataset.path} does not have; {hint}")


def add_feedback(inputs: Inputs, dataset: Dataset, tuning: Tuning) -> Inputs:
    """What a model reads beside ids once it is tuned: kinds of feedback and places as well.

    Raises:
        InputError: the dataset lacks places that are asked for.
    """
    if not tuning.prompts:
        return inputs
    features = inputs.features
    if tuning.places:
        check_places(dataset, "--tuning.places true")
        features = [*features, Feature(name="place", values=PLACE_VALUES)]
    manifest = dataset.manifest
    return replace(inputs, segments=manifest.segments, feedback=bool(manifest.feedback), features=features)


def check_places(dataset: Dataset, reader: str) -> None:
    """Raise an `InputError` unless a dataset stores places; `reader` is what reads them."""
    if not dataset.manifest.settings.get("position_column"):
        raise InputError(
            f"{reader} reads places in a list, and {dataset.path} stores none; prepare the log with --position_column"
        )


def check_inputs(inputs: Inputs, checkpoint: str, dataset: Dataset, command: str) -> None:
    """Check that a dataset has what the model of a checkpoint reads beside ids.

    Args:
        inputs: of the model.
        checkpoint: its folder.
        dataset: to use it with.
        command: that trains the model further on this dataset, for messages.

    Raises:
        InputError: an attribute or event types are missing, or their ids mean others.
    """
    check_events(inputs, checkpoint, dataset)
    if inputs.reads(*TIMES):
        check_times(inputs, checkpoint, dataset)
    if inputs.reads(*PLACES):
        check_places(dataset, f"the checkpoint {checkpoint}")
    present = {each.table: each for each in dataset.manifest.attributes}
    for each in inputs.attributes:
        found = present.get(each.table)
        if found is not None and found.fingerprint == each.fingerprint:
            continue
        reads = f"the checkpoint {checkpoint} reads the attribute {each.full_name}"
        if found is not None and any(earlier.fingerprint == each.fingerprint for earlier in found.lineage):
            raise InputError(
                f"{reads} and has no vectors for {found.values - each.values:,} values that {dataset.path} added to "
                f"it. Train a new run: {command}; or give the dataset it was trained on"
            )
        why = "lacks it" if found is None else "has other values for it"
        raise InputError(f"{reads}, and {dataset.path} {why}; give the dataset that it was trained on")
