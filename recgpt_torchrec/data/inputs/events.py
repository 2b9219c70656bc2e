"""Event types that a model reads, predicts and is asked for: from words of the options to ids of a dataset."""

from dataclasses import replace

import numpy as np

from recgpt_torchrec.config.inputs.events import Events, TargetEvents, parse_target
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.ragged import Float32
from recgpt_torchrec.errors import InputError

ASKED = "asked_event"
"""The feature that tells the event type asked for."""


def add_events(inputs: Inputs, choice: Events, dataset: Dataset) -> Inputs:
    """What a model reads, with the event types that the options choose.

    Raises:
        InputError: the options ask for event types that the dataset lacks.
    """
    words = dataset.manifest.events
    chosen = {"event": choice.input, ASKED: choice.ask}
    for option, value in (("input", choice.input), ("ask", choice.ask)):
        if value is True and not words:
            raise _explain_none(f"--events.{option} true", dataset)
    features = [
        Feature(name=name, values=len(words) + 1)
        for name, value in chosen.items()
        if value is True or (value == "auto" and words)
    ]
    for word in choice.history:
        find_event(dataset, "--events.history", word)
    if not features and not choice.history:
        return inputs
    return replace(
        inputs,
        features=[*inputs.features, *features],
        events=[*words],
        history_events=[word for word in words if word in choice.history],
        ask_dropout=choice.ask_dropout if any(each.name == ASKED for each in features) else 0.0,
    )


def weights_of_targets(choice: TargetEvents, dataset: Dataset) -> Float32 | None:
    """The weight of a target by its event id, [event types + 1] float32; None: all have 1.

    Raises:
        InputError: the options name an event type that the dataset lacks.
    """
    if not choice.targets:
        return None
    weights = np.zeros(len(dataset.manifest.events) + 1, dtype=np.float32)
    for word, weight in map(parse_target, choice.targets):
        weights[find_event(dataset, "--events.targets", word)] = weight
    return weights


def request_for(dataset: Dataset, inputs: Inputs, option: str, word: str | None, ask: bool = True) -> Request:
    """The request for an event type: only users whose held-out item is of that type, who are asked for it.

    Args:
        dataset: whose event types are meant.
        inputs: of the model; one that cannot be asked is not.
        option: that names the type.
        word: the type; None: all users, asked for any.
        ask: whether the model is asked for it.

    Raises:
        InputError: the dataset lacks the event type.
    """
    if word is None:
        return Request()
    event = find_event(dataset, option, word)
    return Request(event=event if ask and inputs.reads(ASKED) else 0, held_out_event=event)


def check_asked(inputs: Inputs, checkpoint: str, option: str, word: str) -> None:
    """Check that the model of a checkpoint can be asked for an event type.

    Raises:
        InputError: it is not told which type is asked for, or was trained before there were events of this type.
    """
    if not inputs.reads(ASKED):
        raise InputError(
            f"{option} {word}: the checkpoint {checkpoint} is not told which event type is asked for; train one with "
            "--events.ask true on a dataset with event types, or leave the option out"
        )
    if word not in inputs.events:
        raise InputError(
            f"{option} {word}: the checkpoint {checkpoint} was trained without events of this type; it knows "
            f"{', '.join(inputs.events)}"
        )


def check_events(inputs: Inputs, checkpoint: str, dataset: Dataset) -> None:
    """Check that a dataset has the event types that the model of a checkpoint reads, with the same ids.

    Types that were added since are unknown to the model.

    Raises:
        InputError: it has none, or others.
    """
    words = dataset.manifest.events
    if not inputs.reads_events or words[: len(inputs.events)] == inputs.events:
        return
    has = f"has {', '.join(words)}" if words else "has none"
    raise InputError(
        f"the checkpoint {checkpoint} reads the event types {', '.join(inputs.events)}, and {dataset.path} {has}. Give "
        "the dataset that it was trained on, or prepare the log with --event_column and --vocabulary of that one"
    )


def find_event(dataset: Dataset, option: str, word: str) -> int:
    """The id of an event type that an option names.

    Raises:
        InputError: the dataset has no such type, or none at all.
    """
    words = dataset.manifest.events
    if not words:
        raise _explain_none(f"{option} {word}", dataset)
    if word not in words:
        raise InputError(f"{option} {word}: {dataset.path} has no such event type; it has {', '.join(words)}")
    return words.index(word) + 1


def _explain_none(option: str, dataset: Dataset) -> InputError:
    return InputError(
        f"{option}: {dataset.path} has no event types; prepare the log with --event_column, or leave it out"
    )
