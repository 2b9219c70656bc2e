"""Tables that grow: starts a run from another run's checkpoint, on a dataset with more users and items.

The checkpoint's rows are read into a view of a grown table's first rows. The new rows keep their initial values, and
their optimizer state stays zero. Nothing is copied, and no rank holds more than its shards.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties

from recgpt_torchrec.checkpoints.folder import find_checkpoint, read_metadata
from recgpt_torchrec.config import Model, Pretrain
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError


def first_rows(state: dict[str, Any], rows: dict[str, int]) -> dict[str, Any]:
    """View the first rows of each table and its moments in a state, without copying.

    Args:
        state: of a model and its optimizers (see `state.state_of`).
        rows: number of rows to view, by table name; a table that has no more stays as it is.

    Returns:
        The same structure, without the tables of which this rank holds none of these rows.
    """
    parameters, optimizer_state = dict(state["model"]), dict(state["optimizer"]["state"])
    for name, count in rows.items():
        table = parameters[name]
        if count >= table.shape[0]:
            continue
        moments = optimizer_state.pop(name, {})
        del parameters[name]
        if (first := _view_first_rows(table, count)) is not None:
            parameters[name] = first
            if moments:
                optimizer_state[name] = {moment: _view_first_rows(value, count) for moment, value in moments.items()}
    return {"model": parameters, "optimizer": {"state": optimizer_state}}


def _view_first_rows(value: Any, rows: int) -> Any:
    """View the first `rows` rows of a tensor or `ShardedTensor`; None: this rank's shards hold none of them."""
    if not isinstance(value, ShardedTensor):
        return value[:rows]

    def cut(shard: ShardMetadata) -> ShardMetadata:
        (row, column), (count, columns) = shard.shard_offsets, shard.shard_sizes
        return ShardMetadata([row, column], [min(count, rows - row), columns], shard.placement)

    local = [
        Shard(shard.tensor[: rows - shard.metadata.shard_offsets[0]], cut(shard.metadata))
        for shard in value.local_shards()
        if shard.metadata.shard_offsets[0] < rows
    ]
    if not local:
        return None
    view = ShardedTensorMetadata(
        [cut(shard) for shard in value.metadata().shards_metadata if shard.shard_offsets[0] < rows],
        torch.Size([rows, value.size(1)]),
        TensorProperties(dtype=local[0].tensor.dtype),
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, view, process_group=value._process_group)


def find_initial(path: str, config: Pretrain, dataset: Dataset) -> str:
    """Find the checkpoint for `--initial`, and check that a run of this configuration can start from it.

    Args:
        path: a checkpoint folder, or a run's output folder.
        config: of the run to start.
        dataset: the run's.

    Raises:
        InputError: there is no checkpoint; it was prompt-tuned; its vocabulary is neither the dataset's nor one that
            the dataset extends; it has another shape or table optimizer; or `--targets new` would leave targets out.
    """
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    settings, manifest = metadata["config"], dataset.manifest
    if manifest.extends(metadata["vocabulary"]) is None:
        raise InputError(
            f"--initial {path}: the checkpoint {checkpoint} was trained on {settings['data']}, whose ids mean other "
            f"items than those of {dataset.path}. Prepare the log with --vocabulary {settings['data']}, so that known "
            "users and items keep their ids, or leave --initial out"
        )
    if "tuning" in settings:
        raise InputError(f"--initial {path}: {checkpoint} was prompt-tuned; give the checkpoint of a pre-training run")
    saved, given = asdict(Model(**settings["model"])), asdict(config.model)
    differ = [f"--model.{name} {saved[name]}" for name in saved if "dropout" not in name and saved[name] != given[name]]
    if settings["tables"]["optimizer"] != config.tables.optimizer:
        differ.append(f"--tables.optimizer {settings['tables']['optimizer']}")
    if differ:
        raise InputError(f"--initial {path}: {checkpoint} was trained with {' '.join(differ)}; give the same here")
    extended = manifest.preparation.get("extends", {})
    if config.targets == "new" and metadata["vocabulary"] != extended.get("vocabulary"):
        raise InputError(
            f"--targets new: in {dataset.path} targets are new since {extended.get('dataset')}, but {checkpoint} was "
            f"trained on {settings['data']}: targets added in between would never be trained on. Give --targets all, "
            f"or a run on {extended.get('dataset')}"
        )
    return checkpoint


def check_new_targets(dataset: Dataset) -> None:
    """Check that the dataset marks new targets, and has some.

    Raises:
        InputError: it does not mark them, or has none.
    """
    extended = dataset.manifest.preparation.get("extends")
    if extended is None or "trained" not in dataset.columns:
        raise InputError(
            f"--targets new: {dataset.path} does not mark which targets are new; prepare it with --vocabulary "
            "EARLIER_DATASET, or give --targets all"
        )
    if not extended["new_targets"]:
        raise InputError(
            f"--targets new: the training part of {dataset.path} has no target that {extended['dataset']} did not have "
            "(the last two interactions of each user are held out); give --targets all, or a longer log"
        )
