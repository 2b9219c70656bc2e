"""Leaves the memory of new tables as it is: torchrec draws every shard twice, for nothing."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """Fills no tensor with uniform random numbers within the `with`.

    torchrec fills a shard with them in its kernel's constructor, and again with the table's `init_fn`. Initial values
    or a checkpoint fill it anyway; 10^8 x 8 numbers take 12 s.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a torch function; `Tensor.uniform_` returns its tensor unchanged."""
        return args[0] if func is Tensor.uniform_ else func(*args, **(kwargs or {}))
