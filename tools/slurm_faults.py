"""Disturbs small training runs on a real Slurm cluster in the ways of admins and machines, and compares the results.

    python -m tools.slurm_faults --folder faults

Brings the cluster of `tools/slurm_cluster.py` up with three nodes, one of them spare, and takes it down if it was not
up before. Each run is one job of two nodes that is disturbed once, at a training step, and never helped: it must end
with the tables, moments, decoder and metrics of an undisturbed run, bit for bit. Results are kept in the folder, so the
same command continues where it was stopped.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recgpt_torchrec import cli, manifest
from recgpt_torchrec.config.launch.manifest import Manifest
from tools.kill_test import TRAINING, find_differences
from tools.slurm_cluster import GRACE_SECONDS, Cluster

EPOCHS, FAULT_STEP = 20, 40
"""Length of a run, in epochs of about 10 steps, and the step from which on it is disturbed."""
RUN_SECONDS = 300.0
"""Maximum duration of a run with its disturbance."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY")
Fault = Callable[[Cluster, str], None]


def training_words(data: Path, output: Path, epochs: int = EPOCHS) -> tuple[str, ...]:
    """The stage and options of a small run."""
    # With `auto` a start on a busy machine may measure otherwise, and choose another precision than the one before.
    fixed = {"--train.epochs": epochs, "--train.precision": "fp32"}
    options = {"--data": data, "--output": output, **TRAINING, **fixed}
    return ("pretrain", *(str(word) for option in options.items() for word in option))


def run_here(data: Path, output: Path, epochs: int = EPOCHS) -> None:
    """Train the same without Slurm: two ranks of this machine, through the launcher."""
    launcher = ["--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    stage, *words = training_words(data, output, epochs)
    command = [sys.executable, "-m", "recgpt_torchrec.launch.node", *launcher, "-m", f"recgpt_torchrec.{stage}", *words]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)


def submit(cluster: Cluster, data: Path, output: Path, epochs: int = EPOCHS) -> str:
    """Submit a run on two nodes with a script for sbatch; its log is beside its output. Returns the job's id."""
    sizes = ["--nodes", "2", "--cpus", "2", "--memory", "2", "--log", f"{output}.log"]
    environment = ["--env", "OMP_NUM_THREADS=1", f"PYTHONPATH={Path(__file__).parents[1]}"]
    words = ["--kind", "slurm", *sizes, *environment, "--", *training_words(data, output, epochs)]
    script = output.with_suffix(".sbatch")
    script.write_text(manifest.make_text(cli.parse(Manifest, "recgpt manifest", words)))
    return run(cluster, "sbatch", "--parsable", str(script))


