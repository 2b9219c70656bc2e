"""Chooses a sample of the users with a held-out item, by a seed: the same on any number of ranks.

Row groups are chosen by the seed, then the users in them whose hashes are smallest. Their number is found by reading
these row groups once, each on one rank; what is kept are their smallest hashes, at most as many as the sample has.
"""

import math

import numpy as np
import torch
import torch.distributed as dist

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.packed import IDS_ALONE
from recgpt_torchrec.data.reading.damage import SetAside
from recgpt_torchrec.data.reading.hashing import Hashes, hash_numbers
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.stream import ANY
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.distributed import watchdog
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import log_message, rank, world_size
from recgpt_torchrec.errors import InputError

GROUPS = 64
"""Minimum number of row groups that a sample is drawn from: neighbours in the dataset may be alike. A small dataset has
so many in all (`preparation.pipeline.group_size`), so that every user is as likely as any other."""
MARGIN = 1.25
"""How many times as many users as asked for are expected in the first row groups that are read."""


def check_sample(option: str, users: int, dataset: Dataset, split: SplitName) -> None:
    """Check that a sample is not larger than the number of users to draw from, as far as the manifest tells.

    Args:
        option: its name on the command line.
        users: number of users wanted; 0: all.
        dataset: opened.
        split: `validation` or `test`.

    Raises:
        InputError: fewer users have an item of the split.
    """
    count = dataset.manifest.count_targets(split)
    if count is not None and users > count:
        raise InputError(
            f"{option} is {users:,}, but {count:,} users of {dataset.path} have a {split} item. Give at most so many, "
            "or 0 for all of them"
        )


def choose_users(
    dataset: Dataset,
    split: SplitName,
    users: int,
    seed: int,
    set_aside: SetAside | None = None,
    inputs: Inputs = IDS_ALONE,
    request: Request = ANY,
) -> UserSample | None:
    """Choose a sample of the users with a held-out item (collective).

    Args:
        dataset: opened.
        split: `validation` or `test`.
        users: number of users wanted; 0: all.
        seed: of the sample.
        set_aside: where damaged rows are listed; None: the first one is an error.
        inputs: of the model, which may read no history of some users.
        request: which users are read.

    Returns:
        The sample, of exactly `users` users; None: all users, because no sample is wanted or there are no more.

    Raises:
        InputError: a row is damaged, and not set aside.
    """
    # Of these alone: a sample needs no features.
    inputs = Inputs(events=inputs.events, history_events=inputs.history_events)
    all_are_read = not (request.held_out_event or inputs.history_events)
    count = dataset.manifest.count_targets(split) if all_are_read else None
    if not users or (count is not None and users >= count):
        return None
    groups = row_groups(dataset)
    order = np.random.default_rng((seed, 4)).permutation(len(groups)).tolist()
    rows = sum(group.rows for group in groups)
    mean = (rows if count is None else min(count, rows)) / len(groups)
    reader = HistoryReader(dataset=dataset, split=split, max_len=1, set_aside=set_aside, inputs=inputs, request=request)
    hashes: Hashes = np.zeros(0, dtype=np.uint64)
    read, stop, found, total = 0, max(GROUPS, math.ceil(MARGIN * users / max(mean, 1e-9))), 0, 0
    while total < users and read < len(order):
        error = None
        try:
            for number in order[read:stop][rank() :: world_size()]:
                with watchdog.phase("choosing a sample of users"):
                    own = reader.read([groups[number]]).users
                found += own.size
                hashes = np.sort(np.concatenate([hashes, hash_numbers(own, seed)]))[:users]
        except Exception as caught:  # raised here, it would leave the other ranks waiting for this one
            error = caught
        raise_first_error(error)
        read, stop, total = min(stop, len(order)), 2 * stop, _sum(found)
    if read == len(order) and total <= users:
        if total < users:
            log_message(f"Sample: {total:,} users have a {split} item, fewer than {users:,}; all of them are taken")
        return None
    # Ranks agree on the largest hash by bisection, so that no rank holds those of the others.
    low, high = 0, 2**64 - 1
    while low < high:
        middle = (low + high) // 2
        if _sum(int(np.searchsorted(hashes, np.uint64(middle), side="right"))) < users:
            low = middle + 1
        else:
            high = middle
    return UserSample(tuple(groups[number] for number in sorted(order[:read])), seed, low)


def _sum(number: int) -> int:
    """The sum of a number over all ranks (collective)."""
    if world_size() == 1:
        return number
    total = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)
