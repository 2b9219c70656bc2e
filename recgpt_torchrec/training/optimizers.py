"""Optimizers: of the tables, fused into the backward where fbgemm can, and of everything else."""

from collections.abc import Set
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
from recgpt_torchrec.distributed.sharding import table_name

DENSE = "dense"
"""Stands for everything that is not a table."""
EPS = 1e-8
FUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": EPS}),
    "adagrad": (torch.optim.Adagrad, {"eps": EPS}),
    "sgd": (torch.optim.SGD, {}),
}
"""Table optimizers that fbgemm fuses into the backward on CPU and CUDA alike; Adam it fuses on CUDA only."""
ADAM: tuple[Any, dict[str, Any]] = (torch.optim.Adam, {"betas": (0.9, 0.98)})


def is_fused(optimizer: str, device: torch.device) -> bool:
    """Whether fbgemm updates sharded tables in the backward; else torch's optimizer steps every row of each shard."""
    return optimizer in FUSED or device.type == "cuda"


def fuse_optimizers(model: nn.Module, tables: Tables, device: torch.device, frozen: Set[str]) -> None:
    """Apply the tables' optimizer to a model that is not sharded yet, if it is one that is fused.

    Args:
        model: with its tables on the meta device.
        tables: their optimizer.
        device: of this rank.
        frozen: names of the tables that are not trained.
    """
    if not is_fused(tables.optimizer, device):
        return
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                kind, settings = _of_table(config.name, tables, frozen)
                apply_optimizer_in_backward(kind, module.embedding_bags[config.name].parameters(), settings)


def optimizers_of(
    model: DistributedModelParallel, tables: Tables, optimizer: Optimizer, frozen: Set[str]
) -> CombinedOptimizer:
    """One optimizer over all of a sharded model; fused ones have stepped in the backward already.

    Args:
        model: sharded after `fuse_optimizers`.
        tables: optimizer of the tables.
        optimizer: of everything else.
        frozen: names of the tables that are not trained; `DENSE` stands for everything that is not a table.
    """
    dense: dict[str, Any] = {}
    stepped: dict[str, Any] = {}
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        (stepped if "embedding_bags" in name else dense)[name] = parameter
    parts: list[tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
    for name, parameter in stepped.items():
        kind, settings = _of_table(table_name(name), tables, frozen)

        def of_table(params: Any, kind: Any = kind, settings: dict[str, Any] = settings) -> torch.optim.Optimizer:
            return with_moments(kind(params, **settings))

        parts.append(("", KeyedOptimizerWrapper({name: parameter}, of_table)))
    # fused: one pass over all parameters; the default, a loop over 30 small tensors, took 12 ms of a step on CPU.
    adamw: dict[str, Any] = {
        "fused": True,
        "lr": 0.0 if DENSE in frozen else optimizer.lr,
        "betas": (0.9, optimizer.beta2),
        "weight_decay": optimizer.weight_decay,
    }
    parts.append(("", KeyedOptimizerWrapper(dense, lambda params: with_moments(torch.optim.AdamW(params, **adamw)))))
    return CombinedOptimizer(parts)


def _of_table(table: str, tables: Tables, frozen: Set[str]) -> tuple[Any, dict[str, Any]]:
    """Class and settings of a table's optimizer."""
    kind, settings = FUSED.get(tables.optimizer, ADAM)
    if table in frozen:
        return kind, {"lr": 0.0, "weight_decay": 0.0, **settings}
    return kind, {"lr": tables.lr_of(table), "weight_decay": tables.weight_decay, **settings}


def with_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make Adam's state now, as its first step would: a checkpoint is loaded into the state that is there, no other."""
    if isinstance(optimizer, torch.optim.Adam):
        for group in optimizer.param_groups:
            for p in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer
