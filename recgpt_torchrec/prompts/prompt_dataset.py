"""A dataset with prompts between the items of its histories: read, filled and written row group by row group.

Every process takes a stretch of the row groups, so the order of the users stays; a pool of a few row groups is held at
a time. The folder is committed whole, its manifest last, with the record of how the prompts were made in its settings.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs
import torch
from torch import Tensor, nn

from recgpt_torchrec.config import Prompts
from recgpt_torchrec.data.bags import USER, bags_of
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reader import read_group
from recgpt_torchrec.data.segments import EXPOSED, GENERATED
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank, run_on_first_rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.prompts.prompting import (
    Int64,
    Intervals,
    intervals_of,
    known_intervals,
    table_of,
)
from recgpt_torchrec.storage import filesystem, folders
from recgpt_torchrec.storage.finished import check_same, differences, find_finished
from recgpt_torchrec.storage.parts import Part, write_parts

NAME = "prompt dataset"
"""What is written, for messages."""
RECORD = "prompts"
"""Where the settings of a manifest say how its prompts were made."""
NOT_COMPARED = ("dataset", "checkpoint")
"""Entries of the record that name places; the fingerprints beside them say what lay there."""
GROUPS_PER_PART = 16
LOOKUP = 4096
"""Users looked up at once; every rank looks up as often as the one with the most."""


def record_of(dataset: Dataset, prompts: Prompts, max_len: int, checkpoint: str, fingerprint: str) -> dict[str, Any]:
    """How prompts are made, as JSON values: equal (but for paths) where the results are."""
    parts = repr([part.checksum for part in dataset.manifest.sequences])
    return {
        "k": prompts.k,
        "source": prompts.source,
        "exclude_seen": prompts.exclude_seen,
        "answers": prompts.answers,
        "max_len": max_len,
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": fingerprint,
        "dataset": dataset.path,
        "dataset_fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:32],
    }


def check_input(dataset: Dataset, prompts: Prompts, groups: list[RowGroup]) -> None:
    """Raise an `InputError` where the dataset does not hold what is asked for."""
    if RECORD in dataset.manifest.settings:
        made_from = dataset.manifest.settings[RECORD]["dataset"]
        raise InputError(
            f"{dataset.path} has prompts already; give the dataset it was made from ({made_from}) as --data, and this "
            "one as --previous where its histories have grown since"
        )
    if prompts.source != "generated" and not has_exposures(dataset, groups):
        raise InputError(
            f"--prompts.source {prompts.source}: {dataset.path} says nothing of what was shown and not clicked (no "
            "segment id 2). Prepare the log with --click_column, which tells them, or use --prompts.source generated"
        )


def has_exposures(dataset: Dataset, groups: list[RowGroup]) -> bool:
    """Whether any entry was shown and not clicked: from the Parquet statistics where there are any."""
    for group in groups:
        with dataset.open_part(dataset.manifest.sequences[group.part]) as file:
            meta = file.metadata
            names = [meta.schema.column(c).path.split(".")[0] for c in range(meta.num_columns)]
            if "segment_ids" not in names:
                continue
            statistics = meta.row_group(group.group).column(names.index("segment_ids")).statistics
            if statistics is not None and statistics.has_min_max:
                largest = statistics.max
            else:
                column = file.read_row_group(group.group, columns=["segment_ids"])["segment_ids"]
                values = Ragged.from_arrow(column).values
                largest = values.max(initial=0)
            if largest >= EXPOSED:
                return True
    return False


def finished(path: str, record: dict[str, Any], vocabulary: str) -> bool:
    """Whether `path` holds the very dataset that would be made.

    Raises:
        InputError: it holds another one, or something else.
    """

    def compare(dataset: Dataset) -> list[str]:
        if RECORD not in dataset.manifest.settings:
            raise InputError(
                f"--output {path} holds a dataset without prompts; nothing was touched. Choose another --output"
            )
        return _differences(dataset, record, vocabulary, NOT_COMPARED)

    return find_finished(path, NAME, Dataset.open, compare) is not None


def open_previous(path: str, record: dict[str, Any], vocabulary: str) -> Dataset:
    """An earlier prompt dataset whose prompts may be taken over.

    Raises:
        InputError: it was made otherwise.
    """
    previous = Dataset.open(path)
    if RECORD not in previous.manifest.settings:
        raise InputError(f"--previous {path} has no prompts: give a dataset that generate_prompts wrote")
    differing = _differences(previous, record, vocabulary, (*NOT_COMPARED, "dataset_fingerprint"))
    check_same(f"--previous {path}", NAME, differing, "leave --previous out, or use the same")
    return previous


def _differences(dataset: Dataset, record: dict[str, Any], vocabulary: str, ignored: tuple[str, ...]) -> list[str]:
    recorded = {**dataset.manifest.settings[RECORD], "vocabulary": dataset.manifest.vocabulary}
    return differences(recorded, {**record, "vocabulary": vocabulary}, ignored)


def read_rows(dataset: Dataset, group: RowGroup) -> pa.Table:
    """One row group, every value checked: user_id, item_ids and, where there are any, segment_ids, timestamps and
    answers."""
    return read_group(dataset, group, dataset.manifest.settings.get(RECORD, {}).get("answers", 0), times=True)


def share_of(groups: list[RowGroup], rank: int, world_size: int) -> list[RowGroup]:
    """The stretch of row groups that is this rank's, about equal in items."""
    sizes = np.array([group.items for group in groups], dtype=np.float64)
    middles = np.cumsum(sizes) - sizes / 2
    owner = np.minimum(middles * world_size // max(sizes.sum(), 1), world_size - 1)
    return [group for group, owned_by in zip(groups, owner, strict=True) if owned_by == rank]


def pools_of(groups: list[RowGroup], users: int) -> list[list[RowGroup]]:
    """Row groups that are read and filled together: as few as hold `users` rows."""
    pools: list[list[RowGroup]] = []
    rows = users
    for group in groups:
        if rows >= users:
            pools.append([])
            rows = 0
        pools[-1].append(group)
        rows += group.rows
    return pools


class Filler(Protocol):
    """What fills intervals: `Prompter.fill`."""

    def __call__(
        self, histories: Intervals, user_vectors: Tensor, known: Int64 | None, progress: Callable[[int], object]
    ) -> None:
        """Fill `histories` in place."""


class UserVectors:
    """Vectors of users from their sharded table; looking up is collective, so ranks do it equally often.

    Args:
        table: one id a bag.
        counts: by rank, the number of users of each of its pools, in order.
        device: of this rank.
    """

    def __init__(self, table: nn.Module, counts: list[list[int]], device: torch.device) -> None:
        self.table, self.device = table, device
        self.left = max(sum(self._lookups(users) for users in pools) for pools in counts)

    @staticmethod
    def _lookups(users: int) -> int:
        return -(-users // LOOKUP)

    def of(self, users: Int64) -> Tensor:
        """[users, dim] float32 vectors of one pool (collective)."""
        starts = range(0, users.size, LOOKUP)
        found = [self._lookup(users[start : start + LOOKUP]) for start in starts]
        return torch.cat(found) if found else torch.zeros(0, 1, device=self.device)

    def finish(self) -> None:
        """Go on with empty lookups until the rank with the most is done."""
        while self.left:
            self._lookup(np.zeros(0, dtype=np.int64))

    @torch.no_grad()
    def _lookup(self, ids: Int64) -> Tensor:
        self.left -= 1
        bags = bags_of(USER, ids, LOOKUP)  # as many on every rank, empty ones at the end
        return self.table(bags.to(self.device)).wait().values()[: ids.size].float().clone()


class Earlier:
    """Intervals of an earlier prompt dataset, by user; only the row groups that a pool needs are held."""

    def __init__(self, dataset: Dataset, k: int, max_len: int, answers: int) -> None:
        self.dataset, self.k, self.max_len, self.answers = dataset, k, max_len, answers
        self.groups: list[tuple[int, int, RowGroup]] = []
        """(smallest, largest user id, row group)."""
        for group in row_groups(dataset):
            with dataset.open_part(dataset.manifest.sequences[group.part]) as file:
                meta = file.metadata
                names = [meta.schema.column(c).path for c in range(meta.num_columns)]
                statistics = meta.row_group(group.group).column(names.index("user_id")).statistics
            known = statistics is not None and statistics.has_min_max
            self.groups.append((statistics.min, statistics.max, group) if known else (0, 2**63 - 1, group))
        self._read: dict[RowGroup, Intervals] = {}

    def fill(self, histories: Intervals) -> Int64:
        """See `known_intervals`."""
        known = np.zeros(histories.users.size, np.int64)
        if not histories.users.size:
            return known
        low, high = histories.users.min(), histories.users.max()
        needed = [group for smallest, largest, group in self.groups if smallest <= high and largest >= low]
        self._read = {group: self._read[group] if group in self._read else self._histories(group) for group in needed}
        for earlier in self._read.values():
            known = np.maximum(known, known_intervals(histories, earlier, self.max_len))
        return known

    def _histories(self, group: RowGroup) -> Intervals:
        table = read_rows(self.dataset, group)
        return intervals_of(table, self.k, self.max_len, (GENERATED, EXPOSED), self.answers)


@dataclass
class Made:
    """What was done, on all ranks together."""

    users: int = 0
    generated: int = 0
    exposed: int = 0
    kept: int = 0
    """Intervals taken over from the earlier dataset."""
    bytes: int = 0


def write_prompts(
    path: str,
    dataset: Dataset,
    groups: list[RowGroup],
    record: dict[str, Any],
    *,
    fill: Filler | None,
    user_table: nn.Module | None,
    device: torch.device,
    pool_users: int,
    previous: Dataset | None = None,
    progress: Callable[[int], object] = lambda users: None,
) -> Made:
    """Write the dataset with prompts, and commit it whole (collective).

    Args:
        path: folder of the new dataset, free.
        dataset: whose histories get prompts, and its row `groups`.
        record: see `record_of`.
        fill: makes prompts; None where none are generated.
        user_table: sharded user table, for `fill`.
        device: of this rank.
        pool_users: users read and filled together, at least.
        previous: an earlier prompt dataset to take prompts over from.
        progress: called with numbers of users done on this rank.
    """
    k, max_len, answers = record["k"], record["max_len"], record["answers"]
    kept = () if record["source"] == "generated" else (EXPOSED,)
    pools = [pools_of(share_of(groups, r, world_size()), pool_users) for r in range(world_size())]
    vectors = None
    if user_table is not None and fill is not None:
        counts = [[sum(group.rows for group in pool) for pool in of_rank] for of_rank in pools]
        vectors = UserVectors(user_table, counts, device)
    earlier = None if previous is None else Earlier(previous, k, max_len, answers)
    made = Made()

    def filled() -> Iterator[pa.Table]:
        for pool in pools[rank()]:
            tables = [read_rows(dataset, group) for group in pool]
            histories = intervals_of(pa.concat_tables(tables), k, max_len, kept, answers)
            known = None if earlier is None else earlier.fill(histories)
            if fill is not None and vectors is not None:
                fill(histories, vectors.of(histories.users), known, progress)
            else:
                progress(histories.users.size)
            made.users += histories.users.size
            made.generated += int((histories.segments == GENERATED).sum())
            made.exposed += int((histories.segments == EXPOSED).sum())
            made.kept += 0 if known is None else int(known.sum())
            whole, first = table_of(histories), 0
            for table in tables:
                if table.num_rows:
                    yield whole.slice(first, table.num_rows).combine_chunks()
                first += table.num_rows
        if vectors is not None:
            vectors.finish()

    with shared_folder.stage_shared_folder(path, NAME) as (fs, folder):
        parts, failure = [], None
        try:
            parts = write_parts(fs, folder, "sequences", filled(), GROUPS_PER_PART, prefix=f"part-{rank():04d}")
        except Exception as error:
            failure = error  # raised here it would leave the others waiting for this rank
            if vectors is not None:
                vectors.finish()
        raise_first_error(failure)
        shares: list[tuple[list[Part], Made]] = gather_objects((parts, made))
        total = Made(
            users=sum(m.users for _, m in shares),
            generated=sum(m.generated for _, m in shares),
            exposed=sum(m.exposed for _, m in shares),
            kept=sum(m.kept for _, m in shares),
        )
        if rank() == 0:
            sequences = [part for share, _ in shares for part in share]
            copy_parts(dataset, dataset.manifest.item_parts + dataset.manifest.user_parts, fs, folder)
            manifest = replace(
                dataset.manifest,
                sequences=sequences,
                interactions=sum(part.items for part in sequences) - total.generated - total.exposed,
                settings={**dataset.manifest.settings, RECORD: record},
            )
            folders.write_manifest(fs, folder, manifest.to_json())
            total.bytes = manifest.size
    return gather_objects(total)[0]


def copy_parts(dataset: Dataset, parts: list[Part], fs: pyarrow.fs.FileSystem, folder: str) -> None:
    """Copy files of a dataset as they are."""
    source, root = filesystem(dataset.path)
    for part in parts:
        fs.create_dir(f"{folder}/{part.path.rpartition('/')[0]}", recursive=True)
        with source.open_input_stream(f"{root}/{part.path}", compression=None) as stream:
            with fs.open_output_stream(f"{folder}/{part.path}", compression=None) as sink:
                while block := stream.read(2**22):
                    sink.write(block)


def decide_on_first_rank(check: Callable[[], bool]) -> bool:
    """The answer of rank 0, on every rank; its error, too (collective)."""
    answer = []
    run_on_first_rank(lambda: answer.append(check()))
    return gather_objects(answer)[0][0]
