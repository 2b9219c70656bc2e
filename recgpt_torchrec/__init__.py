"""RecGPT (arXiv 2404.08675) on TorchRec: generative sequential retrieval, from an interaction log to lists of items.

    import recgpt_torchrec as rg

    data = rg.Dataset.prepare("log.csv", output="data/mine")
    run = rg.pretrain(data, "runs/mine", options={"train.epochs": 3})
    rg.Recommender.load(run, data).recommend(["shoe", "hat"], k=10).items

Importing the package imports neither torch nor Arrow: what it offers is imported when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recgpt_torchrec.api import Dataset as Dataset
    from recgpt_torchrec.errors import InputError as InputError
    from recgpt_torchrec.serving.recommender import Recommendation as Recommendation
    from recgpt_torchrec.serving.recommender import Recommender as Recommender
    from recgpt_torchrec.serving.requests import History as History
    from recgpt_torchrec.serving.requests import Shown as Shown

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "api",
    "InputError": "errors",
    "Recommendation": "serving.recommender",
    "Recommender": "serving.recommender",
    "History": "serving.requests",
    "Shown": "serving.requests",
}
"""Where each name is defined."""
_STAGES = ("pretrain", "generate_prompts", "prompt_tune", "evaluate", "export", "retrieve")
"""Stage programs that are also functions: `rg.pretrain(...)` calls `api.pretrain`."""


class _Stage(ModuleType):
    """The module of a stage program, which can be called like the function of `api` with its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(importlib.import_module(f"{__name__}.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


class _Package(ModuleType):
    """This package. Importing a submodule sets it here, whoever imports it: so stages are marked here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STAGES and type(value) is ModuleType:
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_STAGES])
