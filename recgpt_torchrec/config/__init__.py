"""Everything a user can set: one dataclass a stage, built from shared groups; each field with its unit and default.

The docstring under a field is what `--help` prints. Validation stands in `__post_init__`, with the fix in the message.
Other modules import from here, not from the files.
"""

from recgpt_torchrec.config.model import Loss, Model
from recgpt_torchrec.config.prepare import Prepare
from recgpt_torchrec.config.prompts import GeneratePrompts, Prompts, PromptTune, Tuning
from recgpt_torchrec.config.retrieval import HNSW, IVF, Evaluate, Export, Recall, Retrieve
from recgpt_torchrec.config.training import (
    Batch,
    Optimizer,
    Pretrain,
    Saving,
    Sharding,
    Stream,
    Tables,
    Train,
)

__all__ = [
    "HNSW",
    "IVF",
    "Batch",
    "Evaluate",
    "Export",
    "GeneratePrompts",
    "Loss",
    "Model",
    "Optimizer",
    "Prepare",
    "Pretrain",
    "PromptTune",
    "Prompts",
    "Recall",
    "Retrieve",
    "Saving",
    "Sharding",
    "Stream",
    "Tables",
    "Train",
    "Tuning",
]
