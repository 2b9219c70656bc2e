"""Command lines whose jobs are in tests/launch/manifests; `python -m tests.launch.manifest_cases` records them anew."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from recgpt_torchrec import cli, manifest
from recgpt_torchrec.config.launch.manifest import PODS as KINDS
from recgpt_torchrec.config.launch.manifest import Manifest

GOLDEN = Path(__file__).with_name("manifests")
CASES = {
    "gpu": "--name day-1 --namespace ml --image registry.example/recgpt:1 --pull_secret pull --nodes 2 --gpus 8 "
    "--cpus 96 --memory 900 --shm 64 --rdma rdma/hca_shared_devices_a=8 --volumes datasets:/data:ro runs:/runs "
    "--scratch 500 --copy_data s3://logs/mine --secrets s3-keys --env NCCL_DEBUG=INFO --queue team-a "
    "--priority_class high --service_account trainer "
    "--node_selector pool=h100 --grace_seconds 600 --retries 50 --max_restarts 2 -- pretrain "
    "--data /scratch/mine --output /runs/first --initial /runs/before --train.precision bf16 "
    "--saving.every_minutes 10".split(),
    "cpu": "--nodes 2 --processes 2 --volumes shared:/shared -- evaluate --data /shared/d --checkpoint /shared/r "
    "--output /shared/test.json --split test".split(),
}  # fmt: skip


def write(kind: str, words: list[str], folder: Path) -> str:
    """The text of the job that a command line gives."""
    file = folder / f"{kind}.yaml"
    given = ["--kind", kind, "--output", str(file), "--overwrite", "true", *words]
    manifest.main(cli.parse(Manifest, "recgpt manifest", given))
    return file.read_text()


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The specification of a job's pods."""
    spec = objects[0]["spec"]
    if "tasks" in spec:
        return spec["tasks"][0]["template"]["spec"]
    spec = spec["template"]["spec"] if "mlPolicy" in spec else spec
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def place_container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The container of the stage; of a TrainJob, with what it sets put into its runtime's."""
    container = dict(pod_of(objects)["containers"][0])
    if objects[-1]["kind"] == "TrainJob":
        trainer = objects[-1]["spec"]["trainer"]
        container |= {name: trainer[name] for name in ("image", "command", "args")}
        container |= {"resources": trainer["resourcesPerNode"]}
    return container


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, words in CASES.items():
            for kind in KINDS:
                (GOLDEN / f"{name}-{kind}.yaml").write_text(write(kind, words, Path(scratch)))
    print(f"Written: {GOLDEN}", file=sys.stderr)
