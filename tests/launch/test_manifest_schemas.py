"""Jobs for Kubernetes against published models and schemas; skipped without the packages of `make kubernetes`.

JobSet, TrainJob and TrainingRuntime: the models of kubeflow-trainer-api. Pods and Jobs in them: the schemas of
Kubernetes in kubernetes-validate, strictly. No package has a schema of Volcano's Job: its own fields are compared with
what its definition lists, its pods with Kubernetes' schema.
"""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.manifest_cases import CASES, GOLDEN, KINDS, pod_of

models = pytest.importorskip("kubeflow_trainer_api.models", reason="make kubernetes installs it")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make kubernetes installs it")

RELEASES = ("1.31", "1.37")
"""Kubernetes' releases whose schemas are asked: the first with stable pod failure policies, and a new one."""
VOLCANO = {
    "spec": {"maxRetry", "minAvailable", "minSuccess", "networkTopology", "plugins", "policies", "priorityClassName"}
    | {"queue", "runningEstimate", "schedulerName", "tasks", "ttlSecondsAfterFinished", "volumes"},
    "policy": {"action", "event", "events", "exitCode", "timeout"},
    "task": {"dependsOn", "maxRetry", "minAvailable", "name", "partitionPolicy", "policies", "replicas", "template"}
    | {"topologyPolicy"},
    "events": {"*", "PodPending", "PodRunning", "PodFailed", "PodEvicted", "Unknown", "TaskCompleted", "TaskFailed"}
    | {"OutOfSync", "CommandIssued", "JobUpdated"},
    "actions": {"AbortJob", "RestartJob", "RestartTask", "RestartPod", "TerminateJob", "CompleteJob", "ResumeJob"},
}
"""Fields and words of batch.volcano.sh/v1alpha1, read from config/crd/volcano/bases/batch.volcano.sh_jobs.yaml of
volcano-sh/volcano at commit 0318bf611b5e."""
MODELS = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
}


def recorded() -> list[Any]:
    return [pytest.param(case, kind, id=f"{case}-{kind}") for case in CASES for kind in KINDS]


def read(case: str, kind: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((GOLDEN / f"{case}-{kind}.yaml").read_text()))


def lost_fields(given: Any, kept: Any, place: str = "") -> list[str]:
    """Places of what is in `given` and not, or not the same, in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [f for name, value in given.items() for f in lost_fields(value, kept.get(name), f"{place}.{name}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [f for n, (a, b) in enumerate(zip(given, kept, strict=True)) for f in lost_fields(a, b, f"{place}[{n}]")]
    return [] if given == kept or (given in ({}, []) and kept in (None, {}, [])) else [place]


def check_model(given: dict[str, Any]) -> None:
    """Parse an object with its published model, which checks types and what is required, and drops unknown fields."""
    model = getattr(models, MODELS[given["kind"]])
    assert lost_fields(given, model.from_dict(copy.deepcopy(given)).to_dict()) == []


def check_pod(spec: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
    for release in RELEASES:
        kubernetes_validate.validate(pod, release, strict=True)


def check_volcano(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert job["apiVersion"] == "batch.volcano.sh/v1alpha1" and job["kind"] == "Job"
    assert set(spec) <= VOLCANO["spec"]
    assert spec["minAvailable"] <= sum(task["replicas"] for task in spec["tasks"])
    assert all(isinstance(words, list) and all(isinstance(w, str) for w in words) for words in spec["plugins"].values())
    for task in spec["tasks"]:
        assert set(task) <= VOLCANO["task"] and set(task["template"]) <= {"metadata", "spec"}
    for policy in spec["policies"]:
        assert set(policy) <= VOLCANO["policy"] and policy["action"] in VOLCANO["actions"]
        assert len({"event", "events", "exitCode"} & set(policy)) == 1 and policy.get("exitCode") != 0
        assert set(policy.get("events", [])) <= VOLCANO["events"]


@pytest.mark.parametrize(("case", "kind"), recorded())
def test_recorded_jobs_are_what_is_published(case: str, kind: str) -> None:
    objects = read(case, kind)
    for each in objects:
        check_volcano(each) if each["kind"] == "Job" else check_model(each)
    check_pod(pod_of(objects))
    if kind == "jobset":  # the Job that JobSet makes
        job = objects[0]["spec"]["replicatedJobs"][0]["template"]["spec"]
        for release in RELEASES:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}
            kubernetes_validate.validate(whole, release, strict=True)


def test_what_is_wrong_is_found() -> None:
    (jobset,) = read("gpu", "jobset")
    wrong = copy.deepcopy(jobset)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match="maxRestart"):
        check_model(wrong)
    wrong = copy.deepcopy(jobset)
    wrong["spec"]["failurePolicy"]["maxRestarts"] = "3"
    with pytest.raises(ValueError):
        check_model(wrong)
    pod = copy.deepcopy(pod_of([jobset]))
    pod["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(pod)
    (volcano,) = read("gpu", "volcano")
    volcano["spec"]["policies"][0]["event"] = "PodFailed"
    with pytest.raises(AssertionError):
        check_volcano(volcano)


def test_container_files_have_no_findings() -> None:
    linter = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    files = sorted((Path(__file__).parents[2] / "containers").glob("*.Dockerfile"))
    assert len(files) == 2
    done = subprocess.run([linter, *map(str, files)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
