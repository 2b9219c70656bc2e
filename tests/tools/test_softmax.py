"""The benchmark of the softmax loss runs, and its measure of memory sees what is allocated."""

import mmap
import sys

import pytest

from tools.benchmarks import softmax


def test_it_prints_time_and_memory_of_each_way_beside_the_dense_loss(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "softmax --items 300 --targets 6 --dim 4 --rounds 1 --calls 1".split())
    softmax.main()
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in softmax.WAYS if any(f"300 items  {name}" in line for line in lines)] == list(softmax.WAYS)
    assert "(1.00 of dense)" in lines[1] and len(lines) == 4


def test_the_peak_is_what_was_held_at_most_since_it_was_reset():
    before = softmax.peak_bytes(reset=True)
    with mmap.mmap(-1, 2**26) as block:  # fresh pages, where numpy may get some that a test before has touched
        block[:: mmap.PAGESIZE] = bytes(2**26 // mmap.PAGESIZE)
    grown = softmax.peak_bytes() - before
    assert grown == pytest.approx(2**26, rel=0.1)
    assert softmax.peak_bytes(reset=True) - before < 2**25
