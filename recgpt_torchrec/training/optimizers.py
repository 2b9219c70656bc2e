"""Optimizers of the tables, fused into the backward where fbgemm can, and of the dense parameters."""

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recgpt_torchrec.config import Optimizer, Tables
from recgpt_torchrec.data.bags import table_name

DENSE = "dense"
"""Name of all parameters that are not tables, beside the tables' names."""
EPS = 1e-8
FUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": EPS}),
    "adagrad": (torch.optim.Adagrad, {"eps": EPS}),
    "sgd": (torch.optim.SGD, {}),
}
"""Table optimizers that fbgemm fuses into the backward on CPU and CUDA; it fuses Adam on CUDA only."""


def torch_optimizers(optimizer: CombinedOptimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizers that update parameters after the backward; those of tables updated in it are left out."""
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            yield part._optimizer


def is_fused(optimizer: str, device: torch.device) -> bool:
    """Whether fbgemm updates sharded tables in the backward; otherwise torch's optimizer updates every row."""
    return optimizer in FUSED or device.type == "cuda"


def fuse_optimizers(model: nn.Module, tables: Tables, device: torch.device, frozen: Set[str]) -> None:
    """Mark the tables of a model to be updated in the backward, before it is sharded; none if `is_fused` is false.

    Args:
        model: with its tables on the meta device.
        tables: options of their optimizer.
        device: of this rank.
        frozen: names of the tables that are not trained; their learning rate is 0.
    """
    if not is_fused(tables.optimizer, device):
        return
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                kind, settings = _table_optimizer(config.name, tables, frozen)
                apply_optimizer_in_backward(kind, module.embedding_bags[config.name].parameters(), settings)


def optimizers_of(
    model: DistributedModelParallel, tables: Tables, optimizer: Optimizer, frozen: Set[str]
) -> CombinedOptimizer:
    """One optimizer over all parameters of a sharded model; its step leaves out tables updated in the backward.

    Args:
        model: sharded after `fuse_optimizers`.
        tables: options of the tables' optimizer.
        optimizer: options of the dense parameters' optimizer.
        frozen: names of the tables that are not trained, and `DENSE` if the dense parameters are not.
    """
    dense: dict[str, Any] = {}
    unfused: dict[str, Any] = {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        (unfused if "embedding_bags" in name else dense)[name] = parameter
    parts: list[tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
    for name, parameter in unfused.items():
        kind, settings = _table_optimizer(table_name(name), tables, frozen)
        if kind is torch.optim.Adam and parameter.is_cuda:  # then the finite guard can leave out a step on the device
            settings = {**settings, "fused": True}

        def make(params: Any, kind: Any = kind, settings: dict[str, Any] = settings) -> torch.optim.Optimizer:
            return with_moments(kind(params, **settings))

        parts.append(("", KeyedOptimizerWrapper({name: parameter}, make)))
    # fused: one pass over all parameters; the default, a loop over 30 small tensors, took 12 ms per step on CPU.
    adamw: dict[str, Any] = {
        "fused": True,
        "lr": 0.0 if DENSE in frozen else optimizer.lr,
        "betas": (0.9, optimizer.beta2),
        "weight_decay": optimizer.weight_decay,
    }
    parts.append(("", KeyedOptimizerWrapper(dense, lambda params: with_moments(torch.optim.AdamW(params, **adamw)))))
    return CombinedOptimizer(parts)


def _table_optimizer(table: str, tables: Tables, frozen: Set[str]) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of a table's optimizer."""
    kind, settings = FUSED.get(tables.optimizer, (torch.optim.Adam, {"betas": (0.9, tables.beta2)}))
    if table in frozen:
        return kind, {"lr": 0.0, "weight_decay": 0.0, **settings}
    return kind, {"lr": tables.lr_of(table), "weight_decay": tables.weight_decay, **settings}


def with_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Initialise Adam's state, as its first step would: a checkpoint can only be loaded into state that exists."""
    if isinstance(optimizer, torch.optim.Adam):
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer
