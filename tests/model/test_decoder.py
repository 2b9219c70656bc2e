"""What every decoder of packed sequences must hold to, however it is built: no look ahead, no look aside."""

import inspect
import math

import pytest
import torch

from recgpt_torchrec.config import Model
from recgpt_torchrec.data.packing import pack_sequences
from recgpt_torchrec.data.ragged import ragged_arange
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.dropout import draw_scales

LENGTHS = [5, 2, 7, 1, 3]
DIM = 8
ROW = 8


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(Model(dim=DIM, heads=2, layers=2, max_len=ROW, dropout=0.5, attention_dropout=0.5))
    for parameter in made.parameters():  # what starts at zero or one would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def histories(lengths: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(item vectors [length, dim], user vector [dim]) of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, DIM, generator=generator), torch.randn(DIM, generator=generator)) for n in lengths]


@torch.no_grad()
def run(
    decoder: Decoder, sequences: list[tuple[torch.Tensor, torch.Tensor]], row_length: int = ROW
) -> list[torch.Tensor]:
    """Pack, decode, and take each sequence's outputs [length, dim] off the grid again."""
    lengths = torch.tensor([len(items) for items, _ in sequences])
    grid = pack_sequences(lengths.numpy(), row_length)
    slots, shape = torch.from_numpy(grid.slots), (grid.rows, row_length)

    def on_grid(values: torch.Tensor, empty: float) -> torch.Tensor:
        out = torch.full((grid.rows * row_length, *values.shape[1:]), empty, dtype=values.dtype)
        out[slots] = values
        return out.view(*shape, *values.shape[1:])

    out = decoder(
        on_grid(torch.cat([items for items, _ in sequences]), 0.7),  # empty slots hold something, as in a batch
        on_grid(torch.cat([user.expand(len(items), -1) for items, user in sequences]), 0.7),
        on_grid(torch.from_numpy(ragged_arange(lengths.numpy())), 0),
        on_grid(torch.zeros(int(lengths.sum()), dtype=torch.int64), 0),
        DenseAttention(on_grid(torch.repeat_interleave(torch.arange(len(lengths)), lengths), -1)),
    )
    assert torch.isfinite(out).all()
    return list(out.flatten(0, 1)[slots].split(lengths.tolist()))


def test_a_sequence_comes_out_the_same_alone_and_packed_beside_others(decoder):
    sequences = histories(LENGTHS)
    together = run(decoder, sequences)
    for sequence, packed in zip(sequences, together, strict=True):
        (alone,) = run(decoder, [sequence])
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        (in_a_longer_row,) = run(decoder, [sequence], row_length=12)
        torch.testing.assert_close(packed, in_a_longer_row, rtol=1e-4, atol=1e-5)


def test_changing_an_item_changes_the_outputs_from_there_on_and_none_before_or_beside(decoder):
    sequences = histories(LENGTHS)
    before = run(decoder, sequences)
    for changed in range(LENGTHS[2]):
        other = [(items.clone(), user) for items, user in sequences]
        other[2][0][changed] *= -1.0
        after = run(decoder, other)
        for s in range(len(LENGTHS)):
            first = changed if s == 2 else LENGTHS[s]
            torch.testing.assert_close(after[s][:first], before[s][:first], rtol=0, atol=1e-6)
        assert (after[2][changed:] - before[2][changed:]).abs().amax(1).min() > 1e-4


def test_user_and_order_matter(decoder):
    ((items, user),) = histories([4])
    (before,) = run(decoder, [(items, user)])
    (other_user,) = run(decoder, [(items, -user)])
    (other_order,) = run(decoder, [(items[[1, 0, 2, 3]], user)])
    assert (other_user - before).abs().max() > 1e-4
    assert (other_order[-1] - before[-1]).abs().max() > 1e-4


def test_a_slot_sees_the_slots_of_its_sequence_up_to_itself():
    sequence = torch.tensor([[0, 0, 1, 1, 1, -1], [2, -1, -1, -1, -1, -1]])
    dense = DenseAttention(sequence)
    for row in range(2):
        for q in range(6):
            for k in range(6):
                sees = k <= q and bool(sequence[row, q] == sequence[row, k])
                assert dense.visible[row, q, k] == sees
                assert (dense.bias[row, 0, q, k] == 0) == sees
    assert dense.visible.any(-1).all(), "a row without any key makes NaN"


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, scales: torch.Tensor):
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) * scales) @ v


@pytest.mark.parametrize("dropout_p", [0.0, 1e-4, 0.4])  # 1e-4 is under the smallest step of 1/256: drops nothing
def test_attention_is_the_plain_formula_in_value_and_gradients(dropout_p):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator).requires_grad_() for _ in range(3))
    dense = DenseAttention(torch.tensor([[0, 0, 1, 1, 1, -1], [2, 2, 2, -1, -1, -1]]))
    torch.manual_seed(5)
    ours = dense.attend(q, k, v, dropout_p)
    torch.manual_seed(5)
    scales = draw_scales(torch.ones(2, 3, 6, 6), dropout_p)
    reference = plain_attention(q, k, v, dense.visible[:, None] > 0, scales)
    torch.testing.assert_close(ours, reference)
    weights = torch.randn(ours.shape, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), (q, k, v)),
        torch.autograd.grad((reference * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("decay", [None, 0.0, 0.7])
def test_the_mean_of_a_history_is_that_of_a_loop(decay):
    sequence = torch.tensor([[0, 0, 1, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    values = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    means = DenseAttention(sequence).mean(values, None if decay is None else torch.tensor(decay))
    for row in range(2):
        for slot in range(6):
            earlier = [k for k in range(slot + 1) if sequence[row, k] == sequence[row, slot]]
            weights = torch.tensor([math.exp(-(decay or 0.0) * (slot - k)) for k in earlier])
            expected = (weights[:, None] * values[row, earlier]).sum(0) / weights.sum()
            torch.testing.assert_close(means[row, slot], expected)


def test_dropout_works_in_training_only(decoder):
    sequences = histories(LENGTHS)
    once, again = torch.cat(run(decoder, sequences)), torch.cat(run(decoder, sequences))
    assert torch.equal(once, again)
    decoder.train()
    try:
        dropped = torch.cat(run(decoder, sequences))
    finally:
        decoder.eval()
    assert (dropped - once).abs().max() > 1e-3


def test_the_decoder_is_called_as_the_model_calls_it():
    names = list(inspect.signature(Decoder.forward).parameters)
    assert names[1:6] == ["items", "users", "position", "segment", "attention"]
