"""Writes a dataset with prompts between the items of its histories, row group by row group.

Every process takes consecutive row groups, so the order of users stays; it holds a pool of a few row groups at a time.
The manifest is written last. Its settings record how the prompts were made.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import torch
from torch import Tensor

from recgpt_torchrec.catalogue.rounds import Rounds
from recgpt_torchrec.config import AnswerNeighbours, Prompts
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Int64
from recgpt_torchrec.data.reading.footers import column_bounds
from recgpt_torchrec.data.reading.reader import Reader
from recgpt_torchrec.data.segments import EXPOSED, FEEDBACK, GENERATED
from recgpt_torchrec.data.split import STORED
from recgpt_torchrec.data.windows import RowGroup, row_groups, user_bounds
from recgpt_torchrec.distributed import shared_folder
from recgpt_torchrec.distributed.lockstep import raise_first_error
from recgpt_torchrec.distributed.processes import gather_objects, rank, world_size
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.model.tabled.base import TabledModel
from recgpt_torchrec.prompts.boosting import describe_boost
from recgpt_torchrec.prompts.intervals import Intervals, intervals_of, known_intervals, table_of
from recgpt_torchrec.storage import filesystem
from recgpt_torchrec.storage.finished import check_same, differences, find_finished
from recgpt_torchrec.storage.parts import Part, write_parts

NAME = "prompt dataset"
"""Name of the output in messages."""
RECORD = "prompts"
"""Key of the manifest's settings that records how the prompts were made."""
AVERAGED = "averaged_with"
"""Key of the record: fingerprints of the checkpoints of other teachers, whose answers are averaged with these."""
DRAWING = ("temperature", "top_k", "seed")
"""Options of the record of prompts that were drawn."""
NOT_COMPARED = ("dataset", "checkpoint")
"""Paths in the record, which may differ; the fingerprints beside them are compared."""
GROUPS_PER_PART = 16
PROMPTS = (GENERATED, *FEEDBACK.values())
"""Segment ids of prompts."""
LOOKUP = 4096
"""Number of users looked up at once."""


def record_of(
    dataset: Dataset,
    prompts: Prompts,
    max_len: int,
    checkpoint: str,
    fingerprint: str,
    neighbours: AnswerNeighbours | None = None,
) -> dict[str, Any]:
    """How prompts are made, as JSON values; equal records, paths aside, give equal prompts."""
    parts = repr([part.checksum for part in dataset.manifest.sequences])
    return {
        "k": prompts.k,
        "source": prompts.source,
        "exclude_seen": prompts.exclude_seen,
        "answers": prompts.answers,
        **describe_drawing(prompts),
        "max_len": max_len,
        "checkpoint": checkpoint,
        "checkpoint_fingerprint": fingerprint,
        "dataset": dataset.path,
        "dataset_fingerprint": hashlib.sha256(parts.encode()).hexdigest()[:32],
        **({} if dataset.manifest.hold_out == "last" else {"hold_out": dataset.manifest.hold_out}),
        **({} if {*prompts.feedback} == {*FEEDBACK} else {"feedback": kinds_of(dataset, prompts)}),
        **(
            {} if neighbours is None or neighbours.path is None else {"neighbours": describe_boost(neighbours, dataset)}
        ),
    }


def describe_drawing(prompts: Prompts) -> dict[str, Any]:
    """How prompts are drawn, as JSON values; nothing where they are the best items."""
    return {name: getattr(prompts, name) for name in DRAWING} if prompts.temperature else {}


def kinds_of(dataset: Dataset, prompts: Prompts) -> list[str]:
    """The kinds of feedback of a dataset that become prompts, in the order of their segment ids."""
    if prompts.source == "generated":
        return []
    return [kind for kind in dataset.manifest.feedback if kind in prompts.feedback]


