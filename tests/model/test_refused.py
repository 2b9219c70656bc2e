"""Means over some slots against a plain loop, and what a decoder that reads feedback apart makes of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recgpt_torchrec.config import Model
from recgpt_torchrec.data.segments import DISLIKED, EXPOSED, SEGMENTS
from recgpt_torchrec.model import segmented
from recgpt_torchrec.model.attention import LEAST_WEIGHT, DenseAttention, Weighting
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.segmented import BLOCK, weighted_mean


def by_loop(x: Tensor, lengths: list[int], weighting: Weighting, decay: float | None) -> Tensor:
    """The mean at each token in float64: [tokens, dim]."""
    weight, clock = weighting.weight[0].double(), weighting.clock[0].double()
    starts = [
        start
        for n, start in zip(lengths, [sum(lengths[:i]) for i in range(len(lengths))], strict=True)
        for _ in range(n)
    ]
    outputs = []
    for t, start in enumerate(starts):
        each = weight[start : t + 1] * torch.exp(-(decay or 0.0) * (clock[t] - clock[start : t + 1]))
        outputs.append((each @ x[start : t + 1].double()) / max(float(each.sum()) + weighting.prior, LEAST_WEIGHT))
    return torch.stack(outputs)


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=5),
    st.sampled_from([None, 0.0, 0.3, 5.0]),
    st.sampled_from([1, 3, 16, BLOCK]),
    st.integers(0, 3),
)
def test_means_over_some_slots_are_those_of_a_plain_loop(lengths, decay, block, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    x = torch.randn(tokens, 3, generator=generator)
    chosen = (torch.rand(1, tokens, generator=generator) < 0.6).float()
    position = torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int32)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    rate = None if decay is None else torch.tensor(decay)
    for weighting in (Weighting(chosen, chosen.cumsum(-1)), Weighting(1 - chosen, chosen.cumsum(-1), 1.0)):
        expected = by_loop(x, lengths, weighting, decay)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segmented, "BLOCK", block)
            ours = weighted_mean(x, position, rate, max(lengths), weighting)
        grid = DenseAttention(sequence).mean(x[None], rate, weighting)[0]
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid.double(), expected, rtol=1e-4, atol=1e-5)


def run(decoder: Decoder, items: Tensor, segments: list[int]) -> Tensor:
    """[length, dim] outputs of one sequence without a user."""
    row, positions = torch.zeros(1, len(segments), dtype=torch.int64), torch.arange(len(segments))[None]
    with torch.no_grad():
        return decoder(
            items[None], torch.zeros_like(items)[None], positions, torch.tensor([segments]), DenseAttention(row)
        )[0]


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(Model(dim=8, heads=2, layers=1, max_len=8), SEGMENTS, feedback=True).eval()


def test_at_first_it_does_not_matter_which_item_was_refused(decoder):
    items, others = torch.randn(4, 8), torch.randn(4, 8)
    others[[0, 2]] = items[[0, 2]]
    segments = [0, EXPOSED, 0, DISLIKED]
    torch.testing.assert_close(run(decoder, items, segments), run(decoder, others, segments))


def test_histories_without_feedback_are_as_in_a_decoder_that_knows_none(decoder):
    plain = Decoder(decoder.config, 3).eval()
    plain.load_state_dict(
        {
            name: value[:3] if name == "segment.weight" else value
            for name, value in decoder.state_dict().items()
            if "refused" not in name
        }
    )
    items = torch.randn(5, 8)
    torch.testing.assert_close(run(decoder, items, [0, 1, 0, 1, 0]), run(plain, items, [0, 1, 0, 1, 0]))


def test_a_factor_counts_for_its_kind_of_feedback_alone(decoder):
    items = torch.randn(3, 8)
    assert decoder.refused is not None
    before = {kind: run(decoder, items, [0, kind, kind]) for kind in (EXPOSED, DISLIKED)}
    with torch.no_grad():
        decoder.refused.at_output[1, DISLIKED - EXPOSED] = -1 / decoder.refused.STEP_OUT
    torch.testing.assert_close(run(decoder, items, [0, EXPOSED, EXPOSED]), before[EXPOSED])
    changed = run(decoder, items, [0, DISLIKED, DISLIKED])
    torch.testing.assert_close(changed[2], before[DISLIKED][2] - (items[1] + items[2]) / (2 + decoder.refused.PRIOR))
