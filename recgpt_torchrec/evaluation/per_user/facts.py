"""What is known of every ranked user whatever the model: held-out item, length of the history, popularity, item age.

The row groups are dealt to ranks. Counts and first times of items are held by id range, as everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from recgpt_torchrec.catalogue.exchange import send, sort_by_rank
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.histories import Histories, no_histories
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Feature, Inputs
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import log_message, rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.holders import ask_holders
from recgpt_torchrec.evaluation.per_user.recording import FACTS, UserRecorder

WHOLE = 2**40
"""Longer than any history."""
TIMED = [Feature(name="past_gap", values=1)]
"""Features that make a reader read timestamps."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Reads what is known of the ranked users of a split.

    Example: `Facts(dataset=dataset, split="test").record(recorder)`
    """

    dataset: Dataset
    split: SplitName
    inputs: Inputs = field(default_factory=Inputs)
    """Of the model: users of whom it reads no history are left out."""
    request: Request = Request()
    """Which users are ranked."""
    sample: UserSample | None = None
    """Users to rank for; None: all."""

    def record(self, recorder: UserRecorder) -> bool:
        """Add the facts of all users (collective); returns whether the items' ages are among them.

        Raises:
            InputError: the dataset cannot be read.
        """
        groups = row_groups(self.dataset)  # also finds the columns
        error, counts = None, np.zeros(0, np.int64)
        try:
            counts = read_counts(self.dataset, *self._own_items)
        except Exception as caught:  # raised here, it would leave the other ranks waiting for this one
            error = caught
        raise_first_error(error)
        first_times = None
        if "timestamps" in self.dataset.columns and self.sample is None:  # else all of the log for some users
            try:
                first_times = self.read_first_times(groups)
            except InputError as error:
                log_message(f"The ages of items are left out: {error}")
        self._add(recorder, counts, first_times)
        return first_times is not None

    @property
    def _own_items(self) -> tuple[int, int]:
        return id_range(self.dataset.manifest.items, rank(), world_size())

    def read_first_times(self, groups: list[RowGroup]) -> Int64:
        """[own items] int64 time of the first interaction with each item of this rank's id range (collective).

        Raises:
            InputError: a row is damaged, or its times are not in order.
        """
        first, stop = self._own_items
        times = np.full(stop - first, np.iinfo(np.int64).max)
        starts = [id_range(self.dataset.manifest.items, each, world_size())[1] for each in range(world_size())]
        reader = HistoryReader(dataset=self.dataset, split="all", max_len=WHOLE, inputs=Inputs(features=TIMED))
        for histories in self._rounds(reader, groups):
            assert histories.times is not None
            order = np.lexsort((histories.times, histories.items))
            items, places = np.unique(histories.items[order], return_index=True)
            pairs = np.stack([items, histories.times[order][places]], axis=1)
            if world_size() > 1:
                order, sent = sort_by_rank(np.searchsorted(starts, items, side="right"))
                pairs = send(torch.from_numpy(pairs[order]), sent)[0].numpy()
            np.minimum.at(times, pairs[:, 0] - first, pairs[:, 1])
        return times

    def _add(self, recorder: UserRecorder, counts: Int64, first_times: Int64 | None) -> None:
        items = self.dataset.manifest.items
        of_events = Inputs(events=self.inputs.events, history_events=self.inputs.history_events)
        timed = of_events if first_times is None else replace(of_events, features=TIMED)
        reader = HistoryReader(
            dataset=self.dataset,
            split=self.split,
            max_len=1,
            inputs=timed,
            request=replace(self.request, event=0, time=None),
            sample=self.sample,
        )
        groups = row_groups(self.dataset) if self.sample is None else list(self.sample.groups)
        for histories in self._rounds(reader, groups):
            assert histories.held_out is not None and histories.seen is not None
            columns = {"item_id": histories.held_out.astype(np.int64), "history_length": histories.seen.lengths}
            columns["train_count"] = ask_holders(columns["item_id"], counts, items)
            if first_times is not None:
                assert histories.request_times is not None
                since = ask_holders(columns["item_id"], first_times, items)
                columns["item_age"] = histories.request_times - since
            recorder.add(FACTS, histories.users, columns)

    def _rounds(self, reader: HistoryReader, groups: list[RowGroup]) -> Iterator[Histories]:
        """Yield this rank's histories of one row group after the other, on every rank equally often (collective).

        Raises:
            InputError: a row is damaged; on every rank.
        """
        for start in range(0, len(groups), world_size()):
            histories, error = no_histories(reader.inputs), None
            try:
                if start + rank() < len(groups):
                    histories = reader.read([groups[start + rank()]])
                elif reader.inputs.features:
                    histories = replace(histories, request_times=np.zeros(0, np.int64))
            except Exception as caught:  # raised here, it would leave the other ranks waiting for this one
                error = caught
            raise_first_error(error)
            yield histories
