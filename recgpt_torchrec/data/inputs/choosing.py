"""Chooses what a model reads beside ids, and checks that a dataset has what a checkpoint's model reads."""

from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.spec import Attribute, Inputs
from recgpt_torchrec.errors import InputError


def choose_inputs(config: Pretrain, dataset: Dataset) -> Inputs:
    """What the model of a run reads beside ids: by default every attribute that the dataset has."""
    return Inputs(
        attributes=[
            Attribute(entity=each.entity, name=each.name, values=each.values, fingerprint=each.fingerprint)
            for each in dataset.manifest.attributes
        ]
    )


def check_inputs(inputs: Inputs, checkpoint: str, dataset: Dataset) -> None:
    """Check that a dataset has what the model of a checkpoint reads beside ids.

    Raises:
        InputError: an attribute is missing, or its ids mean other values.
    """
    present = {each.table: each for each in dataset.manifest.attributes}
    for each in inputs.attributes:
        found = present.get(each.table)
        if found is None or found.fingerprint != each.fingerprint:
            why = "lacks it" if found is None else "has other values for it"
            raise InputError(
                f"the checkpoint {checkpoint} reads the {each.entity} attribute {each.name}, and {dataset.path} {why}; "
                "give the dataset that it was trained on"
            )
