"""The stages in the order in which data flows through them, then what helps: options and purpose of each."""

from dataclasses import dataclass

from recgpt_torchrec.config.inputs.neighbours import FindNeighbours
from recgpt_torchrec.config.launch.manifest import Manifest
from recgpt_torchrec.config.prepare import Prepare
from recgpt_torchrec.config.prompts import GeneratePrompts, PromptTune
from recgpt_torchrec.config.reports.doctor import Doctor
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.config.reports.report import Report
from recgpt_torchrec.config.retrieval import Apply, BuildIndex, Evaluate, Export, Retrieve
from recgpt_torchrec.config.serving.recommend import Recommend
from recgpt_torchrec.config.serving.run import RunAll
from recgpt_torchrec.config.training import Pretrain


@dataclass(frozen=True)
class Stage:
    """One program: `main` of its module, run by `recgpt NAME` or `python -m recgpt_torchrec.NAME`."""

    config: type
    """Dataclass of its options."""
    purpose: str
    """What it reads and writes, in one line."""


STAGES = {
    "prepare": Stage(Prepare, "a raw interaction log -> a dataset: sequence Parquet, id vocabularies, manifest"),
    "find_neighbours": Stage(FindNeighbours, "a dataset -> the items that follow each item, as soft targets"),
    "pretrain": Stage(Pretrain, "a dataset -> a checkpoint of decoder and sharded tables, trained autoregressively"),
    "generate_prompts": Stage(GeneratePrompts, "dataset and checkpoint -> a dataset with prompts between interactions"),
    "prompt_tune": Stage(PromptTune, "prompt dataset and checkpoint -> a checkpoint tuned on histories with prompts"),
    "evaluate": Stage(Evaluate, "dataset and checkpoint -> HR and NDCG of every recall path and of the baselines"),
    "export": Stage(Export, "checkpoint and dataset -> item vectors and user vectors as Parquet, for an ANN index"),
    "apply": Stage(Apply, "an export and the deltas after it -> the export that is whole after them"),
    "index": Stage(BuildIndex, "an export -> the same export with a FAISS index of its item vectors"),
    "retrieve": Stage(Retrieve, "an export -> a list of items for each user, from an exact or an approximate index"),
    "recommend": Stage(Recommend, "a checkpoint and histories of raw keys -> a list of items for each, at once"),
    "run": Stage(RunAll, "a raw interaction log -> lists for all users: the stages above, one after the other"),
    "report": Stage(Report, "runs and their evaluations -> one HTML file: curves, metrics, differences, lists"),
    "plan": Stage(Plan, "sizes and a cluster -> sharding, memory, traffic and time of pretrain, without a GPU"),
    "doctor": Stage(Doctor, "versions, this machine, a dataset, options -> what would make a run fail or disappoint"),
    "manifest": Stage(Manifest, "a stage's command line -> a job: a script for Slurm, or YAML for Kubernetes"),
}


def module_of(name: str) -> str:
    """The full name of a stage's module."""
    return f"recgpt_torchrec.{name}"
