"""The segment embedding of models tuned before dislikes and skips were told apart, and after."""

import pytest

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.model.dense import Dense


@pytest.mark.parametrize(("inputs", "rows"), [(Inputs(), 3), (Inputs(segments=5, feedback=True), 5)])
def test_the_record_of_a_checkpoint_decides_its_rows(inputs: Inputs, rows: int) -> None:
    names = Dense(Model(dim=8), Loss(), True, inputs).state_dict()
    assert names["decoder.segment.weight"].shape == (rows, 8)
    assert ("decoder.refused.at_output" in names) == inputs.feedback
    plain = Dense(Model(dim=8), Loss(), False, inputs).state_dict()
    assert not [name for name in plain if "segment" in name or "refused" in name]


def test_a_model_of_ids_alone_records_nothing() -> None:
    assert Inputs().to_json() == {} and Inputs(segments=5).to_json() == {"segments": 5}
