"""From a dataset to a folder of neighbours: pairs of items are counted, weighed and ranked in the engine.

So the pairs need not fit in memory. Weights are whole numbers, whose sum does not depend on the order of summation, so
every engine finds the same neighbours; see `data.neighbours.pairs` for what they are.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.fs

from recgpt_torchrec.config import FindNeighbours
from recgpt_torchrec.config.fields import changeable_names, default_values
from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.data.neighbours.folder import FOLDER, NeighboursManifest
from recgpt_torchrec.data.neighbours.pairs import BACKWARD, DISTANCE_POWER, ITEM_POWER, SOURCE_POWER, forward_pairs
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reading.counts import read_counts
from recgpt_torchrec.data.reading.histories import HistoryReader
from recgpt_torchrec.data.windows import RowGroup, row_groups
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.preparation.engines.engine import BATCH_ROWS, Engine
from recgpt_torchrec.preparation.engines.opening import open_engine
from recgpt_torchrec.preparation.writing import Layout, list_groups
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.storage import folders
from recgpt_torchrec.storage.finished import differences, find_finished
from recgpt_torchrec.storage.parts import Part

PAIRS = pa.schema([("source", pa.int64()), ("item", pa.int64()), ("weight", pa.int64())])
"""Schema of the pairs: an item, one that came after it, and the weight in `UNITS`."""
FACTORS = pa.schema([("of", pa.int64()), ("as_source", pa.float64()), ("as_item", pa.float64())])
"""Schema of the items' factors: what an item's number of interactions makes of its weights, in either role."""
UNITS = 2**20
"""Units of a pair of neighbouring positions; a weight is rounded to one."""
WHOLE = 2**40
"""Longer than any history."""
GROUPS_PER_PART = 16


@dataclass(kw_only=True)
class Result:
    """The manifest of the neighbours that were written or found, and the time it took."""

    manifest: NeighboursManifest
    seconds: float
    already_there: bool = False


def find_neighbours(config: FindNeighbours) -> Result:
    """Write the neighbours of a dataset's items, or find that they are written already.

    Raises:
        InputError: the dataset cannot be read, or the output folder is not free.
    """
    began = time.monotonic()
    dataset = Dataset.open(config.data)
    finished = _find_finished(config, dataset)
    if finished is not None:
        return Result(manifest=finished, seconds=time.monotonic() - began, already_there=True)
    with open_engine(config) as engine:
        weights = weigh_pairs(engine, dataset, config.window)
        pairs = engine.count(weights)
        if not pairs:
            raise InputError(
                f"{config.data}: no history of the training part has two different items at most {config.window} "
                "positions apart, so no item has a neighbour; train without --neighbours.path"
            )
        ranked = rank_neighbours(engine, dataset, weights, config.count)
        with folders.stage_folder(config.output) as (fs, folder):
            manifest = NeighboursManifest(
                dataset=config.data,
                histories=histories_fingerprint(dataset),
                vocabulary=dataset.manifest.vocabulary,
                hold_out=dataset.manifest.hold_out,
                interactions=dataset.manifest.interactions,
                day=0 if dataset.manifest.day is None else dataset.manifest.day.number,
                split=dataset.manifest.preparation.get("split", {}),
                items=dataset.manifest.items,
                pairs=pairs,
                count=config.count,
                settings=asdict(config),
                parts=_write(engine, ranked, fs, folder, dataset.manifest.items),
            )
            folders.write_manifest(fs, folder, manifest.to_json())
    return Result(manifest=manifest, seconds=time.monotonic() - began)


def weigh_pairs(engine: Engine, dataset: Dataset, window: int) -> ir.Table:
    """The weight of each pair of different items of the training part, in `UNITS`: columns of `PAIRS`."""
    groups = row_groups(dataset)
    read: Callable[[RowGroup], Iterable[pa.Table]] = partial(read_pairs, dataset, window)
    with progress_bar(len(groups), "row groups", desc="counting pairs: ", leave=False) as bar:
        if engine.dialect == "duckdb":  # elsewhere, workers read
            plain = read

            def read(group: RowGroup) -> Iterable[pa.Table]:
                yield from plain(group)
                bar.update()

        forward = engine.fill_from("pairs", groups, read, PAIRS)
    sums = engine.save("forward_sums", _sum_weights(forward))
    engine.drop("pairs")
    back = round(1 / BACKWARD)
    both = sums.mutate(weight=sums.weight * back).union(sums.select(source="item", item="source", weight="weight"))
    weights = engine.save("pair_weights", _sum_weights(both.filter(both.source != both.item)))
    engine.drop("forward_sums")
    return weights


def _sum_weights(pairs: ir.Table) -> ir.Table:
    return pairs.group_by("source", "item").agg(weight=pairs.weight.sum().cast("int64"))


def read_pairs(dataset: Dataset, window: int, group: RowGroup) -> Iterator[pa.Table]:
    """The pairs of one row group's histories, items before later ones: a table with the schema `PAIRS` per distance."""
    histories = HistoryReader(dataset=dataset, split="training", max_len=WHOLE).read([group])
    for distance, sources, items in forward_pairs(Ragged(histories.items, histories.offsets), window):
        weight = np.full(sources.size, round(UNITS * distance**-DISTANCE_POWER))
        yield pa.table([pa.array(column) for column in (sources, items, weight)], schema=PAIRS)


