"""Options of the program manifest: the kind of job, its size, and what its pods get."""

import re
from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, within
from recgpt_torchrec.config.fields import AFTER_DASHES

SCRATCH = "/scratch"
"""Where a pod has its own folder on the node's disk."""
MAX_NAME = 40
"""Maximum length of a job's name: pods add to it, and their names may have 63 characters."""


@dataclass(kw_only=True)
class Manifest:
    """Write a job for Kubernetes that runs a stage on one or several nodes, as a YAML file for kubectl.

    The options of the stage are checked as the stage would; nothing is sent to a cluster.

    Example: recgpt manifest --kind jobset --nodes 2 --gpus 8 --volumes v:/v -- pretrain --data /v/d --output /v/r
    """

    kind: Literal["jobset", "trainjob", "volcano"]
    """Kind of job: a JobSet (jobset.x-k8s.io/v1alpha2), a Kubeflow Trainer v2 TrainJob with its runtime
    (trainer.kubeflow.org/v1alpha1) or a Volcano Job (batch.volcano.sh/v1alpha1)."""
    command: list[str] = field(default_factory=list, metadata={AFTER_DASHES: True})
    """Stage and its options, after --."""
    output: str | None = None
    """File to write; null: standard output. Another file that is there already is left as it is."""
    overwrite: bool = False
    """Whether to replace a different file at --output."""
    name: str | None = None
    """Name of the job; null: that of the stage."""
    namespace: str | None = None
    """Namespace of the job; null: the one that kubectl uses."""
    image: str = "recgpt-torchrec:latest"
    """Container image with this project installed."""
    pull_secret: str | None = None
    """Secret with which the image is pulled; null: none."""
    nodes: int = 1
    """Number of nodes, each with one pod."""
    gpus: int = 0
    """GPUs per node; 0: the stage computes on the CPU, and ranks communicate by gloo."""
    processes: int | None = None
    """Processes (ranks) per node; null: one per GPU, or one."""
    cpus: float | None = None
    """CPU cores per node; null: two per process."""
    memory: float | None = None
    """Memory per node in GiB, of which --shm is a part; null: 4 per process, and --shm."""
    shm: float = 4.0
    """Limit of /dev/shm per node in GiB, which loader processes and NCCL use; what lies there counts as memory."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name that the cluster gives its GPUs."""
    rdma: str | None = None
    """Resource of the network adapters and its number per node, as in rdma/hca_shared_devices_a=8; null: none. The
    pods then may lock memory (IPC_LOCK)."""
    volumes: list[str] = field(default_factory=list)
    """Persistent volume claims and where pods see them, as in datasets:/data runs:/runs; datasets:/data:ro is only
    read. Several nodes need claims that are ReadWriteMany."""
    scratch: float | None = None
    """Size in GiB of a folder on each node's disk, at /scratch; null: none."""
    copy_data: str | None = None
    """Folder of an object store that each node copies, before the stage starts, to the folder of the stage's --data,
    which must be in /scratch; null: nothing is copied. Stages also read object stores without copying."""
    secrets: list[str] = field(default_factory=list)
    """Secrets whose entries are environment variables of the pods, as AWS_ACCESS_KEY_ID."""
    env: list[str] = field(default_factory=list)
    """Environment variables of the pods, as in NCCL_DEBUG=INFO."""
    queue: str | None = None
    """Queue: Kueue's LocalQueue for jobset and trainjob, Volcano's queue for volcano; null: none, or the default."""
    priority_class: str | None = None
    """Priority class of the pods; null: the cluster's default."""
    service_account: str | None = None
    """Service account of the pods, as for access to an object store; null: the default."""
    node_selector: list[str] = field(default_factory=list)
    """Labels that nodes must have, as in cloud.google.com/gke-accelerator=nvidia-h100-80gb."""
    user: int = 10001
    """Number of the user and group that the pods run as; claims are made writable for it."""
    grace_seconds: int = 300
    """Seconds between the signal that asks pods to end and the one that kills them: for a step and a checkpoint."""
    retries: int = 20
    """How often the whole job is started again when a pod failed; not if a stage refused its options (status 2)."""
    max_restarts: int = 0
    """How often torchrun restarts the processes of all nodes by itself when one fails."""
    port: int = 29500
    """Port on the first pod where the nodes meet."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("--command is empty; give a stage and its options after --, as in -- pretrain --data ...")
        within("--nodes", self.nodes, 1, 4096)
        within("--gpus", self.gpus, 0, 64)
        within("--port", self.port, 1024, 65535)
        for name, minimum in (("retries", 0), ("max_restarts", 0), ("grace_seconds", 1), ("user", 1), ("shm", 0.0625)):
            at_least(f"--{name}", getattr(self, name), minimum)
        for name, minimum in (("processes", 1), ("cpus", 0.1), ("memory", 0.25), ("scratch", 0.001)):
            if getattr(self, name) is not None:
                at_least(f"--{name}", getattr(self, name), minimum)
        if self.gpus and self.processes_per_node > self.gpus:
            raise ValueError(
                f"--processes is {self.processes}, but a node has --gpus {self.gpus}; each needs a GPU of its own"
            )
        if self.memory_gib <= self.shm:
            raise ValueError(
                f"--memory is {self.memory}; it must be more than --shm {self.shm:g}, which is a part of it"
            )
        if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{MAX_NAME - 2}}}[a-z0-9])?", self.job_name):
            raise ValueError(
                f"--name is {self.job_name}; it must have at most {MAX_NAME} lower-case letters, digits and dashes, "
                "and begin with a letter"
            )
        for option, shape, example in (
            ("volumes", r"[a-z0-9][-.a-z0-9]*:/[^:]+(:ro)?", "datasets:/data"),
            ("env", r"[A-Za-z_][A-Za-z0-9_]*=.*", "NCCL_DEBUG=INFO"),
            ("node_selector", r"[^=\s]+=[^=\s]*", "pool=gpu"),
        ):
            for each in getattr(self, option):
                if not re.fullmatch(shape, each, re.DOTALL):
                    raise ValueError(f"--{option} has {each}; give each like {example}")
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
    def cores(self) -> float:
        """CPU cores per node."""
        return self.cpus or 2 * self.processes_per_node

    @property
    def memory_gib(self) -> float:
        """Memory per node in GiB."""
        return self.memory or 4 * self.processes_per_node + self.shm

    @property
    def mounts(self) -> list[tuple[str, str, bool]]:
        """Claim, folder in the pod, and whether it is only read, of each volume."""
        parts = [each.split(":") for each in self.volumes]
        return [(claim, "/" + path.strip("/"), bool(mode)) for claim, path, *mode in parts]
