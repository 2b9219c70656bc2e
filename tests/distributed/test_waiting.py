"""The rank that the others wait for is named, and no other."""

import time
from typing import Any

import torch
import torch.distributed as dist

from recgpt_torchrec.distributed.group import waiting
from recgpt_torchrec.distributed.group.waiting import WaitWatch
from recgpt_torchrec.distributed.processes import run_on_first_rank
from tools.ranks import run_ranks


def beats(clock: float, *waited: float) -> dict[int, dict[str, Any]]:
    return {rank: {"clock": clock, "waited": each, "host": f"node{rank}"} for rank, each in enumerate(waited)}


def test_the_rank_that_waits_least_is_named_once_and_again_after_another():
    watch = WaitWatch()
    assert watch.name_slowest(beats(0, 0, 0, 0)) is None and watch.summarize() is None
    assert watch.name_slowest(beats(5, 4, 0, 4)) is None  # too short a time
    named = watch.name_slowest(beats(20, 10, 1, 12))
    assert named == ("rank 1 (node1) is the slowest: the others waited 55% of the last 20 s for other ranks, it 5%")
    assert watch.name_slowest(beats(40, 20, 2, 24)) is None  # still it
    slowest = "rank 1 (node1) was the slowest in 2 of 2 periods compared: the others waited "
    assert watch.summarize() == slowest + "55% of the time for other ranks, it 5%"
    assert (watch.name_slowest(beats(60, 20, 12, 34)) or "").startswith("rank 0 (node0) is the slowest")
    assert watch.name_slowest(beats(80, 30, 22, 44)) is None  # all wait alike, as for the network
    assert (watch.name_slowest(beats(100, 30, 32, 54)) or "").startswith("rank 0 (node0) is the slowest")
    assert watch.summarize() is None  # rank 0 and 1 in 2 of 5 each


def work_unevenly(rank: int, world_size: int) -> tuple[float, float]:
    """How long this rank waited in 10 steps, of which rank 1 works 50 ms, and while rank 0 works for all."""
    waiting.count_waits()
    waiting.count_waits()  # counts once
    dist.barrier()
    before = waiting.waited_seconds()
    for _ in range(10):
        time.sleep(0.05 * rank)
        dist.all_reduce(torch.zeros(1))
    in_steps = waiting.waited_seconds() - before
    run_on_first_rank(lambda: time.sleep(0.3))
    return in_steps, waiting.waited_seconds() - before - in_steps


def test_waits_are_those_for_a_slower_rank_and_not_those_for_what_rank_0_does_for_all():
    (first, first_after), (second, second_after) = run_ranks(work_unevenly, 2)
    assert 0.45 < first < 2 and second < first - 0.3
    assert first_after < 0.1 and second_after < 0.1
