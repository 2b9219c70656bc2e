"""Makes the torchx job that runs one stage under torchrun.

Built on `torchx.components.dist.ddp`, with these differences: memory and cores that fit the stage, the Python
interpreter of the submitting environment where it exists, and `recgpt_torchrec.launch.node` around torchrun, to which
all arguments come whole. This file knows nothing of what a stage does, and does not import torch, because torchx loads
it to list components.
"""

import inspect
import re
import shlex
import sys
from collections.abc import Callable
from typing import Optional

from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

from recgpt_torchrec.launch.arguments import pack
from recgpt_torchrec.launch.command import improve_torchx_run, named_scheduler, words_of_command
from recgpt_torchrec.launch.resources import CPUS_PER_PROCESS, MEMORY_MB_PER_PROCESS, count_resources
from recgpt_torchrec.texts.commands import JOB

# The interpreter of the submitting environment where the job finds it (local, Slurm with a shared file system), else
# that of the image. `$$` is torchx's escape for `$`.
_COMMAND = 'python={python}; [ -x "$$python" ] || python=python3; exec "$$python" -m recgpt_torchrec.launch.node'


def make_job(
    module: str,
    *args: str,
    j: str = "1x1",
    cpu: int = 0,
    memMB: int = 0,
    gpu: int = 0,
    h: Optional[str] = None,  # noqa: UP045 (torchx does not understand `str | None`)
    image: str = "recgpt-torchrec:latest",
    name: str = "/",
    env: Optional[dict[str, str]] = None,  # noqa: UP045
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 0,
    mounts: Optional[list[str]] = None,  # noqa: UP045
    debug: bool = False,
) -> specs.AppDef:
    """Make the job that runs `torchrun -m module args` on nodes x processes.

    Args:
        module: Python module of the stage
        args: options of the stage, after `--`; `-- --help` lists them
        j: nodes x processes per node, as in 1x2 or 2x8; 2:4x8 runs on two to four nodes
        cpu: CPU cores per node; 0 requests 2 per process and 1 per loader process from a scheduler, and uses all cores
            in a local job
        memMB: memory per node in MB; 0 requests what recgpt plan estimates for pretrain, else 4096 per process
        gpu: GPUs per node
        h: named resource of torchx, instead of cpu, memMB and gpu
        image: container image with this project installed; local and Slurm jobs do not use it
        name: name of the job, as in experiment/run
        env: environment variables of the job, as in A=1,B=2
        max_retries: how often the scheduler restarts a failed job; training resumes from its newest checkpoint
        max_restarts: how often torchrun restarts the processes when one fails; training resumes in the same way
        rdzv_port: port on the first node where the nodes meet; 0 derives it from the job's id
        mounts: mounts of a container, as in type=bind,src=/data,dst=/data,readonly
        debug: set PyTorch's flags for debugging distributed runs (slow)
    """
    improve_torchx_run()
    try:
        nodes, _, processes, _ = dist.parse_nnodes(j)
    except ValueError as error:
        raise ComponentValidationException(str(error)) from None
    stage = module.rpartition(".")[2]
    cores, memory_mb = cpu or CPUS_PER_PROCESS * processes, memMB or MEMORY_MB_PER_PROCESS * processes
    # A job on this machine asks for nothing.
    if not (cpu and memMB) and not named_scheduler(sys.argv[1:]).startswith("local"):
        needed = count_resources(stage, args, nodes, processes, gpu)
        cores, memory_mb = cpu or needed.cpu, memMB or needed.memory_mb
        said = f"each node gets {cores} cores and {memory_mb:,} MB, {needed.how}; --cpu and --memMB set it"
        print(f"recgpt_torchrec: {said}", file=sys.stderr, flush=True)
    job = dist.ddp(
        *map(pack, args),
        m=module,
        j=j,
        cpu=cores,
        memMB=memory_mb,
        gpu=gpu,
        h=h,
        image=image,
        name=name,
        env=dict(env or {}),
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
        debug=debug,
    )
    (role,) = job.roles
    shell, command = role.args
    assert command.startswith("torchrun "), command
    node = _COMMAND.format(python=shlex.quote(sys.executable))
    role.args = [shell, f"{node} --max_restarts {max_restarts}{command.removeprefix('torchrun')}"]
    if not rdzv_port:
        role.port_map = {}
    role.env.setdefault(JOB, words_of_command(stage, j, sys.argv))
    if cpu:
        role.env.setdefault("OMP_NUM_THREADS", str(max(1, cpu // processes)))
    return job


def require_one_process(stage_name: str, j: str | None) -> None:
    """Refuse several processes for a stage of which each process would do all the work.

    Raises:
        ComponentValidationException: `j` is more than one process.
    """
    if j not in (None, "1", "1x1"):
        raise ComponentValidationException(f"-j is {j}, but {stage_name} runs in one process; leave -j out")


def with_launch_options(component: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """Add the options of `make_job` to the signature and the docstring of `component(*args, **options)`.

    torchx makes a component's command line from these two; without this each component would repeat all options.
    """
    signature = inspect.signature(make_job)
    options = [option for name, option in signature.parameters.items() if name != "module"]
    arguments = re.sub(r" +module: .*\n", "", (make_job.__doc__ or "").partition("Args:\n")[2])
    component.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    component.__doc__ = f"{inspect.cleandoc(component.__doc__ or '')}\n\nArgs:\n{arguments}"
    return component
