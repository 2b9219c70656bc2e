"""The encoder's tensors against what the stages compute: packed batches, numpy features, and growing histories."""

from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.data.histories import Histories
from recgpt_torchrec.data.inputs import times
from recgpt_torchrec.data.inputs.places import PLACE_VALUES
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.packed import Capacity, pack_histories
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.retrieval.interests import append_generated
from recgpt_torchrec.serving.exported.encoder import FullEncoder, StepEncoder, Tower, names_of_columns, names_of_request

ITEMS, USERS, MAX_LEN, DIM = 40, 6, 10, 8
VALUES = {**times.VALUES, "event": 4, "asked_event": 4, "place": PLACE_VALUES}
FEATURES = [Feature(name=name, values=values) for name, values in VALUES.items()]
TIMED = Inputs(features=FEATURES, events=["view", "buy", "like"], time_unit=1e-3, utc_offset_hours=5.5)
MODELS = {
    "plain": (Inputs(), False),
    "tuned": (Inputs(segments=5), True),
    "feedback": (Inputs(segments=5, feedback=True), True),
    "features": (
        Inputs(features=FEATURES, events=["view", "buy", "like"], time_unit=1e-3, utc_offset_hours=5.5),
        False,
    ),
    "all": (
        Inputs(
            features=FEATURES,
            events=["view", "buy", "like"],
            history_events=["view", "like"],
            segments=5,
            feedback=True,
            time_unit=60.0,
        ),
        True,
    ),
}
"""What a model reads, and whether it reads prompts."""


def histories_of(lengths: list[int], inputs: Inputs, prompts: bool, seed: int) -> dict[str, np.ndarray]:
    """Arguments of an encoder for padded histories; what lies behind the end is noise."""
    rng = np.random.default_rng(seed)
    rows, room = len(lengths), max(*lengths, 1)
    steps = rng.exponential(rng.choice([1e3, 1e7], (rows, room)))
    columns = {
        "segments": rng.choice([0, 0, 0, 1, 2, 3, 4], (rows, room)),
        "times": (1.6e9 * 1e3 + steps.cumsum(1)).astype(np.int64),
        "events": rng.integers(0, 5, (rows, room)),  # 4 came after the model was trained
        "places": rng.integers(0, 200, (rows, room)),
        "request_times": np.full(rows, int(1.6e9 * 1e3 + 1e9)),
        "asked_events": rng.integers(0, 4, rows),
    }
    names = [*names_of_columns(inputs, prompts), *names_of_request(inputs)]
    users = rng.integers(-1, USERS, rows)
    given = {"items": rng.integers(0, ITEMS, (rows, room)), "lengths": np.array(lengths), "users": users}
    return given | {name: columns[name] for name in names}


