"""Leaves the memory of new tables as it is: torchrec draws every shard twice, for nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """Within the `with`, tensors that would be filled with random numbers keep the memory as it is.

    torchrec fills a shard with uniform numbers in its kernel's constructor, and again with the table's `init_fn`;
    fbgemm's dense kernel makes its weights with `randn`. Initial values or a checkpoint fill them anyway; twice
    8 x 10^8 numbers take 10 s.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a torch function, or do what it does but for filling the tensor."""
        kwargs = kwargs or {}
        if func is Tensor.uniform_:
            return args[0]
        if func is nn.init.uniform_:
            return kwargs["tensor"]  # so it is passed by torch's initialisers
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
