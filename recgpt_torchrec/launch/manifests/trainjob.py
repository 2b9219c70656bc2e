"""A TrainJob of Kubeflow Trainer v2, and the TrainingRuntime that it refers to.

The runtime holds what a team sets once (volumes, retries, security), the TrainJob what a run sets: image, command,
nodes, resources. The Trainer makes a JobSet of both.
"""

from recgpt_torchrec.launch.manifests.job import Job
from recgpt_torchrec.launch.manifests.jobset import first_pod, jobset_spec
from recgpt_torchrec.launch.manifests.pod import CONTAINER, LAUNCHER, Spec, environment, launcher_args, metadata
from recgpt_torchrec.launch.manifests.pod import resources as resources_per_node

API = "trainer.kubeflow.org"
OF_THE_TRAINJOB = ("command", "args", "env", "resources")
"""What of the container the TrainJob sets."""


def write(job: Job) -> list[Spec]:
    """The objects of the job: its runtime, then the TrainJob."""
    options, spec = job.options, jobset_spec(job)
    (replicated,) = spec["replicatedJobs"]
    replicated["template"]["metadata"] = {"labels": {f"{API}/trainjob-ancestor-step": "trainer"}}
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    for name in OF_THE_TRAINJOB:
        container.pop(name, None)
    for name in ("parallelism", "completions"):  # the Trainer sets these to the number of nodes
        replicated["template"]["spec"].pop(name)
    runtime = {
        "apiVersion": f"{API}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {**metadata(options), "labels": {**metadata(options)["labels"], f"{API}/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": options.nodes, "torch": {}}, "template": {"spec": spec}},
    }
    given = environment(options)
    trainer: Spec = {
        "image": options.image,
        "command": list(LAUNCHER),
        "args": launcher_args(job, first_pod(job)),
        "numNodes": options.nodes,
        "numProcPerNode": options.processes_per_node,
        "resourcesPerNode": resources_per_node(options, job.share),
        **({"env": given["env"]} if "env" in given else {}),
    }
    trainjob = {
        "apiVersion": f"{API}/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(options, queued=True),
        "spec": {
            "runtimeRef": {"apiGroup": API, "kind": "TrainingRuntime", "name": options.job_name},
            "trainer": trainer,
        },
    }
    assert container["name"] == CONTAINER
    return [runtime, trainjob]
