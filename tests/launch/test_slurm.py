"""Small runs on a real Slurm cluster of two nodes, disturbed and not, against a run of this machine without Slurm."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from recgpt_torchrec import cli, manifest
from recgpt_torchrec.config.launch.manifest import Manifest
from tools import kill_test, slurm_faults
from tools.slurm_cluster import Cluster, ClusterError
from tools.small_run import walks, write_dataset

EPOCHS, FAULT_STEP = 8, 8


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    if not cluster.is_up():
        pytest.skip("no Slurm cluster is up: python tools/slurm_cluster.py up (root or sudo, Debian's packages)")
    return cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    histories = walks(200, 60, shortest=3, longest=14)
    write_dataset(folder / "data", histories, items=60, rows_per_group=8, groups_per_part=4)
    return folder


@pytest.fixture(scope="module")
def torchx_job(cluster, folder):
    """A run that torchx submitted; it trains while `alone` does."""
    return slurm_faults.submit_torchx(cluster, folder / "data", folder / "torchx", epochs=EPOCHS)


@pytest.fixture(scope="module")
def disturbed(cluster, folder, torchx_job):
    """Two runs of the sbatch script, on the same nodes at the same time, each of them disturbed: ids by output."""
    jobs = {}
    for name, fault in {"signalled": slurm_faults.signal_script, "killed": slurm_faults.kill_rank}.items():
        output = folder / name
        jobs[output] = slurm_faults.submit(cluster, folder / "data", output, epochs=EPOCHS)
        slurm_faults.wait_for_step(cluster, jobs[output], output, FAULT_STEP)
        fault(cluster, jobs[output])
    return jobs


@pytest.fixture(scope="module")
def alone(folder, cluster, torchx_job, disturbed):
    """The same run on two ranks of this machine, without Slurm."""
    slurm_faults.run_here(folder / "data", folder / "alone", EPOCHS)
    return folder / "alone"


def test_a_second_up_changes_nothing(cluster):
    daemons = {file.name: file.read_text() for file in (cluster.folder / "run").glob("*.pid")}
    assert not cluster.up()
    assert daemons == {file.name: file.read_text() for file in (cluster.folder / "run").glob("*.pid")}


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for action in (Cluster(tmp_path).up, Cluster(tmp_path).down):
        with pytest.raises(ClusterError, match="give another --folder"):
            action()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_torchx_runs_two_nodes_to_the_result_of_a_run_without_slurm(cluster, folder, torchx_job, alone):
    assert slurm_faults.wait_for_end(cluster, torchx_job) == "COMPLETED"
    assert kill_test.find_differences(folder / "torchx", alone) == []
    torchx = Path(sys.executable).with_name("torchx")
    command = [str(torchx), "status", f"slurm://torchx/{torchx_job}"]
    deadline = time.monotonic() + 20  # accounting follows after some seconds
    while (
        "SUCCEEDED"
        not in (said := subprocess.run(command, env=cluster.environment, capture_output=True, text=True)).stdout
    ):
        assert time.monotonic() < deadline, said.stdout + said.stderr
        time.sleep(1)


@pytest.mark.parametrize("name", ["signalled", "killed"])
def test_a_disturbed_job_requeues_itself_and_ends_with_the_result_of_an_undisturbed_run(
    cluster, folder, disturbed, alone, name
):
    output = folder / name
    assert slurm_faults.wait_for_end(cluster, disturbed[output]) == "COMPLETED"
    assert slurm_faults.job_field(cluster, disturbed[output], "Restarts") == "1"
    log = Path(f"{output}.log").read_text()
    assert "Resuming from" in log
    assert ("Stopped after step" in log) == (name == "signalled")
    assert kill_test.find_differences(output, alone) == []


def test_a_flow_goes_on_after_success_and_ends_at_a_refusal_without_another_try(cluster, tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,i{n % 7},{n}\n" for n in range(40)))
    jobs = [
        {"run": "prepare --input log.csv --output data --min_count 1"},
        {"run": "prepare --input missing.csv --output none", "name": "refused"},
        {"run": "doctor --data data"},
    ]
    defaults = {"log": "%x.out", "env": f"PYTHONPATH={Path(__file__).parents[2]}"}
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({"defaults": defaults, "jobs": jobs}))
    monkeypatch.chdir(tmp_path)
    words = ["--kind", "slurm", "--flow", "flow.yaml", "--output", "flow.sh"]
    manifest.main(cli.parse(Manifest, "recgpt manifest", words))
    said = subprocess.run(["bash", "flow.sh"], env=cluster.environment, capture_output=True, text=True, check=True)
    ids = {line.split()[1]: line.split()[0] for line in said.stdout.splitlines()}
    ends = {name: slurm_faults.wait_for_end(cluster, job) for name, job in ids.items()}
    assert ends == {"prepare": "COMPLETED", "refused": "FAILED", "doctor": "CANCELLED"}
    assert (tmp_path / "data/manifest.json").exists()
    assert slurm_faults.job_field(cluster, ids["refused"], "ExitCode") == "2:0"
    assert slurm_faults.job_field(cluster, ids["refused"], "Restarts") == "0"
    assert "missing.csv" in (tmp_path / "refused.out").read_text()
