"""Tables that grow: a run that begins from another's checkpoint, on a dataset with more users and items.

Nothing is copied and no rank holds more than its shards: of a grown table the checkpoint's rows are read into a view of
the first rows, so the others keep their initial values, and the optimizer's state of them is still zero.
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
    """A state (see `state.state_of`) with only so many first rows of each table and its moments, in the same memory.

    Args:
        state: of a model and its optimizers.
        rows: of each table, by name; where it has no more than that, it stays as it is.

    Returns:
        the same structure; a table of which this rank holds none of these rows is left out.
    """
    parameters, held = dict(state["model"]), dict(state["optimizer"]["state"])
    for name, count in rows.items():
        table = parameters[name]
        if count >= table.shape[0]:
            continue
        moments = held.pop(name, {})
        del parameters[name]
        if (first := _first_rows(table, count)) is not None:
            parameters[name] = first
            if moments:
                held[name] = {moment: _first_rows(value, count) for moment, value in moments.items()}
    return {"model": parameters, "optimizer": {"state": held}}


def _first_rows(value: Any, rows: int) -> Any:
    """A view of the first rows of a tensor [more rows, ...]; None where this rank has no shard in them."""
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
    whole = ShardedTensorMetadata(
        [cut(shard) for shard in value.metadata().shards_metadata if shard.shard_offsets[0] < rows],
        torch.Size([rows, value.size(1)]),
        TensorProperties(dtype=local[0].tensor.dtype),
    )
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, whole, process_group=value._process_group)


def find_initial(path: str, config: Pretrain, dataset: Dataset) -> str:
    """The checkpoint that `path` means, once it is sure that a run of this configuration can begin from it.

    Raises:
        InputError: its vocabulary is neither the dataset's nor the beginning of it, or it is of another shape.
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
        raise InputError(
            f"--initial {path}: {checkpoint} was prompt-tuned; give the checkpoint of a pre-training run, and tune anew"
        )
    saved, given = asdict(Model(**settings["model"])), asdict(config.model)
    differ = [f"--model.{name} {saved[name]}" for name in saved if "dropout" not in name and saved[name] != given[name]]
    if settings["tables"]["optimizer"] != config.tables.optimizer:
        differ.append(f"--tables.optimizer {settings['tables']['optimizer']}")
    if differ:
        raise InputError(f"--initial {path}: {checkpoint} was trained with {' '.join(differ)}; give the same here")
    extended = manifest.preparation.get("extends", {})
    if config.targets == "new" and metadata["vocabulary"] != extended.get("vocabulary"):
        raise InputError(
            f"--targets new: {dataset.path} marks what {extended.get('dataset')} held, and {checkpoint} was trained on "
            f"{settings['data']}: what came between would never be trained on. Give --targets all, or a run on the "
            "former"
        )
    return checkpoint


def check_new_targets(dataset: Dataset) -> None:
    """Raise an `InputError` unless the dataset says which targets are new, and there are some."""
    extended = dataset.manifest.preparation.get("extends")
    if extended is None or "trained" not in dataset.columns:
        raise InputError(
            f"--targets new: {dataset.path} does not say what was trained on before; prepare it with --vocabulary "
            "EARLIER_DATASET, or give --targets all"
        )
    if not extended["new_targets"]:
        raise InputError(
            f"--targets new: the training part of {dataset.path} has no target that {extended['dataset']} did not have "
            "(of each user the last two interactions are held out); give --targets all, or wait for more of the log"
        )
