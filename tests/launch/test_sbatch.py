"""The sbatch script, run by a real bash with stand-ins for Slurm's commands, and the flow of several scripts."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from recgpt_torchrec import cli
from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.launch import flow, sbatch
from recgpt_torchrec.launch.sbatch import Job, write_script

ROOT = Path(__file__).parents[2]


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
    job = Job(words=("pretrain",), nodes=2, processes=8, gpus=8, cpus=64, memory_mb=256000, time="12:00:00")
    assert options(write_script(job)) == [
        "--job-name=pretrain",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--mem=256000M",
        "--gpus-per-node=8",
        "--time=12:00:00",
        "--output=%x-%j.out",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
    ]
    bare = options(write_script(Job(words=("export",), processes=3, sbatch=("--qos=high",))))
    assert "--cpus-per-task=6" in bare and "--qos=high" in bare
    assert not [option for option in bare if option.startswith(("--mem", "--gpus", "--time", "--partition"))]


def test_words_cores_and_the_meeting_place_reach_the_launcher_whole(slurm):
    words = (
        "pretrain",
        "--data",
        "my data, it's",
        "--seed",
        "{task}",
        "--output",
        "r/{task}/x",
        "--note",
        "",
        "$HOME *",
    )
    job = Job(words=words, nodes=2, processes=4, array="0-3", environment=("A=b c",), interface="ib0")
    assert start(write_script(job), SLURM_ARRAY_TASK_ID="3").wait(20) == 0
    given = (slurm / "words").read_text().split("\0")[:-1]
    stage = given.index("-m", given.index("--rdzv_id"))
    assert given[stage + 1 :] == [
        *("recgpt_torchrec.pretrain", "--data", "my data, it's", "--seed", "3"),
        *("--output", "r/3/x", "--note", "", "$HOME *"),
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
        (137, 3, "RUNNING", False),
        (69, 0, "RUNNING", True),
        (1, 0, "COMPLETING", False),
    ],
)
def test_only_a_job_that_another_start_can_help_is_requeued(slurm, status, starts_before, state, requeued):
    (slurm / "step").write_text(f"exit {status}")
    (slurm / "state").write_text(state)
    process = start(write_script(Job(words=("pretrain",))), SLURM_RESTART_COUNT=str(starts_before))
    assert process.wait(20) == status
    assert (slurm / "calls").read_text() == ("requeue 40123\n" if requeued else "")


def test_a_task_of_an_array_requeues_itself_and_not_the_array(slurm):
    (slurm / "step").write_text("exit 75")
    (slurm / "bin/squeue").write_text(
        '#!/bin/bash\n[ "$3" = 40123_2 ] && echo RUNNING || printf "RUNNING\\nPENDING\\n"\n'
    )
    script = write_script(Job(words=("pretrain",), array="0-3"))
    process = start(script, SLURM_ARRAY_JOB_ID="40123", SLURM_ARRAY_TASK_ID="2")
    assert process.wait(20) == 75
    assert (slurm / "calls").read_text() == "requeue 40123_2\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_script_reaches_the_step_which_has_time_to_save(slurm, number):
    (slurm / "step").write_text("trap 'sleep 1; exit 75' USR1; touch ready; while :; do sleep 0.05; done")
    process = start(write_script(Job(words=("pretrain",))))
    deadline = time.monotonic() + 20
    while not (slurm / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (slurm / "calls").read_text() == "requeue 40123\n"


def test_a_container_runs_the_launcher_with_its_own_python():
    pyxis = write_script(Job(words=("export",), container="registry/image:1", mounts=("/data:/data", "/runs:/runs")))
    assert "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --container-image=registry/image:1" in pyxis
    assert "--container-mounts=/data:/data,/runs:/runs" in pyxis and "python=python3\n" in pyxis
    job = Job(words=("export",), container="a b.sif", container_runtime="apptainer", gpus=1, mounts=("/data",))
    assert "apptainer exec --nv --bind /data 'a b.sif' \\\n" in write_script(job)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": ("train",)}, "'train' is not a stage"),
        ({"words": ()}, "is not a stage"),
        ({"nodes": 0}, "nodes is 0"),
        ({"environment": ("A",)}, "NAME=VALUE"),
        ({"numa_binding": "yes"}, "node, socket"),
        ({"words": ("pretrain", "--seed", "{task}")}, "array is not set"),
    ],
)
def test_what_cannot_work_is_refused_with_what_mends_it(wrong, message):
    with pytest.raises(InputError, match=message):
        Job(**{"words": ("pretrain",), **wrong})


def test_the_command_prints_a_script_that_bash_can_read(capsys):
    words = [
        "--nodes",
        "2",
        "--gpus",
        "8",
        "--sbatch=--qos=high",
        "--sbatch=--exclusive",
        "--",
        "pretrain",
        "--seed",
        "1",
    ]
    assert sbatch.main(words) == 0
    script = capsys.readouterr().out
    assert {"--nodes=2", "--gpus-per-node=8", "--qos=high", "--exclusive"} <= set(options(script))
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert sbatch.main(["--", "nothing"]) == 2
    assert "is not a stage" in capsys.readouterr().err


def write_flow(folder, **content):
    file = folder / "flow.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_each_job_of_a_flow_waits_for_those_before_it(slurm, capsys):
    jobs = [
        {"run": "prepare --input log.csv --output 'my data'"},
        {"run": "pretrain --data 'my data' --output r/{task} --seed {task}", "array": "0-1", "nodes": 2},
        {"run": "evaluate --data 'my data' --checkpoint r/{task} --output r/{task}.json", "array": "0-1"},
        {"run": "export --data 'my data' --checkpoint r/0 --output v", "after": ["pretrain", "prepare"]},
    ]
    assert flow.main([str(write_flow(slurm, defaults={"partition": "train", "log": "logs/%j"}, jobs=jobs))]) == 0
    assert (slurm / "calls").read_text().splitlines() == [
        "--parsable",
        "--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes",
        "--parsable --dependency=aftercorr:102 --kill-on-invalid-dep=yes",
        "--parsable --dependency=afterok:102,afterok:101 --kill-on-invalid-dep=yes",
    ]
    scripts = [(slurm / f"script{number}").read_text() for number in range(1, 5)]
    assert all("--partition=train" in options(script) for script in scripts)
    assert ["--nodes=2" in options(script) for script in scripts] == [False, True, False, False]
    assert "--data 'my data' --output r/\"$SLURM_ARRAY_TASK_ID\"" in scripts[1]
    assert (slurm / "logs").is_dir()
    assert "103  evaluate after pretrain (102)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no list 'jobs'"),
        ({"jobs": [{"nodes": 2}]}, "job 1 has no 'run'"),
        ({"jobs": [{"run": "pretrain", "node": 2}]}, "no option 'node'"),
        ({"jobs": [{"run": "pretrain", "nodes": "two"}]}, "'nodes' is 'two'"),
        ({"jobs": [{"run": "pretrain"}, {"run": "pretrain"}]}, "second with the name 'pretrain'"),
        ({"jobs": [{"run": "pretrain", "after": "prepare"}]}, "after 'prepare', which is no job before it"),
        ({"jobs": [{"run": "train"}]}, "job 1: 'train' is not a stage"),
        ({"jobs": [{"run": "pretrain"}], "default": {}}, "'default' is neither"),
    ],
)
def test_a_flow_that_cannot_be_submitted_is_refused_before_anything_is(slurm, content, message, capsys):
    assert flow.main([str(write_flow(slurm, **content))]) == 2
    assert message in capsys.readouterr().err
    assert (slurm / "calls").read_text() == ""


def test_the_jobs_before_one_that_sbatch_refuses_are_cancelled(slurm, capsys):
    (slurm / "bin/sbatch").write_text("#!/bin/bash\n[ $# = 1 ] && echo 101 || { echo no such thing >&2; exit 1; }\n")
    (slurm / "bin/scancel").write_text('#!/bin/bash\necho "scancel $@" >> calls\n')
    (slurm / "bin/scancel").chmod(0o755)
    assert flow.main([str(write_flow(slurm, jobs=[{"run": "prepare"}, {"run": "pretrain"}]))]) == 2
    assert "sbatch refused pretrain, and nothing is submitted: no such thing" in capsys.readouterr().err
    assert (slurm / "calls").read_text() == "scancel 101\n"


def test_the_flow_in_configs_has_options_that_its_stages_know():
    content = yaml.safe_load((ROOT / "configs/slurm/flow.yaml").read_text())
    assert len(flow.read_flow(ROOT / "configs/slurm/flow.yaml")) == len(content["jobs"]) == 5
    for entry in content["jobs"]:
        stage, *words = shlex.split(entry["run"])
        cli.parse(STAGES[stage].config, stage, words)
