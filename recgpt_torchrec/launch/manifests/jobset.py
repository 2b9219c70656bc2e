"""A JobSet: one indexed Job with a pod per node, under a headless service that JobSet makes."""

from recgpt_torchrec.errors import REFUSED, STOPPED
from recgpt_torchrec.launch.manifests.job import Job
from recgpt_torchrec.launch.manifests.pod import CONTAINER, Spec, metadata, pod_template


def write(job: Job) -> list[Spec]:
    """The objects of the job."""
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata(job.options, queued=True),
            "spec": jobset_spec(job),
        }
    ]


def jobset_spec(job: Job) -> Spec:
    """The JobSet's specification.

    If a pod fails, its Job fails, and JobSet starts all pods again, up to --retries times. Two statuses are different:
    after `REFUSED` nothing is started again; a pod that ended with `STOPPED`, or because its node was taken, is
    replaced and counts for nothing.
    """
    options = job.options
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": options.retries,
            "rules": [
                {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
            ],
        },
        "replicatedJobs": [
            {
                "name": CONTAINER,
                "replicas": 1,
                "template": {
                    "spec": {
                        "completionMode": "Indexed",
                        "parallelism": options.nodes,
                        "completions": options.nodes,
                        "backoffLimit": 0,
                        "podFailurePolicy": {
                            "rules": [
                                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [REFUSED]}},
                                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
                                {
                                    "action": "Ignore",
                                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                                },
                            ]
                        },
                        "template": pod_template(job, first_pod(job)),
                    }
                },
            }
        ],
    }


def first_pod(job: Job) -> str:
    """Host name of the first pod: its Job's index and its own, in the domain of the JobSet's service."""
    return f"{job.options.job_name}-{CONTAINER}-0-0.{job.options.job_name}"
