"""A Volcano Job: one task with a pod per node, all started together; a headless service by the plugin svc."""

from recgpt_torchrec.errors import REFUSED
from recgpt_torchrec.launch.manifests.job import Job
from recgpt_torchrec.launch.manifests.pod import CONTAINER, Spec, metadata, pod_template


def write(job: Job) -> list[Spec]:
    """The objects of the job.

    If a pod fails or is evicted, the whole job is started again, up to --retries times, but not after `REFUSED`. The
    first policy that fits is taken. Each RestartJob counts, also one after status 75, for which no policy could make a
    difference. The job fails when the count reaches maxRetry, and 0 would be replaced by 3.
    """
    options = job.options
    spec: Spec = {
        "schedulerName": "volcano",
        "minAvailable": options.nodes,
        "maxRetry": options.retries + 1,
        **({"queue": options.queue} if options.queue else {}),
        **({"priorityClassName": options.priority_class} if options.priority_class else {}),
        "plugins": {"env": [], "svc": ["--publish-not-ready-addresses=true"]},
        "policies": [
            {"exitCode": REFUSED, "action": "TerminateJob"},
            {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        ],
        "tasks": [
            {"name": CONTAINER, "replicas": options.nodes, "template": pod_template(job, first_pod(job))},
        ],
    }
    return [{"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "metadata": metadata(options), "spec": spec}]


def first_pod(job: Job) -> str:
    """Host name of the first pod, in the domain of the service that the plugin svc makes."""
    return f"{job.options.job_name}-{CONTAINER}-0.{job.options.job_name}"
