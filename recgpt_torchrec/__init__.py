"""RecGPT (arXiv 2404.08675) on TorchRec: generative sequential retrieval, from an interaction log to lists of items.

    import recgpt_torchrec as rg

    data = rg.Dataset.prepare("log.csv", output="data/mine")
    run = rg.api.pretrain(data, "runs/mine", options={"train.epochs": 3})
    rg.Recommender.load(run, data).recommend(["shoe", "hat"], k=10).items

Importing the package imports neither torch nor Arrow: what it offers is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recgpt_torchrec import api as api
    from recgpt_torchrec.api import Dataset as Dataset
    from recgpt_torchrec.config import RecallNeighbours as RecallNeighbours
    from recgpt_torchrec.errors import InputError as InputError
    from recgpt_torchrec.serving.recommender import Recommendation as Recommendation
    from recgpt_torchrec.serving.recommender import Recommender as Recommender
    from recgpt_torchrec.serving.requests import History as History
    from recgpt_torchrec.serving.requests import Shown as Shown

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "api",
    "InputError": "errors",
    "RecallNeighbours": "config",
    "Recommendation": "serving.recommender",
    "Recommender": "serving.recommender",
    "History": "serving.requests",
    "Shown": "serving.requests",
}
"""Where each class is defined. The stages as functions are in the module `api`."""


def __getattr__(name: str) -> Any:
    if name == "api":
        return importlib.import_module(f"{__name__}.api")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "api"])
