"""The stream alone against a bare scan of the same row groups with pyarrow, each in one thread."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch

from recgpt_torchrec.config import Pretrain
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.stream import SequenceStream
from recgpt_torchrec.data.windows import row_groups
from recgpt_torchrec.training.building import choose_tokens, training_stream
from recgpt_torchrec.training.execution import Execution
from tools.benchmarks.measuring import Figures, Kind, Ratio, repeat
from tools.benchmarks.settings import Settings
from tools.benchmarks.training import parse


def stream(settings: Settings) -> Kind:
    """Targets per second of the stream at 2,048 and 32,768 tokens, of the bare scan, and data wait in training.

    The scan reads the columns user_id and item_ids of every row group to numpy. Its rate counts the targets that
    training makes of what it read, so that the ratio is one of times for the same histories.
    """
    seconds = 0.05 if settings.quick else 1.0
    dataset = Dataset.open(settings.data)
    targets = settings.training(steps=settings.pick(40, 2)).targets
    ways: dict[str, Callable[[], Figures]] = {
        "bare scan": lambda: _rated(repeat(lambda: _scan(dataset) and targets, seconds))
    }
    ratios = {}
    for tokens in (2048, 32_768):
        config = parse(settings.data, str(settings.folder / "none"), {"batch.tokens": tokens})
        ways[f"stream, {tokens:,} tokens"] = _reads(dataset, config, seconds)
        ratios[f"stream over scan, {tokens:,} tokens"] = Ratio(
            (f"stream, {tokens:,} tokens", "targets_s"), ("bare scan", "targets_s"), 0.6
        )
    ways["training"] = settings.training(steps=settings.pick(40, 2)).turn
    return Kind(ways, ratios)


def _reads(dataset: Dataset, config: Pretrain, seconds: float) -> Callable[[], Figures]:
    tokens = choose_tokens(config, config.model, dataset, torch.device("cpu")).rank
    execution = Execution.choose(config.train, config.model, config.loss, torch.device("cpu"))
    stream, epochs = training_stream(config, config.model, dataset, tokens, execution), itertools.count()
    return lambda: _rated(repeat(lambda: _read(stream, next(epochs)), seconds))


def _read(stream: SequenceStream, epoch: int) -> int:
    """Make the batches of an epoch in this thread; returns the number of targets."""
    source = stream.batches(epoch).source
    return sum(batch.targets for worker in range(len(source.queues)) for batch in source(worker))


def _scan(dataset: Dataset) -> int:
    """Read every row group's users and items to numpy; returns the number of rows."""
    rows = 0
    files: dict[int, pq.ParquetFile] = {}
    for group in row_groups(dataset):
        if group.part not in files:
            files[group.part] = pq.ParquetFile(Path(dataset.path) / dataset.manifest.sequences[group.part].path)
        read = files[group.part].read_row_group(group.group, columns=["user_id", "item_ids"], use_threads=False)
        lists = read["item_ids"].combine_chunks()
        lists.values.to_numpy(), lists.offsets.to_numpy()
        rows += read["user_id"].to_numpy().size
    return rows


def _rated(figures: Figures) -> Figures:
    return {"targets_s": figures.pop("rate_s"), **figures}
