"""Options of the program manifest: the kind of job, its size, and what its nodes get."""

import functools
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.fields import AFTER_DASHES, given_options

KINDS = "kinds"
"""Key in a field's metadata: the kinds of jobs that have the option; without it, all of them."""
PODS = ("jobset", "trainjob", "volcano")
"""Kinds of jobs for Kubernetes."""
IMAGE = "recgpt-torchrec:latest"
"""Image of pods."""
SCRATCH = "/scratch"
"""Where a pod has its own folder on the node's disk."""
MAX_NAME = 40
"""Maximum length of the name of a job for Kubernetes: pods add to it, and their names may have 63 characters."""
TASK = "{task}"
"""Stands in a stage's options for the index of an array's task."""


def _of_pods(default: Any = None, kinds: tuple[str, ...] = PODS) -> Any:
    values: dict[str, Any] = {"default_factory": list} if default == [] else {"default": default}
    return field(metadata={KINDS: kinds}, **values)


_of_slurm = functools.partial(_of_pods, kinds=("slurm",))


@dataclass(kw_only=True)
class Manifest:
    """Write a job that runs a stage on one or several nodes: a script for Slurm's sbatch, or YAML for kubectl.

    The options of the stage are checked as the stage would; nothing is sent to a cluster.

    Example: recgpt manifest --kind slurm --nodes 2 --gpus 8 --output job.sbatch -- pretrain --data D --output R
    """

    kind: Literal["slurm", "jobset", "trainjob", "volcano"]
    """Kind of job: a script for sbatch; for Kubernetes a JobSet (jobset.x-k8s.io/v1alpha2), a Kubeflow Trainer v2
    TrainJob with its runtime (trainer.kubeflow.org/v1alpha1) or a Volcano Job (batch.volcano.sh/v1alpha1)."""
    command: list[str] = field(default_factory=list, metadata={AFTER_DASHES: True})
    """Stage and its options, after --."""
    flow: str | None = _of_slurm()
    """Slurm: YAML file of several jobs that wait for each other, instead of a stage; see configs/slurm/flow.yaml. What
    is written submits them all."""
    output: str | None = None
    """File to write; null: standard output. Another file that is there already is left as it is."""
    overwrite: bool = False
    """Whether to replace a different file at --output."""
    name: str | None = None
    """Name of the job; null: that of the stage."""
    nodes: int = 1
    """Number of nodes, each with one pod or one task of Slurm."""
    gpus: int = 0
    """GPUs per node; 0: the stage computes on the CPU, and ranks communicate by gloo."""
    processes: int | None = None
    """Processes (ranks) per node; null: one per GPU, or one."""
    cpus: float | None = None
    """CPU cores per node; null: two per process, and one per loader process if the run can be planned."""
    memory: float | None = None
    """Memory per node in GiB, of which --shm is a part; null: what recgpt plan estimates, where it can read the data of
    a pretrain run, and 30% more; else 4 per process, for Slurm what the partition gives. A pod gets --shm beside it."""
    image: str | None = None
    """Container image with this project installed; null: recgpt-torchrec:latest, for Slurm no container."""
    volumes: list[str] = field(default_factory=list)
    """What the containers see, as in datasets:/data runs:/runs: persistent volume claims, for Slurm folders; with :ro
    at the end it is only read. Several nodes need claims that are ReadWriteMany."""
    env: list[str] = field(default_factory=list)
    """Environment variables, as in NCCL_DEBUG=INFO."""
    interface: str | None = None
    """Network interface for NCCL and gloo, as in ib0, where nodes have several."""
    numa_binding: Literal["node", "socket", "exclusive", "core-complex"] | None = None
    """Binds each process to the cores near its GPU (torchrun's --numa-binding)."""
    queue: str | None = None
    """Slurm's partition, Kueue's LocalQueue for jobset and trainjob, Volcano's queue; null: none, or the default."""
    grace_seconds: int | None = None
    """Seconds that a job has to save: between the signal that asks pods to end and the one that kills them, and before
    the end of Slurm's time limit. Longer than a step and a checkpoint take; null: 300, for Slurm 120."""
    retries: int = 20
    """How often the whole job is started again after a failure, but never if the stage refused its options (status 2).
    A start after status 75 does not count for jobset and trainjob, counts for Volcano, and is always made by Slurm."""
    max_restarts: int = 0
    """How often torchrun restarts the processes of all nodes by itself when one fails."""
    port: int | None = None
    """Port on the first node where the nodes meet; null: 29500, for Slurm one that follows from the job's id."""
    time: str | None = _of_slurm()
    """Slurm: time limit of a start, as in 12:00:00 or 2-0; a run that needs longer saves before it and is requeued."""
    account: str | None = _of_slurm()
    """Slurm: account that is charged."""
    array: str | None = _of_slurm()
    """Slurm: indices of an array, as in 0-3, one job for each; {task} stands for the index in the stage's options."""
    log: str | None = _of_slurm()
    """Slurm: file of the job's output, %x its name and %j its id; null: %x-%j.out, of an array %x-%A_%a.out."""
    sbatch: list[str] = _of_slurm([])
    """Slurm: further options of sbatch, as in qos=high constraint=a100 exclusive."""
    container_runtime: Literal["pyxis", "apptainer"] = _of_slurm("pyxis")
    """Slurm: what runs the image."""
    namespace: str | None = _of_pods()
    """Pods: namespace of the job; null: the one that kubectl uses."""
    pull_secret: str | None = _of_pods()
    """Pods: secret with which the image is pulled; null: none."""
    shm: float = _of_pods(4.0)
    """Pods: limit of /dev/shm per node in GiB, which loader processes and NCCL use; what lies there is memory too."""
    gpu_resource: str = _of_pods("nvidia.com/gpu")
    """Pods: name that the cluster gives its GPUs."""
    rdma: str | None = _of_pods()
    """Pods: resource of the network adapters and its number per node, as in rdma/hca_shared_devices_a=8; null: none.
    The pods then may lock memory (IPC_LOCK)."""
    scratch: float | None = _of_pods()
    """Pods: size in GiB of a folder on each node's disk, at /scratch; null: none."""
    copy_data: str | None = _of_pods()
    """Pods: folder of an object store that each node copies, before the stage starts, to the folder of the stage's
    --data, which must be in /scratch; null: nothing is copied. Stages also read object stores without copying."""
    secrets: list[str] = _of_pods([])
    """Pods: secrets whose entries are environment variables, as AWS_ACCESS_KEY_ID."""
    priority_class: str | None = _of_pods()
    """Pods: priority class; null: the cluster's default."""
    service_account: str | None = _of_pods()
    """Pods: service account, as for access to an object store; null: the default."""
    node_selector: list[str] = _of_pods([])
    """Pods: labels that nodes must have, as in cloud.google.com/gke-accelerator=nvidia-h100-80gb."""
    user: int = _of_pods(10001)
    """Pods: number of the user and group that they run as; claims are made writable for it."""

    def __post_init__(self) -> None:
        given = given_options(self)
        for each in fields(self):
            kinds = each.metadata.get(KINDS, (self.kind,))
            if each.name in given and self.kind not in kinds:
                raise ValueError(f"--{each.name} is for --kind {' or '.join(kinds)}; leave it out for {self.kind}")
        if self.flow is not None:
            beside = sorted(given.keys() - {"kind", "flow", "output", "overwrite"})
            if beside:
                raise ValueError(f"--{beside[0]} is given beside --flow; write it in its file, below defaults or a job")
            return
        if not self.command:
            raise ValueError("--command is empty; give a stage and its options after --, as in -- pretrain --data ...")
        for name, least, most in (("nodes", 1, 4096), ("gpus", 0, 64), ("port", 1024, 65535)):
            if getattr(self, name) is not None:
                within(f"--{name}", getattr(self, name), least, most)
        counts = {"retries": 0, "max_restarts": 0, "user": 1, "grace_seconds": 1, "processes": 1}
        for name, minimum in {**counts, "cpus": 0.1, "memory": 0.25, "shm": 0.0625, "scratch": 0.001}.items():
            if getattr(self, name) is not None:
                at_least(f"--{name}", getattr(self, name), minimum)
        if self.gpus and self.processes_per_node > self.gpus:
            raise ValueError(
                f"--processes is {self.processes}, but a node has --gpus {self.gpus}; each needs a GPU of its own"
            )
        if self.numa_binding is not None and not self.gpus:
            raise ValueError("--numa_binding binds processes near their GPUs; give --gpus, or leave it out")
        claim = r"/[^:,]+" if self.kind == "slurm" else r"[a-z0-9][-.a-z0-9]*"
        for option, shape, example in (
            ("volumes", rf"{claim}:/[^:,]+(:ro)?", "/data:/data" if self.kind == "slurm" else "datasets:/data"),
            ("env", r"[A-Za-z_][A-Za-z0-9_]*=.*", "NCCL_DEBUG=INFO"),
            ("node_selector", r"[^=\s]+=[^=\s]*", "pool=gpu"),
            ("sbatch", r"[-a-z]+(=.+)?", "qos=high"),
        ):
            for text in getattr(self, option):
                if not re.fullmatch(shape, text, re.DOTALL):
                    raise ValueError(f"--{option} has {text}; give each like {example}")
        self._check_slurm() if self.kind == "slurm" else self._check_pods()

    def _check_slurm(self) -> None:
        """Check what Slurm's jobs alone have.

        Raises:
            ValueError: it cannot work.
        """
        self.grace_seconds = self.grace_seconds or 120
        if self.time is not None:
            if not re.fullmatch(r"(\d+-)?\d+(:\d\d?){0,2}", self.time):
                raise ValueError(f"--time is {self.time}; give it like 12:00:00, 2-0 (days-hours) or 90 (minutes)")
            if seconds_of(self.time) <= self.grace_seconds:
                raise ValueError(
                    f"--time is {self.time}, of which --grace_seconds {self.grace_seconds} are for saving; give more"
                )
        if self.array is not None and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", self.array):
            raise ValueError(f"--array is {self.array}; give indices like 0-3, 1,5,7 or 0-9%2")
        if self.array is None and any(TASK in word for word in self.command):
            raise ValueError(f"--array is not set, of whose tasks {TASK} stands for the index; give it like 0-3")
        if self.volumes and self.image is None:
            raise ValueError("--volumes are what a container sees; give its --image, or leave them out")

    def _check_pods(self) -> None:
        """Check what Kubernetes' jobs alone have.

        Raises:
            ValueError: it cannot work.
        """
        self.grace_seconds, self.image, self.port = self.grace_seconds or 300, self.image or IMAGE, self.port or 29500
        if self.memory is not None and self.memory <= self.shm:
            raise ValueError(
                f"--memory is {self.memory}; it must be more than --shm {self.shm:g}, which is a part of it"
            )
        if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{MAX_NAME - 2}}}[a-z0-9])?", self.job_name):
            raise ValueError(
                f"--name is {self.job_name}; it must have at most {MAX_NAME} lower-case letters, digits and dashes, "
                "and begin with a letter"
            )
        if self.rdma is not None and not re.fullmatch(r"[^=\s]+=[1-9]\d*", self.rdma):
            raise ValueError(
                f"--rdma is {self.rdma}; give the resource and its number, like rdma/hca_shared_devices_a=8"
            )
        places = [path for _, path, _ in self.mounts] + [SCRATCH, "/dev/shm"]
        for place in places:
            if places.count(place) > 1:
                raise ValueError(
                    f"--volumes has {place} twice, or where every pod has it; give each claim a place of its own"
                )
        if self.copy_data is not None and (self.scratch is None or "://" not in self.copy_data):
            raise ValueError(
                f"--copy_data is {self.copy_data}; it must be a URI as s3://bucket/folder, and --scratch the size of "
                "the disk that it is copied to"
            )

    @property
    def job_name(self) -> str:
        """Name of the job."""
        return self.command[0].replace("_", "-") if self.name is None else self.name

    @property
    def processes_per_node(self) -> int:
        """Number of ranks per node."""
        return self.processes or self.gpus or 1

    @property
    def mounts(self) -> list[tuple[str, str, bool]]:
        """Claim or folder, folder in the container, and whether it is only read, of each volume."""
        parts = [each.split(":") for each in self.volumes]
        return [(source, "/" + path.strip("/"), bool(mode)) for source, path, *mode in parts]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables, with those that name the interface."""
        named = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.interface or "")
        return {**(named if self.interface else {}), **dict(each.split("=", 1) for each in self.env)}


def seconds_of(time: str) -> int:
    """A time limit in Slurm's form in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours:...

    Example: `seconds_of("1-12")` is 129600.
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))
