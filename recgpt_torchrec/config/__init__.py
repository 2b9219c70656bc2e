"""All options: one dataclass per stage, built from shared groups; each field has a default and a docstring.

`--help` prints the docstring under a field. `__post_init__` validates the values; its messages say how to fix them.
Other modules import the dataclasses from here, not from the files.
"""

from recgpt_torchrec.config.inputs.attributes import AttributeChoice
from recgpt_torchrec.config.inputs.events import Events, TargetEvents
from recgpt_torchrec.config.inputs.neighbours import AnswerNeighbours, FindNeighbours, Neighbours, RecallNeighbours
from recgpt_torchrec.config.inputs.time import TimeChoice
from recgpt_torchrec.config.model import Loss, Model
from recgpt_torchrec.config.prepare import Prepare
from recgpt_torchrec.config.prompts import GeneratePrompts, Prompts, PromptTune, Tuning
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.config.retrieval import HNSW, IVF, PQ, Apply, BuildIndex, Evaluate, Export, Index, Recall, Retrieve
from recgpt_torchrec.config.serving.encoder import Encoder
from recgpt_torchrec.config.tables import Sharding, Tables
from recgpt_torchrec.config.training import (
    Batch,
    Optimizer,
    Pretrain,
    Saving,
    Stream,
    Train,
    TrainingBatch,
)

__all__ = [
    "HNSW",
    "IVF",
    "PQ",
    "AnswerNeighbours",
    "Apply",
    "AttributeChoice",
    "Batch",
    "BuildIndex",
    "Encoder",
    "Evaluate",
    "Events",
    "Export",
    "FindNeighbours",
    "GeneratePrompts",
    "Index",
    "Loss",
    "Model",
    "Neighbours",
    "Optimizer",
    "Plan",
    "Prepare",
    "Pretrain",
    "PromptTune",
    "Prompts",
    "Recall",
    "RecallNeighbours",
    "Retrieve",
    "Saving",
    "Sharding",
    "Stream",
    "Tables",
    "TargetEvents",
    "TimeChoice",
    "Train",
    "TrainingBatch",
    "Tuning",
]
