"""Jobs for Slurm, run by a real bash with stand-ins for Slurm's commands, and the flow of several."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from recgpt_torchrec import cli, manifest
from recgpt_torchrec.config.launch.manifest import Manifest, seconds_of
from recgpt_torchrec.errors import REFUSED, InputError

ROOT = Path(__file__).parents[2]
PRETRAIN = ["--", "pretrain", "--data", "d", "--output", "r"]
EXPORT = ["--", "export", "--data", "d", "--checkpoint", "r", "--output", "v"]


def make(*words):
    """The text that a command line gives."""
    return manifest.make_text(cli.parse(Manifest, "recgpt manifest", ["--kind", "slurm", *words]))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins on PATH: srun notes its words and does what `step` says, the others note that they were called."""
    commands = {
        "srun": 'printf "%s\\0" "$@" > words; env > environment; eval "$(cat step)"',
        "scontrol": '[ "$1" = show ] && { echo node7; echo node8; } || echo "$@" >> calls',
        "squeue": "cat state",
        "sbatch": 'n=$(($(cat count) + 1)); echo $n > count; cat > "script$n"; echo "$@" >> calls; echo "10$n;cluster"',
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{line}\n")
        file.chmod(0o755)
    for name, text in {"state": "RUNNING", "step": "exit 0", "count": "0", "calls": ""}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(script, **more):
    values = {"SLURM_JOB_ID": "40123", "SLURM_CPUS_PER_TASK": "6", "SLURM_JOB_NODELIST": "node[7-8]"}
    environment = {**os.environ, **values, "SLURM_JOB_NUM_NODES": "2", **more}
    return subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def options(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_job_is_homogeneous_with_a_task_a_node_and_what_was_asked_for():
    sizes = "--nodes 2 --gpus 8 --cpus 64 --memory 250 --time 12:00:00 --queue train".split()
    script = make(*sizes, *PRETRAIN)
    assert options(script) == [
        "--job-name=pretrain",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--mem=256000M",
        "--gpus-per-node=8",
        "--time=12:00:00",
        "--partition=train",
        "--output=%x-%j.out",
        "--signal=B:USR1@120",
        "--open-mode=append",
        "--requeue",
    ]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    bare = options(make("--processes", "3", "--sbatch", "qos=high", "exclusive", *EXPORT))
    assert "--cpus-per-task=6" in bare and {"--qos=high", "--exclusive"} <= set(bare)
    assert not [option for option in bare if option.startswith(("--mem", "--gpus", "--time", "--partition"))]


def test_words_cores_and_the_meeting_place_reach_the_launcher_whole(slurm):
    sizes = "--nodes 2 --processes 4 --array 1-3 --interface ib0 --env".split()
    words = ["--data", "my data, it's", "--seed", "{task}", "--output", "r/{task}/x", "--initial", "$HOME *"]
    script = make(*sizes, "A=b c", "--", "pretrain", *words)
    assert start(script, SLURM_ARRAY_TASK_ID="3").wait(20) == 0
    given = (slurm / "words").read_text().split("\0")[:-1]
    stage = given.index("-m", given.index("--rdzv_id"))
    assert given[stage + 1 :] == [
        *("recgpt_torchrec.pretrain", "--data", "my data, it's", "--seed", "3"),
        *("--output", "r/3/x", "--initial", "$HOME *"),
    ]
    launcher = given[:stage]
    assert launcher[launcher.index("--rdzv_endpoint") + 1] == "node7:0"  # the launcher takes a port by the id
    assert launcher[launcher.index("--nnodes") + 1] == "2" and launcher[launcher.index("--nproc_per_node") + 1] == "4"
    environment = (slurm / "environment").read_text().splitlines()
    wanted = {"SRUN_CPUS_PER_TASK=6", "A=b c", "NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"}
    assert wanted <= set(environment)


@pytest.mark.parametrize(
    ("status", "starts_before", "state", "requeued"),
    [
        (0, 0, "RUNNING", False),
        (2, 0, "RUNNING", False),  # refused
        (75, 0, "RUNNING", True),  # saved after a signal
        (75, 50, "RUNNING", True),
        (75, 0, "COMPLETING", False),  # cancelled by somebody
        (137, 2, "RUNNING", True),
        (137, 3, "RUNNING", False),  # of --retries
        (69, 0, "RUNNING", True),
        (1, 0, "COMPLETING", False),
    ],
)
def test_only_a_job_that_another_start_can_help_is_requeued(slurm, status, starts_before, state, requeued):
    (slurm / "step").write_text(f"exit {status}")
    (slurm / "state").write_text(state)
    process = start(make("--retries", "3", *PRETRAIN), SLURM_RESTART_COUNT=str(starts_before))
    assert process.wait(20) == status
    assert (slurm / "calls").read_text() == ("requeue 40123\n" if requeued else "")


def test_a_task_of_an_array_requeues_itself_and_not_the_array(slurm):
    (slurm / "step").write_text("exit 75")
    (slurm / "bin/squeue").write_text(
        '#!/bin/bash\n[ "$3" = 40123_2 ] && echo RUNNING || printf "RUNNING\\nPENDING\\n"\n'
    )
    script = make("--array", "0-3", *PRETRAIN)
    process = start(script, SLURM_ARRAY_JOB_ID="40123", SLURM_ARRAY_TASK_ID="2")
    assert process.wait(20) == 75
    assert (slurm / "calls").read_text() == "requeue 40123_2\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_reaches_the_step_which_has_time_to_save(slurm, number):
    (slurm / "step").write_text("trap 'sleep 1; exit 75' USR1; touch ready; while :; do sleep 0.05; done")
    process = start(make(*PRETRAIN))
    deadline = time.monotonic() + 20
    while not (slurm / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (slurm / "calls").read_text() == "requeue 40123\n"


def test_a_container_runs_the_launcher_with_its_own_python():
    pyxis = make("--image", "registry/image:1", "--volumes", "/data:/data", "/runs:/runs:ro", *EXPORT)
    assert "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --container-image=registry/image:1" in pyxis
    assert "--container-mounts=/data:/data,/runs:/runs:ro" in pyxis and "python=python3\n" in pyxis
    words = ["--image", "a b.sif", "--container_runtime", "apptainer", "--gpus", "1", "--volumes", "/data:/data"]
    assert "apptainer exec --nv --bind /data:/data 'a b.sif' \\\n" in make(*words, *EXPORT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "train"], "train is not a stage"),
        (["--nodes", "2", "--", "doctor"], "doctor runs in one process"),
        (PRETRAIN[:-2], "recgpt pretrain: error: --output must be given"),
        (["--nodes", "0", *PRETRAIN], "--nodes is 0"),
        (["--env", "A", *PRETRAIN], "give each like NCCL_DEBUG=INFO"),
        (["--numa_binding", "node", *PRETRAIN], "give --gpus"),
        ([*PRETRAIN, "--seed", "{task}"], "--array is not set"),
        (["--array", "0-", *PRETRAIN], "give indices like 0-3"),
        (["--array", "0-3", *PRETRAIN, "--seed", "x{task}"], "--seed is x0; it must be a whole number"),
        (["--time", "soon", *PRETRAIN], "give it like 12:00:00"),
        (["--time", "2", *PRETRAIN], "of which --grace_seconds 120 are for saving"),
        (["--volumes", "/d:/d", *PRETRAIN], "give its --image"),
        (["--shm", "3", *PRETRAIN], "--shm is for --kind jobset or trainjob or volcano; leave it out for slurm"),
        (["--nodes", "2", "--flow", "f.yaml"], "--nodes is given beside --flow"),
        ([], "--command is empty"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_mends_it(words, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recgpt manifest", "--kind", "slurm", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(Manifest, manifest.main, "recgpt manifest")
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (REFUSED, "") and message in said.err


def test_a_time_limit_is_read_as_slurm_does():
    limits = {"90": 5400, "1:30": 90, "12:00:00": 43200, "2-0": 172800, "1-2:3": 93780, "0-0:0:7": 7}
    assert {text: seconds_of(text) for text in limits} == limits


def test_the_next_command_makes_the_folder_of_the_log(slurm, capsys):
    manifest.main(cli.parse(Manifest, "m", ["--kind", "slurm", "--log", "my logs/%x", "--output", "j", *PRETRAIN]))
    assert capsys.readouterr().out.splitlines()[-1] == "Next:    mkdir -p 'my logs' && sbatch j"
    assert "#SBATCH '--output=my logs/%x'" in (slurm / "j").read_text()


def submit(folder, **content):
    """Write a flow and run what it gives; returns what that printed."""
    file = folder / "flow.yaml"
    file.write_text(yaml.safe_dump(content))
    done = subprocess.run(["bash"], input=make("--flow", str(file)), capture_output=True, text=True, timeout=60)
    return done


def test_each_job_of_a_flow_waits_for_those_before_it(slurm):
    jobs = [
        {"run": "prepare --input log.csv --output 'my data'"},
        {"run": "pretrain --data 'my data' --output r/{task} --seed {task}", "array": "0-1", "nodes": 2},
        {"run": "evaluate --data 'my data' --checkpoint r/{task} --output r/{task}.json", "array": "0-1"},
        {"run": "export --data 'my data' --checkpoint r/0 --output v", "after": ["pretrain", "prepare"]},
    ]
    done = submit(slurm, defaults={"queue": "train", "log": "logs/%j", "env": "A=1"}, jobs=jobs)
    assert done.returncode == 0 and done.stderr == ""
    assert (slurm / "calls").read_text().splitlines() == [
        "--parsable",
        "--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes",
        "--parsable --dependency=aftercorr:102 --kill-on-invalid-dep=yes",
        "--parsable --dependency=afterok:102,afterok:101 --kill-on-invalid-dep=yes",
    ]
    scripts = [(slurm / f"script{number}").read_text() for number in range(1, 5)]
    assert all("--partition=train" in options(script) and "export A=1\n" in script for script in scripts)
    assert ["--nodes=2" in options(script) for script in scripts] == [False, True, False, False]
    assert "--data 'my data' --output r/\"$SLURM_ARRAY_TASK_ID\"" in scripts[1]
    assert (slurm / "logs").is_dir()
    assert "103  evaluate after pretrain" in done.stdout


GOOD = "pretrain --data d --output r"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no list 'jobs'"),
        ({"jobs": [{"nodes": 2}]}, "job 1 has no 'run'"),
        ({"jobs": [{"run": GOOD, "node": 2}]}, "job 1: unknown option --node; did you mean --nodes?"),
        ({"jobs": [{"run": GOOD, "nodes": "two"}]}, "'nodes' is 'two'; it must be a whole number"),
        ({"jobs": [{"run": GOOD, "time": 43200}]}, "'time' is 43200; it must be a string"),
        ({"jobs": [{"run": GOOD, "output": "x"}]}, "has 'output', which is no option of a job"),
        ({"jobs": [{"run": GOOD}, {"run": GOOD}]}, "second with the name 'pretrain'"),
        ({"jobs": [{"run": GOOD, "after": "prepare"}]}, "after 'prepare', which is no job before it"),
        ({"jobs": [{"run": "train"}]}, "job 1: train is not a stage"),
        ({"jobs": [{"run": GOOD}, {"run": f"{GOOD} --model.layer 3", "name": "b"}]}, "job 2: pretrain: error: unknown"),
        ({"jobs": [{"run": GOOD}], "default": {}}, "'default' is neither"),
    ],
)  # fmt: skip
def test_a_flow_of_which_a_job_cannot_work_is_refused_before_anything_is_submitted(slurm, content, message, capsys):
    try:
        submit(slurm, **content)
    except InputError as error:
        said = str(error)
    except SystemExit as end:
        assert end.code == REFUSED
        said = capsys.readouterr().err
    assert message in said and (slurm / "calls").read_text() == ""


def test_the_jobs_before_one_that_sbatch_refuses_are_cancelled(slurm):
    (slurm / "bin/sbatch").write_text("#!/bin/bash\n[ $# = 1 ] && echo 101 || { echo no such thing >&2; exit 1; }\n")
    (slurm / "bin/scancel").write_text('#!/bin/bash\necho "scancel $@" >> calls\n')
    (slurm / "bin/scancel").chmod(0o755)
    done = submit(slurm, jobs=[{"run": "prepare --input l --output d"}, {"run": GOOD}, {"run": GOOD, "name": "never"}])
    assert done.returncode == REFUSED
    assert "no such thing\nsbatch refused pretrain after prepare, and nothing is submitted" in done.stderr
    assert (slurm / "calls").read_text() == "scancel 101\n"


def test_the_flow_in_configs_is_whole(slurm):
    assert make("--flow", str(ROOT / "configs/slurm/flow.yaml")).count("\nsubmit ") == 5
