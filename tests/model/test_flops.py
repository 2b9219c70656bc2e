"""The formulas of a step's operations against those that torch counts in one; the table of peaks."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.model.flops import attended_pairs, step_flops
from recgpt_torchrec.model.peaks import measured_peak, rated_peak


@pytest.mark.parametrize(("layers", "dim", "feed_forward"), [(1, 8, 4), (3, 16, 2)])
def test_decoder_and_attention_are_what_torch_counts_where_every_pair_is_computed(layers, dim, feed_forward):
    model = Model(
        layers=layers, dim=dim, feed_forward=feed_forward, heads=2, max_len=6, history_in=False, history_out=False
    )
    decoder, rows, length = Decoder(model).train(), 5, 6
    items, users = (torch.randn(rows, length, dim, requires_grad=True) for _ in range(2))
    position, zeros = torch.arange(length).expand(rows, length), torch.zeros(rows, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        decoder(items, users, position, zeros, DenseAttention(zeros)).sum().backward()
    flops = step_flops(model, Loss(), tokens=rows * length, targets=0, candidates=0, attended=rows * length**2)
    assert flops.loss == 0
    assert flops.decoder + flops.attention == flops.total == counted.get_total_flops()


@pytest.mark.parametrize("name", ["history_in", "output_map"])
def test_the_linear_maps_of_the_history_mean_and_of_the_output_count_as_linear_layers(name):
    with_map, without = (replace(Model(), **{name: value}) for value in (True, False))  # type: ignore[arg-type]
    sizes = {"tokens": 30, "targets": 0, "candidates": 0, "attended": 0}
    layer, x = torch.nn.Linear(64, 64, bias=False), torch.randn(30, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        layer(x).sum().backward()
    more = step_flops(with_map, Loss(), **sizes).total - step_flops(without, Loss(), **sizes).total
    assert more == counted.get_total_flops()


def test_the_loss_is_a_product_and_its_two_gradients():
    h, vectors = torch.randn(20, 64, requires_grad=True), torch.randn(50, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        F.cross_entropy(h @ vectors.t(), torch.zeros(20, dtype=torch.int64)).backward()
    sizes = {"tokens": 0, "targets": 20, "attended": 0}
    assert step_flops(Model(), Loss(), candidates=50, **sizes).loss == counted.get_total_flops()
    bce = step_flops(Model(), Loss(candidates="bce", bce_negatives=2), candidates=50, **sizes)
    assert bce.loss * 25 == counted.get_total_flops()


def test_a_token_attends_to_itself_and_those_before_it():
    assert attended_pairs([]) == 0
    assert attended_pairs([1, 3]) == 1 + (1 + 2 + 3)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "tf32", 494e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("Tesla T4", "bf16", None),
        ("Another Device", "fp32", None),
    ],
)
def test_rated_peaks_by_the_name_that_cuda_gives(name, precision, expected):
    assert rated_peak(name, precision) == expected


def test_the_measured_peak_is_the_rate_of_a_product():
    rates = [measured_peak(torch.device("cpu"), "fp32", size=128, seconds=0.01) for _ in range(2)]
    assert all(1e8 < rate < 1e14 for rate in rates)