def plain_vectors(
    dense: Dense,
    arguments: dict[str, np.ndarray],
    row: int,
    inputs: Inputs,
    tables: dict[str, torch.Tensor],
    interests: int,
) -> np.ndarray:
    """[interests, dim] of one history, as the stages compute it: read, cut, packed, decoded; appended to and again."""
    length = int(arguments["lengths"][row])
    entries: dict[str, Any] = {name: values[row, :length] for name, values in arguments.items() if values.ndim == 2}
    segments = entries.get("segments", np.zeros(length, np.int64))
    seen = {int(item) for item in entries["items"][segments == 0]}
    if inputs.history_events:
        allowed = [inputs.id_of_event(word) for word in inputs.history_events]
        kept = np.isin(entries["events"], allowed) | (segments != 0)
        entries, segments = {name: values[kept] for name, values in entries.items()}, segments[kept]
    if "events" in entries:
        entries["events"] = np.where(entries["events"] <= len(inputs.events), entries["events"], 0)
    if not entries["items"].size:
        return np.zeros((interests, DIM), np.float32)
    entries = {name: values[-MAX_LEN:] for name, values in entries.items()}
    user = max(int(arguments["users"][row]), 0)
    of_request: dict[str, Any] = {
        name: arguments[name][[row]] if name in arguments else None for name in ("request_times", "asked_events")
    }
    grown = Histories(
        users=np.array([user]),
        items=entries["items"],
        offsets=np.array([0, entries["items"].size]),
        segments=entries["segments"].astype(np.int8) if "segments" in entries else None,
        times=entries.get("times"),
        events=entries.get("events"),
        places=entries.get("places"),
        **of_request,
    )
    vectors = []
    while True:
        capacity = Capacity.of(1, ITEMS, 4)
        batch, ids = pack_histories(
            grown, row_length=64, capacity=capacity, predict=False, max_position=MAX_LEN - 1, inputs=inputs
        )
        users = tables["users"][ids.users] * (arguments["users"][row] >= 0)
        vectors.append(
            dense.decode(
                users,
                tables["inputs"][ids.items],
                batch.item_bag,
                batch.user_bag,
                batch.position,
                batch.segment,
                batch.sequence,
                batch.target_slot,
                batch.last_slot,
                batch.cu_seqlens,
                batch.max_seqlen,
                batch.features,
            )[1][0]
        )
        if len(vectors) == interests:
            return torch.stack(vectors).numpy()
        scores = tables["outputs"] @ vectors[-1]
        new = [item for item in torch.argsort(-scores, stable=True).tolist() if item not in seen]
        seen.add(new[0] if new else 0)
        grown = append_generated(grown, np.array([new[0] if new else 0]), MAX_LEN)


def random_model(name: str) -> tuple[Dense, Tower, dict[str, torch.Tensor]]:
    """The dense part of a model with random weights, its tower, and tables of users and items."""
    torch.manual_seed(3)
    inputs, prompts = MODELS[name]
    dense = Dense(Model(dim=DIM, layers=2, heads=2, max_len=MAX_LEN), Loss(), prompts, inputs).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tables = {
        "users": torch.randn(USERS, DIM),
        "inputs": torch.randn(ITEMS, DIM),
        "outputs": torch.randn(ITEMS, DIM),
    }
    return dense, Tower(dense.decoder, inputs, prompts), tables


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_vectors_are_those_of_the_stages_for_any_length_and_what_a_model_reads(name):
    dense, tower, tables = random_model(name)
    inputs, prompts = MODELS[name]
    encoder = FullEncoder(tower, tables["inputs"], tables["outputs"], tables["users"], 4)
    alone = StepEncoder(tower)
    rng = np.random.default_rng(1)
    drawn = [int(length) for length in rng.integers(0, 25, 6)]
    for seed, lengths in enumerate(([1], [0], [MAX_LEN], [MAX_LEN + 1], [0, 1, 7, 9, 10, 11, 38], drawn)):
        arguments = histories_of(lengths, inputs, prompts, seed)
        given = {name: torch.from_numpy(values) for name, values in arguments.items()}
        expected = np.stack([plain_vectors(dense, arguments, row, inputs, tables, 4) for row in range(len(lengths))])
        np.testing.assert_allclose(encoder(**given).numpy(), expected, atol=1e-5)
        looked_up = {name: value for name, value in given.items() if name not in ("items", "users")}
        looked_up["item_vectors"] = tables["inputs"][given["items"]]
        users = given["users"]
        looked_up["user_vectors"] = tables["users"][users.clamp(min=0)] * (users >= 0)[:, None]
        np.testing.assert_allclose(alone(**looked_up).numpy(), expected[:, 0], atol=1e-5)


@torch.no_grad()
def test_with_every_item_seen_item_0_is_appended():
    dense, tower, tables = random_model("plain")
    encoder = FullEncoder(tower, tables["inputs"], None, tables["users"], 3)
    arguments = {"items": np.arange(ITEMS)[None], "lengths": np.array([ITEMS]), "users": np.array([2])}
    found = encoder(**{name: torch.from_numpy(values) for name, values in arguments.items()})
    expected = plain_vectors(dense, arguments, 0, Inputs(), {**tables, "outputs": tables["inputs"]}, 3)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