def rank_neighbours(engine: Engine, dataset: Dataset, weights: ir.Table, count: int) -> ir.Table:
    """The best neighbours of each item: columns item_id, neighbour_id, score, and rank from 0 on."""
    counts = np.maximum(read_counts(dataset, 0, dataset.manifest.items), 1).astype(np.float64)
    unit = 1 / (UNITS * round(1 / BACKWARD))
    columns = (np.arange(counts.size), counts**-SOURCE_POWER * unit, counts**-ITEM_POWER)
    table = pa.table([pa.array(column) for column in columns], schema=FACTORS)
    factors = engine.fill_from("item_factors", [table], lambda whole: [whole], FACTORS)
    of_item = factors.select(item_of="of", as_item="as_item")
    joined = weights.inner_join(of_item, weights.item == of_item.item_of)
    scored = joined.select("source", "item", score=joined.weight * joined.as_item)
    best_first = ibis.window(group_by="source", order_by=[ibis.desc("score"), "item"])
    ranked = scored.mutate(rank=ibis.row_number().over(best_first))
    best = ranked.filter(ranked["rank"] < count)
    of_source = factors.select(source_of="of", as_source="as_source")
    both = best.inner_join(of_source, best.source == of_source.source_of)
    return engine.save(
        "ranked_neighbours",
        both.select(
            item_id="source",
            neighbour_id="item",
            score=(both.score * both.as_source).cast("float32"),
            rank=both["rank"].cast("int64"),
        ),
    )


def _write(engine: Engine, ranked: ir.Table, fs: pyarrow.fs.FileSystem, folder: str, items: int) -> list[Part]:
    lists: dict[str, tuple[str, pa.DataType]] = {
        "neighbour_ids": ("neighbour_id", pa.int64()),
        "scores": ("score", pa.float32()),
    }
    layout = Layout(
        folder=FOLDER,
        id="item_id",
        ids=items,
        columns=["item_id", "neighbour_id", "score"],
        order=["rank"],
        ids_per_group=BATCH_ROWS,
        groups_per_part=GROUPS_PER_PART,
        make_groups=partial(list_groups, ids_per_group=BATCH_ROWS, lists=lists, id="item_id"),
    )
    return engine.write_parts(ranked, layout, fs, folder, engine.count(ranked))


def _find_finished(config: FindNeighbours, dataset: Dataset) -> NeighboursManifest | None:
    """The manifest, if the output folder holds the neighbours asked for; None: the folder is free."""

    def read(path: str) -> NeighboursManifest:
        manifest = NeighboursManifest.read(path)
        manifest.check_parts(path)
        return manifest

    def compare(manifest: NeighboursManifest) -> list[str]:
        settings = {**default_values(config), **manifest.settings}
        differing = differences(settings, asdict(config), changeable_names(FindNeighbours))
        if manifest.histories != histories_fingerprint(dataset):
            differing.append(f"histories: those of {manifest.dataset} there, other ones in {config.data} now")
        return differing

    return find_finished(config.output, NeighboursManifest.KIND.name, read, compare)
