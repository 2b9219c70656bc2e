"""The pod of a node: its containers, volumes and resources, which are the same for every kind of job."""

from typing import Any

from recgpt_torchrec.config.launch.manifest import SCRATCH, Manifest
from recgpt_torchrec.launch.manifests.job import Job, Share

CONTAINER = "node"
"""Name of the container, of the task and of the replicated job; Kubeflow's Trainer asks for this one."""
LAUNCHER = ["python", "-m", "recgpt_torchrec.launch.node"]
FETCH = ["python", "-m", "recgpt_torchrec.launch.fetch"]

Spec = dict[str, Any]
"""An object of Kubernetes, as it is written in YAML."""


def launcher_args(job: Job, first_pod: str) -> list[str]:
    """Arguments of the launcher on each node.

    Args:
        job: whose stage is run.
        first_pod: host name at which the other pods find the first one.
    """
    options = job.options
    meeting = ["--nnodes", str(options.nodes)]
    meeting += ["--rdzv_backend", "c10d", "--rdzv_id", options.job_name]
    meeting += ["--rdzv_endpoint", f"{first_pod}:{options.port}"]
    return escape([*job.launcher_options, *meeting, "-m", f"recgpt_torchrec.{job.stage}", *job.words])


def escape(words: list[str]) -> list[str]:
    """Words of a command of which Kubernetes replaces nothing: it reads $$ as $, and $(NAME) as a variable."""
    return [word.replace("$", "$$") for word in words]


def pod_template(job: Job, first_pod: str) -> Spec:
    """The template of the pods, one per node.

    A failed container is not restarted in its pod: the pod fails, and the job's failure policy reads its exit status.
    """
    options = job.options
    container: Spec = {
        "name": CONTAINER,
        "image": options.image,
        "command": list(LAUNCHER),
        "args": launcher_args(job, first_pod),
        **environment(options),
        "ports": [{"name": "rendezvous", "containerPort": options.port}],
        "resources": resources(options, job.share),
        "securityContext": security(options),
        "volumeMounts": mounts(options),
    }
    spec: Spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": options.user,
            "runAsGroup": options.user,
            "fsGroup": options.user,
            "fsGroupChangePolicy": "OnRootMismatch",
        },
        "initContainers": [init_container(job, first_pod)],
        "containers": [container],
        "volumes": volumes(options),
    }
    if options.gpus:  # nodes with GPUs are often kept free of pods that do not tolerate this
        spec["tolerations"] = [{"key": options.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    if options.node_selector:
        spec["nodeSelector"] = dict(each.split("=", 1) for each in options.node_selector)
    if options.priority_class:
        spec["priorityClassName"] = options.priority_class
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if options.pull_secret:
        spec["imagePullSecrets"] = [{"name": options.pull_secret}]
    return {"spec": spec}


def init_container(job: Job, first_pod: str) -> Spec:
    """The step before the stage: copies the data, sees that what is read is there, and waits for the first pod's name.

    It ends with status 2 where something is missing, as the stage would, before any GPU is set up.
    """
    options = job.options
    args = ["--host", first_pod]
    if options.copy_data and job.data:
        args += ["--source", options.copy_data, "--target", job.data]
    for path in job.required:
        args += ["--require", path]
    small = {"cpu": "1", "memory": "1Gi"}
    return {
        "name": "fetch",
        "image": options.image,
        "command": list(FETCH),
        "args": escape(args),
        **environment(options),
        "resources": {"requests": small, "limits": {"memory": "1Gi"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts(options),
    }


def environment(options: Manifest) -> Spec:
    """Environment variables, and the secrets that bring more."""
    made: Spec = {}
    if pairs := options.environment:
        made["env"] = [{"name": name, "value": value.replace("$", "$$")} for name, value in pairs.items()]
    if options.secrets:
        made["envFrom"] = [{"secretRef": {"name": name}} for name in options.secrets]
    return made


def resources(options: Manifest, share: Share) -> Spec:
    """What a pod asks for. Cores are asked for and not limited: a limit would stop threads for parts of each 0.1 s."""
    devices = {}
    if options.gpus:
        devices[options.gpu_resource] = options.gpus
    if options.rdma:
        name, _, count = options.rdma.partition("=")
        devices[name] = int(count)
    memory = f"{round((share.memory_gib or 0) * 1024)}Mi"
    return {
        "requests": {"cpu": f"{round(share.cores * 1000)}m", "memory": memory, **devices},
        "limits": {"memory": memory, **devices},
    }


def security(options: Manifest) -> Spec:
    """Rights of the container: none but locking memory, which RDMA needs."""
    added = {"add": ["IPC_LOCK"]} if options.rdma else {}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], **added}}


def volumes(options: Manifest) -> list[Spec]:
    """The pod's volumes."""
    made: list[Spec] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{round(options.shm * 1024)}Mi"}}
    ]
    if options.scratch is not None:
        made.append({"name": "scratch", "emptyDir": {"sizeLimit": f"{round(options.scratch * 1024)}Mi"}})
    claims = dict.fromkeys(claim for claim, _, _ in options.mounts)
    return made + [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(claims)
    ]


def mounts(options: Manifest) -> list[Spec]:
    """Where a container sees the volumes."""
    made: list[Spec] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if options.scratch is not None:
        made.append({"name": "scratch", "mountPath": SCRATCH})
    numbers = {claim: number for number, claim in enumerate(dict.fromkeys(claim for claim, _, _ in options.mounts))}
    for claim, path, only_read in options.mounts:
        mount: Spec = {"name": f"claim-{numbers[claim]}", "mountPath": path}
        made.append({**mount, "readOnly": True} if only_read else mount)
    return made


def metadata(options: Manifest, *, queued: bool = False) -> Spec:
    """Name, namespace and labels of an object; `queued`: with the label by which Kueue admits it."""
    made: Spec = {"name": options.job_name}
    if options.namespace:
        made["namespace"] = options.namespace
    made["labels"] = {"app.kubernetes.io/name": "recgpt-torchrec", "app.kubernetes.io/instance": options.job_name}
    if queued and options.queue:
        made["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
    return made
