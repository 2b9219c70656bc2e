"""What a checkpoint says of the model in it: its configuration, and the vocabulary it was trained with."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from recgpt_torchrec import storage
from recgpt_torchrec.checkpoints.folder import METADATA, read_metadata, read_tensor_metadata
from recgpt_torchrec.checkpoints.repeat_bias import check_bias
from recgpt_torchrec.config import AttributeChoice, Loss, Model, Tables, Tuning
from recgpt_torchrec.data.inputs.spec import TIMES, Inputs
from recgpt_torchrec.data.split import HoldOut
from recgpt_torchrec.model.dense import Dense
from recgpt_torchrec.storage.typed import make_typed
from recgpt_torchrec.texts.commands import command

DENSE = "model.dense."
"""Prefix of the names of the decoder's parameters in a checkpoint."""


class _WithoutDrawing(TorchFunctionMode):
    """Leaves parameters as they are made: torch draws them on the meta device with torch._dynamo, 0.6 s to import."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return kwargs["out"] if "out" in kwargs else func(*args, **kwargs)  # as torch.nn.init.eye_ fills a parameter


@dataclass(kw_only=True)
class _StoredTables:
    optimizer: str


@dataclass(kw_only=True)
class _StoredProgress:
    repeat_bias: float = 0.0


@dataclass(kw_only=True)
class _StoredConfig:
    model: dict[str, Any]
    loss: dict[str, Any]
    tables: _StoredTables
    data: str
    tuning: dict[str, Any] | None = None


@dataclass(kw_only=True)
class _Stored:
    """What is read of checkpoint.json here."""

    config: _StoredConfig
    vocabulary: str
    hold_out: HoldOut = "last"
    inputs: Inputs = field(default_factory=Inputs)
    progress: _StoredProgress = field(default_factory=_StoredProgress)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Settings that readers of a checkpoint need before they build a model."""

    model: Model
    loss: Loss
    tuning: Tuning | None
    """None: a pre-trained model."""
    table_optimizer: str
    vocabulary: str
    """Fingerprint of the vocabulary that its ids belong to."""
    data: str
    """Folder of the dataset it was trained on."""
    hold_out: HoldOut = "last"
    """What that dataset held out of training."""
    inputs: Inputs = field(default_factory=Inputs)
    """What it reads beside ids."""
    repeat_bias: float = 0.0
    """See `checkpoints.repeat_bias`; 0 in checkpoints of earlier versions."""

    @classmethod
    def read(cls, checkpoint: str) -> "CheckpointSettings":
        """Those of a checkpoint folder, which agree with its tensors: a model of these sizes may be built.

        Raises:
            InputError: it is not a complete checkpoint, or damaged.
        """
        metadata, sizes = read_metadata(checkpoint), read_tensor_metadata(checkpoint)
        try:
            stored = make_typed(_Stored, metadata, others=True)
            settings = cls(
                model=make_typed(Model, stored.config.model, "config.model."),
                loss=make_typed(Loss, stored.config.loss, "config.loss."),
                tuning=None if stored.config.tuning is None else make_typed(Tuning, stored.config.tuning),
                table_optimizer=stored.config.tables.optimizer,
                vocabulary=stored.vocabulary,
                data=stored.config.data,
                hold_out=stored.hold_out,
                inputs=stored.inputs,
                repeat_bias=stored.progress.repeat_bias,
            )
            check_bias(settings.repeat_bias, "progress.repeat_bias")
            settings._check_sizes({name: tuple(tensor.size) for name, tensor in sizes.items()})
        except ValueError as error:
            raise storage.damaged(os.path.join(checkpoint, METADATA), error) from None
        return settings

    def _check_sizes(self, sizes: dict[str, tuple[int, ...]]) -> None:
        """Raise a `ValueError` where a parameter of this model has another size than in the checkpoint.

        The model is made without memory for its parameters, and only once its layers are found to be that many.
        """
        layers = {
            name.split("blocks.")[1].split(".")[0] for name in sizes if name.startswith(f"{DENSE}decoder.blocks.")
        }
        if len(layers) != self.model.layers:
            raise ValueError(f"config.model.layers is {self.model.layers}, its tensors are of {len(layers)} layers")
        try:
            with torch.device("meta"), _WithoutDrawing():
                segments = self.tuning is not None and self.tuning.prompts
                dense = Dense(self.model, self.loss, segments, self.inputs)
        except RuntimeError:  # an overflow
            raise ValueError("config.model has sizes that are too large for any tensor") from None
        for name, parameter in dense.state_dict().items():
            if (size := sizes.get(f"{DENSE}{name}")) != tuple(parameter.shape):
                raise ValueError(f"by its config, {name} has size {list(parameter.shape)}, but its tensors have {size}")

    def other_shape(self, given: Model) -> list[str]:
        """Names of the model's options in which `given` differs; dropout may, it changes no parameter."""
        saved, other = asdict(self.model), asdict(given)
        return [name for name in saved if "dropout" not in name and saved[name] != other[name]]

    @property
    def continuing_options(self) -> dict[str, Any]:
        """What `pretrain --initial` needs beside this checkpoint: options that are not the defaults, by name."""
        inputs = self.inputs
        options = {f"model.{name}": getattr(self.model, name) for name in self.other_shape(Model())}
        if self.table_optimizer != Tables().optimizer:
            options["tables.optimizer"] = self.table_optimizer
        if weights := [f"{each.full_name}={each.weight:g}" for each in inputs.attributes if each.weight != 1]:
            options["attributes.weights"] = weights
        if pooling := {each.pooling for each in inputs.attributes} - {AttributeChoice().pooling}:
            options["attributes.pooling"] = pooling.pop()
        if times := [each.name for each in inputs.features if each.name in TIMES]:
            options["time.use"] = times
        if inputs.utc_offset_hours:
            options["time.utc_offset_hours"] = f"{inputs.utc_offset_hours:g}"
        if inputs.history_events:
            options["events.history"] = inputs.history_events
        return options

    def continue_command(self, checkpoint: str, data: str) -> str:
        """The command that trains the model of this checkpoint further on the dataset in the folder `data`."""
        options = {"data": data, "initial": checkpoint, **self.continuing_options, "output": "NEW_RUN"}
        return command("pretrain", options)
