"""Cached decoding against the decoder's own forward pass over the whole sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from recgpt_torchrec.config import Model
from recgpt_torchrec.data.segments import SEGMENTS
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.prompts.decoding import Decoding

DIM, MAX_LEN = 8, 12
LENGTHS = [7, 1, 12, 4]


def random_decoder(layers: int = 3, feedback: bool = False, **settings: Any) -> Decoder:
    torch.manual_seed(0)
    model = Model(dim=DIM, heads=2, layers=layers, max_len=MAX_LEN, **settings)
    decoder = Decoder(model, SEGMENTS if feedback else 0, feedback=feedback)
    for parameter in decoder.parameters():  # what starts at zero or one would hide mistakes
        torch.nn.init.normal_(parameter, std=0.4)
    return decoder.eval()


def sequences(lengths: list[int]) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Item vectors [length, dim] of each, user vectors [users, dim], positions and segments [length] of each."""
    generator = torch.Generator().manual_seed(1)
    items = [torch.randn(n, DIM, generator=generator) for n in lengths]
    users = torch.randn(len(lengths), DIM, generator=generator)
    positions = [torch.sort(torch.randint(0, MAX_LEN, (n,), generator=generator)).values for n in lengths]
    segments = [torch.randint(0, SEGMENTS, (n,), generator=generator) for n in lengths]
    return items, users, positions, segments


@torch.no_grad()
def full_forward(decoder: Decoder, items: Tensor, user: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    """Compute the [length, dim] outputs of one sequence by the full forward pass."""
    row = torch.zeros(1, len(items), dtype=torch.int64)
    return decoder(items[None], user.expand(1, len(items), -1), positions[None], segments[None], DenseAttention(row))[0]


def feed(
    state: Decoding, t: int, items: list[Tensor], users: Tensor, positions: list[Tensor], segments: list[Tensor]
) -> Tensor:
    """Entry t of every sequence that is still decoded."""
    n = state.users
    now = [torch.stack([sequence[t] for sequence in part[:n]]) for part in (items, positions, segments)]
    return state.step(now[0], users[:n], now[1], now[2])


def padded(parts: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


PAPER = {"activation": "relu", "attention_scale": "dim", "norm_in": False}
"""The decoder's settings in `configs/original.yaml`."""


@pytest.mark.parametrize("history_in", [True, False])
@pytest.mark.parametrize("history_out", [True, False])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("settings", [{}, PAPER, {"output_map": True}])
def test_step_by_step_is_the_full_forward_at_every_position(history_in, history_out, feedback, settings):
    decoder = random_decoder(history_in=history_in, history_out=history_out, feedback=feedback, **settings)
    items, users, positions, segments = sequences([9, 9, 9])
    state = Decoding(decoder, users=3, capacity=9)
    stepped = [feed(state, t, items, users, positions, segments) for t in range(9)]
    for u in range(3):
        expected = full_forward(decoder, items[u], users[u], positions[u], segments[u])
        torch.testing.assert_close(torch.stack(stepped)[:, u], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feedback", [False, True])
def test_users_at_different_numbers_of_entries_do_not_touch_each_other(feedback):
    decoder = random_decoder(feedback=feedback)
    items, users, positions, segments = sequences(LENGTHS)
    state = Decoding(decoder, users=len(LENGTHS), capacity=max(LENGTHS))
    generator = torch.Generator().manual_seed(2)
    done = torch.zeros(len(LENGTHS), dtype=torch.int64)
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    while (done < torch.tensor(LENGTHS)).any():
        active = (torch.rand(len(LENGTHS), generator=generator) < 0.6) & (done < torch.tensor(LENGTHS))
        at = [min(int(d), n - 1) for d, n in zip(done, LENGTHS, strict=True)]
        entry = [torch.stack([s[a] for s, a in zip(part, at, strict=True)]) for part in (items, positions, segments)]
        out = state.step(entry[0], users, entry[1], entry[2], active)
        for u in active.nonzero()[:, 0].tolist():
            outputs[u].append(out[u])
        done += active
    assert state.entries.tolist() == LENGTHS
    for u, expected in enumerate(map(full_forward, [decoder] * 4, items, users, positions, segments)):
        torch.testing.assert_close(torch.stack(outputs[u]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_map", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
def test_a_prefilled_state_continues_like_one_that_was_fed_entry_by_entry(feedback, output_map):
    decoder = random_decoder(feedback=feedback, output_map=output_map)
    items, users, positions, segments = sequences(LENGTHS)
    state = Decoding(decoder, users=len(LENGTHS), capacity=max(LENGTHS) + 2)
    newest = state.prefill(padded(items, 9.0), users, padded(positions, 3), padded(segments, 1), torch.tensor(LENGTHS))
    more, _, more_positions, more_segments = sequences([2] * len(LENGTHS))
    after = [feed(state, t, more, users, more_positions, more_segments) for t in range(2)]
    for u, length in enumerate(LENGTHS):
        expected = full_forward(
            decoder,
            torch.cat([items[u], more[u]]),
            users[u],
            torch.cat([positions[u], more_positions[u]]),
            torch.cat([segments[u], more_segments[u]]),
        )[length - 1 :]
        found = torch.stack([newest[u], after[0][u], after[1][u]])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_user_without_entries_can_be_prefilled_beside_others():
    decoder = random_decoder()
    items, users, positions, segments = sequences([3, 3])
    state = Decoding(decoder, users=2, capacity=4)
    grid = [torch.stack(part) for part in (items, positions, segments)]
    state.prefill(grid[0], users, grid[1], grid[2], torch.tensor([0, 3]))
    out = state.step(grid[0][:, 0], users, grid[1][:, 0], grid[2][:, 0])
    expected = full_forward(decoder, items[0][:1], users[0], positions[0][:1], segments[0][:1])
    torch.testing.assert_close(out[:1], expected, rtol=1e-4, atol=1e-5)


def test_going_on_with_the_first_users_changes_nothing_for_them():
    decoder = random_decoder()
    items, users, positions, segments = sequences([4, 4, 4])
    state = Decoding(decoder, users=3, capacity=4)
    for t in range(4):
        if t == 2:
            state.keep(2)
        out = feed(state, t, items, users, positions, segments)
    for u in range(2):
        torch.testing.assert_close(
            out[u], full_forward(decoder, items[u], users[u], positions[u], segments[u])[-1], rtol=1e-4, atol=1e-5
        )


def test_a_decoder_in_training_is_refused():
    with pytest.raises(AssertionError, match="evaluation mode"):
        Decoding(random_decoder().train(), users=1, capacity=1)
