"""One torchx component per stage: `torchx run recgpt_torchrec.pretrain -j 1x2 -- --data data/mine --output runs/mine`.

Options before `--` place the job (`torchx run recgpt_torchrec.pretrain --help`), those after it are the options of
`python -m recgpt_torchrec.<stage>`. torchx reads the source of this file, so each component is written out, with its
docstring. What they share is in `recgpt_torchrec.launch.job`.
"""

from typing import Any

from torchx import specs

from recgpt_torchrec.launch import job


@job.with_launch_options
def prepare(*args: str, **options: Any) -> specs.AppDef:
    """Turn a raw interaction log into a dataset. Runs in one process; its engine uses all cores it is given."""
    job.require_one_process("prepare", options.get("j"))
    return job.make_job("recgpt_torchrec.prepare", *args, **options)


@job.with_launch_options
def find_neighbours(*args: str, **options: Any) -> specs.AppDef:
    """Find the items that follow each item of a dataset. Runs in one process; its engine uses all cores it is given."""
    job.require_one_process("find_neighbours", options.get("j"))
    return job.make_job("recgpt_torchrec.find_neighbours", *args, **options)


@job.with_launch_options
def pretrain(*args: str, **options: Any) -> specs.AppDef:
    """Pre-train decoder and sharded tables on a dataset; resumes an unfinished run with the same options."""
    return job.make_job("recgpt_torchrec.pretrain", *args, **options)


@job.with_launch_options
def generate_prompts(*args: str, **options: Any) -> specs.AppDef:
    """Insert prompts between the interactions of every history: items that a model generates or that were shown."""
    return job.make_job("recgpt_torchrec.generate_prompts", *args, **options)


@job.with_launch_options
def prompt_tune(*args: str, **options: Any) -> specs.AppDef:
    """Continue training a pre-trained model on histories with prompts, or without, as the control."""
    return job.make_job("recgpt_torchrec.prompt_tune", *args, **options)


@job.with_launch_options
def evaluate(*args: str, **options: Any) -> specs.AppDef:
    """Rank the whole catalogue for every user: HR@k and NDCG@k of a checkpoint and of the baselines, also as JSON."""
    return job.make_job("recgpt_torchrec.evaluate", *args, **options)


@job.with_launch_options
def export(*args: str, **options: Any) -> specs.AppDef:
    """Write the item vectors and user vectors of a checkpoint as Parquet, for an ANN index."""
    return job.make_job("recgpt_torchrec.export", *args, **options)


@job.with_launch_options
def apply(*args: str, **options: Any) -> specs.AppDef:
    """Apply deltas to the export they were made from, and write the whole export. Runs in one process, without GPUs."""
    job.require_one_process("apply", options.get("j"))
    return job.make_job("recgpt_torchrec.apply", *args, **options)


@job.with_launch_options
def index(*args: str, **options: Any) -> specs.AppDef:
    """Build a FAISS index of an export's item vectors, in shards, and keep it in the export."""
    return job.make_job("recgpt_torchrec.index", *args, **options)


@job.with_launch_options
def retrieve(*args: str, **options: Any) -> specs.AppDef:
    """Turn an export into a list of items for each user, with an exact or an approximate index."""
    return job.make_job("recgpt_torchrec.retrieve", *args, **options)


@job.with_launch_options
def recommend(*args: str, **options: Any) -> specs.AppDef:
    """Recommend items after histories of raw keys. Runs in one process."""
    job.require_one_process("recommend", options.get("j"))
    return job.make_job("recgpt_torchrec.recommend", *args, **options)


@job.with_launch_options
def run(*args: str, **options: Any) -> specs.AppDef:
    """Run the stages from a raw log to lists, one after the other. Runs in one process."""
    job.require_one_process("run", options.get("j"))
    return job.make_job("recgpt_torchrec.run", *args, **options)


@job.with_launch_options
def report(*args: str, **options: Any) -> specs.AppDef:
    """Write one HTML file about runs and their evaluations. Runs in one process, without GPUs."""
    job.require_one_process("report", options.get("j"))
    return job.make_job("recgpt_torchrec.report", *args, **options)


@job.with_launch_options
def plan(*args: str, **options: Any) -> specs.AppDef:
    """Estimate sharding, memory, traffic and time of a pretrain run on a cluster. Runs in one process, without GPUs."""
    job.require_one_process("plan", options.get("j"))
    return job.make_job("recgpt_torchrec.plan", *args, **options)


@job.with_launch_options
def doctor(*args: str, **options: Any) -> specs.AppDef:
    """Look at versions, a machine, a dataset and a configuration before a run. Runs in one process."""
    job.require_one_process("doctor", options.get("j"))
    return job.make_job("recgpt_torchrec.doctor", *args, **options)


@job.with_launch_options
def manifest(*args: str, **options: Any) -> specs.AppDef:
    """Write a job that runs a stage: a script for Slurm, or YAML for Kubernetes. Runs in one process."""
    job.require_one_process("manifest", options.get("j"))
    return job.make_job("recgpt_torchrec.manifest", *args, **options)