def check_input(dataset: Dataset, prompts: Prompts, groups: list[RowGroup], previous: str | None = None) -> None:
    """Raise an `InputError` where the dataset has prompts already, lacks the shown items that are asked for, or has
    parts before which histories end, so that prompts of the earlier dataset `previous` cannot be reused."""
    if previous is not None and dataset.manifest.hold_out in STORED:
        raise InputError(
            f"--previous {previous}: with --hold_out {dataset.manifest.hold_out} prompts depend on where the parts of "
            f"{dataset.path} begin, so none can be reused; leave --previous out"
        )
    if RECORD in dataset.manifest.settings:
        made_from = dataset.manifest.settings[RECORD].get("dataset")
        raise InputError(
            f"{dataset.path} has prompts already; give the dataset it was made from ({made_from}) as --data. If "
            "its histories have grown since, give this one as --previous"
        )
    told = dataset.manifest.feedback
    if prompts.source != "generated" and told and not kinds_of(dataset, prompts):
        raise InputError(
            f"--prompts.feedback {','.join(prompts.feedback)}: {dataset.path} has only {' and '.join(told)} items. "
            "Prepare the log with --dislike_to, --skip_to or words for them, or name one that it has"
        )
    if prompts.source != "generated" and not has_exposures(dataset, groups):
        raise InputError(
            f"--prompts.source {prompts.source}: {dataset.path} has no items that were shown and not clicked (no "
            "segment id 2). Prepare the log with --click_column, or use --prompts.source generated"
        )


def has_exposures(dataset: Dataset, groups: list[RowGroup]) -> bool:
    """Whether any entry was shown and not clicked, by Parquet statistics where they exist."""
    for group in groups:
        with dataset.read_part(dataset.manifest.sequences[group.part]) as file:
            if "segment_ids" not in file.schema_arrow.names:
                continue
            if bounds := column_bounds(file.metadata, group.group, "segment_ids"):
                largest = bounds[1]
            else:
                column = file.read_row_group(group.group, columns=["segment_ids"])["segment_ids"]
                largest = pc.max(pc.list_flatten(column)).as_py() or 0
            if largest >= EXPOSED:
                return True
    return False


def finished(path: str, record: dict[str, Any], vocabulary: str) -> bool:
    """Whether `path` already holds the dataset that this run would make.

    Raises:
        InputError: it holds something else.
    """

    def compare(dataset: Dataset) -> list[str]:
        if RECORD not in dataset.manifest.settings:
            raise InputError(
                f"--output {path} holds a dataset without prompts; nothing was touched. Choose another --output"
            )
        return _differences(dataset, record, vocabulary, NOT_COMPARED)

    return find_finished(path, NAME, Dataset.open, compare) is not None


def open_previous(path: str, record: dict[str, Any], vocabulary: str) -> Dataset:
    """Open an earlier prompt dataset, whose prompts are reused.

    Raises:
        InputError: it has no prompts, or they were made with other options.
    """
    previous = Dataset.open(path)
    if RECORD not in previous.manifest.settings:
        raise InputError(f"--previous {path} has no prompts: give a dataset that generate_prompts wrote")
    if AVERAGED in previous.manifest.settings[RECORD]:
        raise InputError(
            f"--previous {path} holds answers averaged with those of other checkpoints, which cannot be reused; leave "
            "--previous out"
        )
    if previous.manifest.hold_out in STORED:
        raise InputError(
            f"--previous {path} was made with --hold_out {previous.manifest.hold_out}, so its prompts depend on where "
            "its parts begin; leave --previous out"
        )
    differing = _differences(previous, record, vocabulary, (*NOT_COMPARED, "dataset_fingerprint", "hold_out"))
    check_same(f"--previous {path}", NAME, differing, "leave --previous out, or use the same")
    return previous


def _differences(dataset: Dataset, record: dict[str, Any], vocabulary: str, ignored: tuple[str, ...]) -> list[str]:
    recorded = {**dataset.manifest.settings[RECORD], "vocabulary": dataset.manifest.vocabulary}
    return differences(recorded, {**record, "vocabulary": vocabulary}, ignored)


def read_rows(dataset: Dataset, group: RowGroup) -> pa.Table:
    """Read one row group and check every value: user_id, item_ids and, where there are any, segment_ids, timestamps,
    event types, places and answers. Of a folder of days, the rows that count."""
    answers = dataset.manifest.settings.get(RECORD, {}).get("answers", 0)
    table = Reader(dataset, answers, times=True, events=True, places=True).read(group).table
    return table if dataset.newest is None else table.filter(pc.greater(pc.list_value_length(table["item_ids"]), 0))


