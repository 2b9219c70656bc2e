"""Answers of several teachers together: an item's score is its mean over their lists (an ensemble that is distilled).

Another list lacks an item that it ranks below its last: the item then counts as much as the last one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Float32, Int64
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.prompts.intervals import Intervals, intervals_of
from recgpt_torchrec.prompts.prompt_dataset import AVERAGED, NOT_COMPARED, RECORD, read_rows
from recgpt_torchrec.storage.finished import check_same, differences

OPTION = f"--{AVERAGED}"


def open_others(paths: Sequence[str], dataset: Dataset, record: dict[str, Any]) -> list[Dataset]:
    """Open the folders of other teachers' answers.

    Args:
        paths: of the folders.
        dataset: that all answers are made on.
        record: how the answers are made that theirs are averaged with.

    Raises:
        InputError: a folder holds no answers, or they are of another dataset or options, or of the same checkpoint; or
            the dataset is a folder of days.
    """
    if paths and dataset.newest is not None:
        raise InputError(
            f"{OPTION} needs a dataset of one piece, and {dataset.path} is a folder of days; prepare the whole log"
        )
    others = []
    made_by = {record["checkpoint_fingerprint"]: "--checkpoint"}
    for path in paths:
        other = Dataset.open(path)
        theirs = other.manifest.settings.get(RECORD, {})
        if not theirs.get("answers") or theirs["k"]:
            raise InputError(f"{OPTION} {path} is no folder of answers alone (generate_prompts --prompts.k 0)")
        if AVERAGED in theirs:
            raise InputError(f"{OPTION} {path} is a mean of several already; give the folders that it was made of")
        differing = differences(theirs, record, (*NOT_COMPARED, "checkpoint_fingerprint"))
        check_same(f"{OPTION} {path}", "folder of answers", differing, "make both with the same options")
        if (earlier := made_by.setdefault(theirs["checkpoint_fingerprint"], path)) != path:
            raise InputError(f"{OPTION} {path} was made by the same checkpoint as {earlier}; leave one out")
        others.append(other)
    return others


def record_others(others: Sequence[Dataset]) -> dict[str, Any]:
    """What the record of the answers says of the others, see `AVERAGED`; nothing where there are none."""
    made_by = [other.manifest.settings[RECORD]["checkpoint_fingerprint"] for other in others]
    return {AVERAGED: made_by} if made_by else {}


class AnswerAverage:
    """Replaces answers by their mean with those that other folders hold.

    Example: `AnswerAverage(dataset, others, max_len).apply(histories, pool)`
    """

    def __init__(self, dataset: Dataset, others: Sequence[Dataset], max_len: int) -> None:
        """
        Args:
            dataset: that all answers were made on.
            others: from `open_others`.
            max_len: maximum number of entries of a history that the models read.

        Raises:
            InputError: a folder has another number of row groups.
        """
        groups = row_groups(dataset)
        self.number = {group: number for number, group in enumerate(groups)}
        self.others = [(other, row_groups(other)) for other in others]
        self.max_len, self.trailing = max_len, bool(dataset.manifest.feedback)
        for other, theirs in self.others:
            if len(theirs) != len(groups):
                raise _differing(other)

    def apply(self, histories: Intervals, pool: Sequence[RowGroup]) -> None:
        """Replace the answers of the histories of some row groups of the dataset.

        Raises:
            InputError: a folder has other users there.
        """
        lists = [(histories.answers, histories.answer_scores)]
        answers = histories.answers.shape[1]
        for other, groups in self.others:
            rows = pa.concat_tables([read_rows(other, groups[self.number[group]]) for group in pool])
            theirs = intervals_of(rows, 0, self.max_len, (), answers, self.trailing)
            if not _are_same(histories, theirs):
                raise _differing(other)
            lists.append((theirs.answers, theirs.answer_scores))
        histories.answers, histories.answer_scores = mean_answers(lists)


def _differing(other: Dataset) -> InputError:
    return InputError(f"{OPTION} {other.path} has other users, or in another order, than the dataset")


def _are_same(first: Intervals, second: Intervals) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("users", "offsets", "items"))


def mean_answers(lists: Sequence[tuple[Int64, Float32]]) -> tuple[Int64, Float32]:
    """The items with the highest mean scores, best first; of equal ones the smaller id.

    Args:
        lists: per teacher [n, answers] int64 items, different ones within a row, -1: none; and [n, answers] float32
            scores.

    Returns:
        [n, answers] int64 items, -1: none; [n, answers] float32 scores, 0 where there is none.
    """
    number = lists[0][0].shape[1]
    lowest = [np.where(ids >= 0, scores, np.inf).min(1, keepdims=True) for ids, scores in lists]
    lowest = [np.where(np.isfinite(each), each, 0).astype(np.float64) for each in lowest]
    ids = np.concatenate([ids for ids, _ in lists], axis=1)
    above = np.concatenate(
        [np.where(ids >= 0, scores - low, 0) for (ids, scores), low in zip(lists, lowest, strict=True)], axis=1
    )
    order = np.argsort(ids, axis=1, kind="stable")
    ids, above = np.take_along_axis(ids, order, 1), np.take_along_axis(above, order, 1)
    is_first = np.ones(ids.shape, dtype=bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    item = np.cumsum(is_first.ravel()) - 1
    total = np.bincount(item, above.ravel())[item].reshape(ids.shape)
    total = np.where(is_first & (ids >= 0), total, -np.inf)
    best = np.argsort(-total, axis=1, kind="stable")[:, :number]  # ids ascend, so of equal ones the smaller
    found, total = np.take_along_axis(ids, best, 1), np.take_along_axis(total, best, 1)
    is_item = np.isfinite(total)
    means = np.where(is_item, np.where(is_item, total, 0) / len(lists) + np.mean(lowest, axis=0), 0)
    return np.where(is_item, found, -1), means.astype(np.float32)