def submit_torchx(cluster: Cluster, data: Path, output: Path, *options: str, epochs: int = EPOCHS) -> str:
    """Submit a run on two nodes with torchx, in the output's parent folder. Returns the job's id."""
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    stage, *words = training_words(data, output, epochs)
    command = [str(Path(sys.executable).with_name("torchx")), "run", "-s", "slurm"]
    done = subprocess.run(
        [*command, f"recgpt_torchrec.{stage}", "-j", "2x1", *options, "--", *words],
        env=environment,
        cwd=output.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RuntimeError(f"torchx run failed: {done.stderr}")
    return done.stdout.strip().rpartition("/")[2]


def run(cluster: Cluster, *command: str) -> str:
    """Run one of Slurm's commands; returns what it printed."""
    done = cluster.run(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout.strip()


def job_field(cluster: Cluster, job: str, name: str) -> str:
    """One field of `scontrol show job`."""
    found = re.search(rf"\b{name}=(\S*)", run(cluster, "scontrol", "show", "job", job))
    return found[1] if found else ""


def wait_for_step(cluster: Cluster, job: str, output: Path, step: int) -> None:
    """Wait until a run has saved a checkpoint of at least that step.

    Raises:
        RuntimeError: it ended, or it took too long.
    """
    deadline = time.monotonic() + RUN_SECONDS
    while not any(int(path.name[5:]) >= step for path in output.glob("checkpoints/step-*[0-9]")):
        if time.monotonic() > deadline or job_field(cluster, job, "JobState") in ENDED:
            raise RuntimeError(f"job {job} did not reach step {step}; see {output}.log")
        time.sleep(0.1)


def wait_for_end(cluster: Cluster, job: str) -> str:
    """Wait until a job has ended for good; returns its state."""
    deadline = time.monotonic() + RUN_SECONDS
    while (state := job_field(cluster, job, "JobState")) not in ENDED:
        if time.monotonic() > deadline:
            return f"{state} after {RUN_SECONDS:.0f} s"
        time.sleep(0.2)
    return state


def signal_script(cluster: Cluster, job: str) -> None:
    """Send SIGUSR1 to the job's script, as Slurm does before the time limit."""
    run(cluster, "scancel", "--signal=USR1", "--batch", job)


def _signal_all(cluster: Cluster, job: str) -> None:
    run(cluster, "scancel", "--signal=USR1", job)


def _requeue(cluster: Cluster, job: str) -> None:
    run(cluster, "scontrol", "requeue", job)


def _reach_time_limit(cluster: Cluster, job: str) -> None:
    run(cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=3")  # asked to save after 1 min


def _preempt(cluster: Cluster, job: str) -> None:
    words = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "srun sleep 3"]
    run(cluster, "sbatch", *words)


def _kill(cluster: Cluster, job: str, node: str, only_ranks: bool) -> None:
    for pid, values in cluster.job_processes(node).items():
        jobs = (values.get("SLURM_JOB_ID"), values.get("SLURM_JOB_ID_HET_GROUP_0"))  # torchx's has one per node
        if job in jobs and values.get("SLURM_STEP_ID") == "0" and ("RANK" in values or not only_ranks):
            os.kill(pid, signal.SIGKILL)


def kill_rank(cluster: Cluster, job: str) -> None:
    """Kill the rank on the second node, but not its launcher."""
    _kill(cluster, job, "node2", only_ranks=True)


def _kill_step(cluster: Cluster, job: str) -> None:
    _kill(cluster, job, "node2", only_ranks=False)


def _drain(cluster: Cluster, job: str) -> None:
    run(cluster, "scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    run(cluster, "scontrol", "requeue", job)


def _kill_second_node(cluster: Cluster, job: str) -> None:
    cluster.kill_node("node2")


def _kill_first_node(cluster: Cluster, job: str) -> None:
    cluster.kill_node("node1")


def _restart_controller(cluster: Cluster, job: str) -> None:
    cluster.kill_daemon("slurmctld")
    time.sleep(3)
    cluster.start_controller()


def _restart_daemon(cluster: Cluster, job: str) -> None:
    cluster.kill_daemon("slurmd.node2")
    time.sleep(3)
    cluster.start_node("node2")


def _suspend(cluster: Cluster, job: str) -> None:
    run(cluster, "scontrol", "suspend", job)
    time.sleep(10)
    run(cluster, "scontrol", "resume", job)


FAULTS: dict[str, Fault] = {
    "scancel --signal=USR1 --batch": signal_script,
    "scancel --signal=USR1": _signal_all,
    "time limit 3 min, --signal=B:USR1@120": _reach_time_limit,
    f"preempted, GraceTime {GRACE_SECONDS} s": _preempt,
    "scontrol requeue": _requeue,
    "node drained, job requeued": _drain,
    "a rank killed": kill_rank,
    "a node's launcher and ranks killed": _kill_step,
    "second node lost": _kill_second_node,
    "first node lost, with the job's script": _kill_first_node,
    "controller killed and started": _restart_controller,
    "a node's slurmd killed and started": _restart_daemon,
    "suspended for 10 s": _suspend,
}
TORCHX: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "torchx: scontrol requeue": (_requeue, ()),
    "torchx: a rank killed, --max_retries 3": (kill_rank, ("--max_retries", "3")),
    "torchx: preempted": (_preempt, ("--max_retries", "3")),
}


def mend(cluster: Cluster) -> None:
    """Bring back nodes that a fault took away, and wait until all are idle."""
    for name in cluster.names:
        state = cluster.states().get(name, "")
        if not cluster.has_daemon(name):
            cluster.start_node(name)
        if state.startswith(("drain", "down")):
            cluster.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
    deadline = time.monotonic() + 60
    while set(cluster.states().values()) != {"idle"}:
        if time.monotonic() > deadline:
            raise RuntimeError(f"nodes are not idle: {cluster.states()}")
        time.sleep(0.2)


def run_fault(cluster: Cluster, folder: Path, data: Path, number: int, name: str) -> dict[str, Any]:
    """Submit a run, disturb it, wait for its end, and compare it with the undisturbed one in `folder/undisturbed`."""
    output = folder / f"run{number:02}"
    if name in TORCHX:
        fault, options = TORCHX[name]
        job = submit_torchx(cluster, data, output, *options)
        logs = [folder / f"slurm-{job}-pretrain-{node}.out" for node in (0, 1)]
    else:
        fault, logs = FAULTS[name], [Path(f"{output}.log")]
        job = submit(cluster, data, output)
    wait_for_step(cluster, job, output, FAULT_STEP)
    nodes, before, start = job_field(cluster, job, "NodeList"), time.monotonic(), time.time()
    fault(cluster, job)
    state = wait_for_end(cluster, job)
    seconds = time.monotonic() - before
    text = "".join(log.read_text(errors="replace") for log in logs)
    resumed = re.findall(r"(\d+-\d+-\d+ \d+:\d+:\d+) .*Resuming from \S*step-0*(\d+)", text)
    back = [time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S")) - start for when, _ in resumed]
    after = job_field(cluster, job, "NodeList")
    differences = find_differences(output, folder / "undisturbed") if state == "COMPLETED" else [state]
    return {
        "fault": name,
        "state": state,
        "back_s": round(back[0]) if back else None,
        "end_s": round(seconds),
        "from": [int(step) for _, step in resumed],
        "starts": 1 + int(job_field(cluster, job, "Restarts") or 0),
        "nodes": nodes if nodes == after else f"{nodes}, then {after}",
        "differences": differences,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Print one line per fault."""
    print(f"\n{'fault':44}{'resumed after':>14}{'at step':>12}{'ended after':>12}{'starts':>8}  result  nodes")
    for each in results:
        steps = ", ".join(map(str, each["from"])) or "-"
        back = f"{each['back_s']} s" if each["back_s"] is not None else "-"
        equal = "DIFFERS" if each["differences"] else "equal"
        line = f"{each['fault']:44}{back:>14}{steps:>12}{each['end_s']:>10} s{each['starts']:>8}  {equal:8}"
        print(line + each["nodes"])


def main() -> int:
    """Run all disturbances that have no result yet, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "recgpt-slurm-faults")
    parser.add_argument("--only", help="a part of the names of the disturbances to run")
    options = parser.parse_args()
    from tools.small_run import walks, write_dataset

    folder, cluster = options.folder.absolute(), Cluster(nodes=3)
    kept, data = folder / "results.jsonl", folder / "data"
    was_up = cluster.is_up()
    cluster.up()
    try:
        if not data.exists():
            write_dataset(data, walks(200, 60, shortest=3, longest=14), items=60, rows_per_group=8, groups_per_part=4)
        if not (folder / "undisturbed.done").exists():
            subprocess.run(["rm", "-rf", folder / "undisturbed"], check=True)
            job = submit(cluster, data, folder / "undisturbed")
            if (state := wait_for_end(cluster, job)) != "COMPLETED":
                raise RuntimeError(f"the undisturbed run ended as {state}; see {folder}/undisturbed.log")
            (folder / "undisturbed.done").touch()
        results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        for number, name in enumerate([*FAULTS, *TORCHX]):
            if name in {each["fault"] for each in results} or (options.only and options.only not in name):
                continue
            subprocess.run(["rm", "-rf", folder / f"run{number:02}", folder / f"run{number:02}.log"], check=True)
            mend(cluster)
            results.append(run_fault(cluster, folder, data, number, name))
            with kept.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print_table(results[-1:])
        mend(cluster)
    finally:
        if not was_up:
            cluster.down()
    print_table(results)
    return any(each["differences"] for each in results)


if __name__ == "__main__":
    sys.exit(main())