def share_of(groups: list[RowGroup], rank: int, world_size: int) -> list[RowGroup]:
    """The consecutive row groups of a rank; ranks have about equal numbers of items."""
    sizes = np.array([group.items for group in groups], dtype=np.float64)
    middles = np.cumsum(sizes) - sizes / 2
    owner = np.minimum(middles * world_size // max(sizes.sum(), 1), world_size - 1)
    return [group for group, owned_by in zip(groups, owner, strict=True) if owned_by == rank]


def pools_of(groups: list[RowGroup], users: int) -> list[list[RowGroup]]:
    """Split row groups into pools that are filled together: as few groups as hold `users` rows."""
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
    """Signature of `Prompter.fill`."""

    def __call__(
        self, histories: Intervals, user_vectors: Tensor, known: Int64 | None, progress: Callable[[int], object]
    ) -> None:
        """Fill `histories` in place."""


class UserVectors:
    """User vectors from the sharded tables. Lookups are collective: they are rounds, like the catalogue's operations.

    Args:
        model: sharded.
        rounds: of the catalogue; ranks with different numbers of users ask different numbers of times.
        device: of this rank.
    """

    def __init__(self, model: TabledModel, rounds: Rounds, device: torch.device) -> None:
        self.model, self.rounds, self.device = model, rounds, device
        self._ask = rounds.add(self._look_up)

    def of(self, users: Int64) -> Tensor:
        """[users, dim] float32 vectors of one pool (collective)."""
        vectors: Tensor = self._ask(users, users.size)
        return vectors

    def finish(self) -> None:
        """Take part in the other ranks' rounds until they have finished as well (collective)."""
        self.rounds.finish()

    def _look_up(self, sizes: Int64, users: Int64 | None) -> Tensor:
        ids = np.zeros(0, dtype=np.int64) if users is None else users
        starts = range(0, int(sizes[:, 0].max()), LOOKUP)
        parts = [self.model.look_up(self.device, ids[at : at + LOOKUP], room=(LOOKUP, 0)).users for at in starts]
        return torch.cat(parts) if parts else torch.zeros(0, 1, device=self.device)


class PreviousPrompts:
    """Prompts of an earlier prompt dataset, by user; only the row groups that a pool needs are held."""

    def __init__(self, dataset: Dataset, k: int, max_len: int, answers: int, columns: Sequence[str] = ()) -> None:
        self.dataset, self.k, self.max_len, self.answers, self.columns = dataset, k, max_len, answers, columns
        self.groups = [(*user_bounds(dataset, group), group) for group in row_groups(dataset)]
        """(smallest user id, largest user id, row group)."""
        self._read: dict[RowGroup, Intervals] = {}

    def fill(self, histories: Intervals) -> Int64:
        """Copy known prompts into `histories`; see `known_intervals`."""
        known = np.zeros(histories.users.size, np.int64)
        if not histories.users.size:
            return known
        low, high = histories.users.min(), histories.users.max()
        needed = [group for smallest, largest, group in self.groups if smallest <= high and largest >= low]
        self._read = {
            group: self._read[group] if group in self._read else self._read_intervals(group) for group in needed
        }
        for earlier in self._read.values():
            known = np.maximum(known, known_intervals(histories, earlier, self.max_len, self.columns))
        return known

    def _read_intervals(self, group: RowGroup) -> Intervals:
        table = read_rows(self.dataset, group)
        return intervals_of(table, self.k, self.max_len, PROMPTS, self.answers, bool(self.dataset.manifest.feedback))


@dataclass
class PromptCounts:
    """Counts of a run, for its report."""

    users: int = 0
    generated: int = 0
    exposed: int = 0
    reused: int = 0
    """Intervals whose prompts were reused from the earlier dataset."""
    bytes: int = 0


def write_prompts(
    path: str,
    dataset: Dataset,
    groups: list[RowGroup],
    record: dict[str, Any],
    *,
    fill: Filler | None,
    vectors: UserVectors | None,
    pool_users: int,
    previous: Dataset | None = None,
    average: Callable[[Intervals, Sequence[RowGroup]], None] | None = None,
    columns: Sequence[str] = (),
    progress: Callable[[int], object] = lambda users: None,
) -> PromptCounts:
    """Write the dataset with prompts (collective).

    Args:
        path: folder of the new dataset; must be empty or not exist.
        dataset: whose histories get prompts.
        groups: its row groups.
        record: from `record_of`.
        fill: generates prompts; None where none are generated.
        vectors: the user vectors that `fill` gets.
        pool_users: minimum number of users that are read and filled together.
        previous: an earlier prompt dataset whose prompts are reused.
        average: replaces the answers of some row groups by their mean with those of other teachers; None: they stay.
        columns: what the model reads beside ids, by name in `Intervals.columns`; prompts are reused where it is equal.
        progress: called with the number of users done since the last call, on this rank.
    """
    k, max_len, answers = record["k"], record["max_len"], record["answers"]
    kinds = [] if record["source"] == "generated" else record.get("feedback", [*FEEDBACK])
    prompt_segments, trailing = tuple(FEEDBACK[kind] for kind in kinds), bool(dataset.manifest.feedback)
    pools = pools_of(share_of(groups, rank(), world_size()), pool_users)
    earlier = None if previous is None else PreviousPrompts(previous, k, max_len, answers, columns)
    counted = PromptCounts()

    def fill_pools() -> Iterator[pa.Table]:
        for pool in pools:
            tables = [read_rows(dataset, group) for group in pool]
            histories = intervals_of(pa.concat_tables(tables), k, max_len, prompt_segments, answers, trailing)
            known = None if earlier is None else earlier.fill(histories)
            if fill is not None and vectors is not None:
                fill(histories, vectors.of(histories.users), known, progress)
            else:
                progress(histories.users.size)
            if average is not None:
                average(histories, pool)
            counted.users += histories.users.size
            counted.generated += int((histories.segments == GENERATED).sum())
            counted.exposed += int((histories.segments >= EXPOSED).sum())
            counted.reused += 0 if known is None else int(known.sum())
            whole, first = table_of(histories), 0
            for table in tables:
                if table.num_rows:
                    yield whole.slice(first, table.num_rows).combine_chunks()
                first += table.num_rows

    with shared_folder.stage_shared_folder(path, NAME) as (fs, folder):
        parts, failure = [], None
        try:
            parts = write_parts(fs, folder, "sequences", fill_pools(), GROUPS_PER_PART, prefix=f"part-{rank():04d}")
        except Exception as error:
            failure = error  # raised here, it would leave the other ranks waiting
        if vectors is not None:
            vectors.finish()
        raise_first_error(failure)
        shares: list[tuple[list[Part], PromptCounts]] = gather_objects((parts, counted))
        total = PromptCounts(
            users=sum(m.users for _, m in shares),
            generated=sum(m.generated for _, m in shares),
            exposed=sum(m.exposed for _, m in shares),
            reused=sum(m.reused for _, m in shares),
        )
        if rank() == 0:
            sequences = [part for share, _ in shares for part in share]
            described = dataset.manifest
            copied = [part for part in described.all_parts if part not in described.sequences]
            copy_parts(dataset, copied, fs, folder)
            manifest = replace(
                described,
                sequences=sequences,
                day=None,
                interactions=sum(part.items for part in sequences) - total.generated - total.exposed,
                settings={**described.settings, RECORD: record},
                feedback=[kind for kind in described.feedback if kind in kinds],
            )
            shared_folder.write_shared_manifest(fs, folder, manifest)
            total.bytes = manifest.size
    return gather_objects(total)[0]


def copy_parts(dataset: Dataset, parts: list[Part], fs: pyarrow.fs.FileSystem, folder: str) -> None:
    """Copy files of a dataset byte by byte."""
    source, root = filesystem(dataset.files or dataset.path)
    for part in parts:
        fs.create_dir(f"{folder}/{part.path.rpartition('/')[0]}", recursive=True)
        with source.open_input_stream(f"{root}/{part.path}", compression=None) as stream:
            with fs.open_output_stream(f"{folder}/{part.path}", compression=None) as sink:
                while block := stream.read(2**22):
                    sink.write(block)
