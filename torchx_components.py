"""One torchx component a stage: `torchx run -s local_cwd recgpt_torchrec.pretrain -j 1x2 -- --config FILE.yaml ...`.

What stands before `--` places the job (`torchx run recgpt_torchrec.pretrain --help`), what stands after it are the
options of `python -m recgpt_torchrec.<stage>`. torchx reads this file's source, so each component is written out, with
its docstring; what they have in common is in `recgpt_torchrec.launch.job`.
"""

from typing import Any

from torchx import specs

from recgpt_torchrec.launch import job


@job.with_launch_options
def prepare(*args: str, **options: Any) -> specs.AppDef:
    """Turn raw interaction logs into a dataset. One process: the engine itself uses every core it is given."""
    job.require_one_process("prepare", options.get("j"))
    return job.make_job("recgpt_torchrec.prepare", *args, **options)


@job.with_launch_options
def pretrain(*args: str, **options: Any) -> specs.AppDef:
    """Train decoder and sharded tables on a dataset; goes on where an unfinished run of the same settings stopped."""
    return job.make_job("recgpt_torchrec.pretrain", *args, **options)


@job.with_launch_options
def generate_prompts(*args: str, **options: Any) -> specs.AppDef:
    """Put prompts between the items of every history: what a pre-trained model answers, or what was shown there."""
    return job.make_job("recgpt_torchrec.generate_prompts", *args, **options)


@job.with_launch_options
def prompt_tune(*args: str, **options: Any) -> specs.AppDef:
    """Go on training a pre-trained model on histories with prompts, or without them, as the control."""
    return job.make_job("recgpt_torchrec.prompt_tune", *args, **options)


@job.with_launch_options
def evaluate(*args: str, **options: Any) -> specs.AppDef:
    """Rank the whole catalogue for every user: HR and NDCG of a checkpoint and of the baselines, as table and JSON."""
    return job.make_job("recgpt_torchrec.evaluate", *args, **options)


@job.with_launch_options
def export(*args: str, **options: Any) -> specs.AppDef:
    """Write item vectors and user vectors of a checkpoint as Parquet."""
    return job.make_job("recgpt_torchrec.export", *args, **options)


@job.with_launch_options
def retrieve(*args: str, **options: Any) -> specs.AppDef:
    """Turn exported vectors into a list of items for each user, with an exact or an approximate index."""
    return job.make_job("recgpt_torchrec.retrieve", *args, **options)
