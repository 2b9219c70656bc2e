"""Makes the torchx job that runs one stage under torchrun.

Built on `torchx.components.dist.ddp`, with three differences: memory and CPU defaults that fit training, the Python
interpreter of the submitting environment where it exists, and `recgpt_torchrec.launch.node` around torchrun. This file
knows nothing of what a stage does, and does not import torch, because torchx loads it to list components.
"""

import inspect
import re
import shlex
import sys
import threading
from collections.abc import Callable
from typing import Any, Optional

from torchx import specs
from torchx.components import dist
from torchx.schedulers.api import Stream
from torchx.specs.finder import ComponentValidationException

from recgpt_torchrec.texts.commands import JOB

MEMORY_MB_PER_PROCESS = 4096
"""Memory requested per process, in MB; importing torch and torchrec alone takes about 330 MB."""
CPUS_PER_PROCESS = 2
"""CPU cores requested per process: one for the step, one for the loader and the pipeline's communication."""

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
    rdzv_port: int = 29500,
    mounts: Optional[list[str]] = None,  # noqa: UP045
    debug: bool = False,
) -> specs.AppDef:
    """Make the job that runs `torchrun -m module args` on nodes x processes.

    Args:
        module: Python module of the stage
        args: options of the stage, after `--`; `-- --help` lists them
        j: nodes x processes per node, as in 1x2 or 2x8; 2:4x8 runs on two to four nodes
        cpu: CPU cores per node; 0 requests 2 per process from a scheduler, and uses all cores in a local job
        memMB: memory per node in MB; 0 requests 4096 per process
        gpu: GPUs per node
        h: named resource of torchx, instead of cpu, memMB and gpu
        image: container image with this project installed; local and Slurm jobs do not use it
        name: name of the job, as in experiment/run
        env: environment variables of the job, as in A=1,B=2
        max_retries: how often the scheduler restarts a failed job; training resumes from its newest checkpoint
        max_restarts: how often torchrun restarts the processes when one fails; training resumes in the same way
        rdzv_port: port on the first node where the nodes meet
        mounts: mounts of a container, as in type=bind,src=/data,dst=/data,readonly
        debug: set PyTorch's flags for debugging distributed runs (slow)
    """
    separate_output()
    try:
        processes = dist.parse_nnodes(j)[2]
    except ValueError as error:
        raise ComponentValidationException(str(error)) from None
    job = dist.ddp(
        *args,
        m=module,
        j=j,
        cpu=cpu or CPUS_PER_PROCESS * processes,
        memMB=memMB or MEMORY_MB_PER_PROCESS * processes,
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
    role.env.setdefault(JOB, words_of_command(module.rpartition(".")[2], j, sys.argv))
    if cpu:
        role.env.setdefault("OMP_NUM_THREADS", str(max(1, cpu // processes)))
    return job


def words_of_command(stage: str, j: str, given: list[str]) -> str:
    """The words with which torchx was started up to the stage's options, {} for its name, quoted for a shell.

    The program prints commands to go on with in this form. Names, environment variables and what torchx itself prints
    are left out: they may differ from job to job.

    Args:
        stage: name of the stage.
        j: nodes x processes.
        given: `sys.argv` of torchx; of another program, it is the plain command for these processes.
    """
    component = f"recgpt_torchrec.{stage}"
    if "run" not in given or component not in given:
        words = ["torchx", "run", "recgpt_torchrec.{}", *([] if j == "1x1" else ["-j", j])]
        return shlex.join([*words, "--"])
    words, rest = ["torchx"], iter(given[given.index("run") : given.index("--") if "--" in given else len(given)])
    for word in rest:
        name = word.partition("=")[0]
        if name in ("--name", "--env", "--parent_run_id", "--tee_logs"):
            if "=" not in word and name != "--tee_logs":
                next(rest, None)
        elif name not in ("--wait", "--log", "--dryrun"):
            words.append("recgpt_torchrec.{}" if word == component else word)
    return shlex.join([*words, "--"])


def separate_output() -> None:
    """Make `torchx run` print a local job's standard output to standard output, and its errors to standard error.

    torchx prints both to standard error, where a pipe or a file does not get results. It has no option for it.
    """
    command = sys.modules.get("torchx.cli.cmd_run")
    original = getattr(command, "get_logs", None)
    if command is None or original is None or getattr(original, "separates", False):
        return

    def get_logs(identifier: str, **options: Any) -> None:
        if not identifier.startswith("local"):
            original(identifier=identifier, **options)
            return
        errors = threading.Thread(
            target=original, kwargs={**options, "identifier": identifier, "streams": Stream.STDERR}, daemon=True
        )
        errors.start()
        original(**{**options, "identifier": identifier, "file": sys.stdout, "streams": Stream.STDOUT})
        errors.join()

    get_logs.separates = True  # type: ignore[attr-defined]
    command.get_logs = get_logs  # type: ignore[attr-defined]


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
