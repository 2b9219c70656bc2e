"""Attributes in the dense part: how ids and attributes are pooled, and what is dropped in training."""

import pytest
import torch

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.model.recgpt import RecGPT
from tests.support import SmallAttribute
from tools.small_run import opened

BAGS, DIM = 20_000, 4


def dense(id_dropout: float = 0.0, user_dropout: float = 0.0) -> Dense:
    return Dense(Model(dim=DIM, user_dropout=user_dropout), Loss(), inputs=Inputs(id_dropout=id_dropout))


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(BAGS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_about_that_share_of_ids_is_left_out_and_every_attribute_stays(share):
    torch.manual_seed(0)
    ids, attributes = drawn(1), drawn(2)
    inputs, outputs = dense(share).train().item_vectors(ids, ids, attributes)
    assert outputs is inputs  # tied: the same mask scores
    dropped = (inputs == attributes).all(1)
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.02)
    torch.testing.assert_close(inputs[~dropped], (ids + attributes)[~dropped], rtol=0, atol=0)


def test_an_output_table_is_dropped_with_the_input_table():
    torch.manual_seed(0)
    ids, own, attributes = drawn(1), drawn(2), drawn(3)
    inputs, outputs = dense(0.3).train().item_vectors(ids, own, attributes)
    dropped = (inputs == attributes).all(1)
    assert 0 < dropped.sum() < BAGS and torch.equal((outputs == attributes).all(1), dropped)
    torch.testing.assert_close(outputs[~dropped], (own + attributes)[~dropped], rtol=0, atol=0)


def test_nothing_is_dropped_in_evaluation_at_zero_or_without_attributes():
    ids, attributes = drawn(1), drawn(2)
    for module in (dense(0.5).eval(), dense(0.0).train()):
        inputs, _ = module.item_vectors(ids, ids, attributes)
        assert torch.equal(inputs, ids + attributes)
    module, before = dense(0.5).train(), torch.get_rng_state()
    inputs, outputs = module.item_vectors(ids, ids, None)
    assert inputs is ids and outputs is ids and torch.equal(torch.get_rng_state(), before)


def test_a_model_has_a_table_of_each_attribute_and_sums_in_it():
    attributes = [SmallAttribute.draw("item", "tags", 30, 7, multiple=True), SmallAttribute.draw("user", "age", 9, 5)]
    inputs, values = opened(attributes, weights=["tags=3"])
    model = RecGPT(Model(dim=8), Loss(), 9, 30, item_keys=2, inputs=inputs, attributes=values)
    configs = {each.name: each for each in model.tables.embedding_bag_configs()}
    assert {name: each.num_embeddings for name, each in configs.items()} == {
        "user": 9,
        "item": 30,
        "item-tags": 7,
        "user-age": 5,
    }
    assert configs["item-tags"].feature_names == ["item-tags_0", "item-tags_1"]
    assert {each.pooling.value for each in configs.values()} == {"SUM"}
    assert [(each.table, each.weight, each.averages) for each in model.pooled] == [
        ("item-tags", 3.0, True),
        ("user-age", 1.0, False),
    ]
