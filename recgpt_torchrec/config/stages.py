"""The stages: their names, in the order in which data flows through them, their options, and what each is for."""

from dataclasses import dataclass

from recgpt_torchrec.config.prepare import Prepare
from recgpt_torchrec.config.prompts import GeneratePrompts, PromptTune
from recgpt_torchrec.config.retrieval import Evaluate, Export, Retrieve
from recgpt_torchrec.config.training import Pretrain


@dataclass(frozen=True)
class Stage:
    """A program of its own, `main` of its module; `recgpt NAME` and `python -m recgpt_torchrec.NAME` run it."""

    config: type
    """Its options."""
    purpose: str
    """In one line."""


STAGES = {
    "prepare": Stage(Prepare, "a raw interaction log -> a dataset: sequence Parquet, id vocabularies, manifest"),
    "pretrain": Stage(Pretrain, "a dataset -> a checkpoint of decoder and sharded tables, trained autoregressively"),
    "generate_prompts": Stage(GeneratePrompts, "dataset and checkpoint -> the dataset with prompts between the items"),
    "prompt_tune": Stage(PromptTune, "prompt dataset and checkpoint -> a checkpoint tuned on histories with prompts"),
    "evaluate": Stage(Evaluate, "dataset and checkpoint -> HR and NDCG of every recall path, beside baselines"),
    "export": Stage(Export, "checkpoint and dataset -> item vectors and user vectors as Parquet, for an ANN index"),
    "retrieve": Stage(Retrieve, "an export -> a list of items for each user, by an exact or an approximate index"),
}


def module_of(name: str) -> str:
    """The module of a stage."""
    return f"recgpt_torchrec.{name}"
