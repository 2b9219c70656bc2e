import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed import run
from torch.distributed.elastic.utils import macros as torchrun
from torchx.runner import get_runner
from torchx.schedulers.slurm_scheduler import create_scheduler
from torchx.specs import macros
from torchx.specs.builders import materialize_appdef
from torchx.specs.finder import ComponentValidationException, get_component, get_components

from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.errors import LOST, REFUSED
from recgpt_torchrec.launch import node
from recgpt_torchrec.launch.arguments import MARK, pack, unpack
from recgpt_torchrec.launch.command import choose_status, named_scheduler
from tests.support import walks, write_dataset

NASTY = [
    *("--data", "a,b c", "'single' \"double\"", "$HOME $$ $(HOME) ${app_id} $app_id `id`", "", "two\nlines\ttab"),
    *("\\back\\", "é漢", "--", "*", "--where", "price < 20 && x != '$5'"),
]
"""Arguments that shells, torchx and schedulers read in their own way."""
ROOT = Path(__file__).parents[2]
TORCHX = Path(sys.executable).with_name("torchx")


def job(stage, *arguments):
    return materialize_appdef(get_component(f"recgpt_torchrec.{stage}").fn, list(arguments))


def torchx(*arguments, cwd):
    """Run the torchx command as in a fresh shell: no virtual environment is active."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "OMP_NUM_THREADS")}
    environment["PATH"] = "/usr/bin:/bin"
    return subprocess.run(
        [str(TORCHX), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def stand_in(tmp_path):
    """A module beside the job, to stand for a stage: it does what its argument says."""
    (tmp_path / "stand_in.py").write_text(
        "import json, os, sys, time\n"
        "rank = os.environ['RANK']\n"
        "print('rank', rank, 'threads', os.environ['OMP_NUM_THREADS'], 'python', sys.executable, flush=True)\n"
        "open(f'given-{rank}', 'w').write(json.dumps(sys.argv[1:]))\n"
        "if sys.argv[1] == 'fail' and rank == '1':\n"
        "    print('the cause: no such column', file=sys.stderr)\n"
        "    sys.exit(3)\n"
        "if sys.argv[1] == 'fail':\n"
        "    time.sleep(60)\n"
    )
    return tmp_path


def test_every_stage_is_a_component_and_torchxs_own_are_still_there():
    names = set(get_components())
    assert {name for name in names if name.startswith("recgpt_torchrec.")} == {f"recgpt_torchrec.{s}" for s in STAGES}
    assert {"dist.ddp", "dist.spmd", "utils.echo", "utils.python"} <= names


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_the_stage_and_every_option(stage, capsys):
    with pytest.raises(SystemExit) as end:
        job(stage, "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "CPU cores per node" in shown and "MB" in shown and "nodes x processes" in shown
    assert "TIP:" not in shown  # what torchx says where a docstring is missing


def test_a_job_asks_for_memory_and_cores_by_the_number_of_processes():
    (role,) = job("pretrain", "-j", "2x4", "--", "--data", "d").roles
    assert (role.num_replicas, role.resource.cpu, role.resource.memMB, role.resource.gpu) == (2, 8, 4 * 4096, 0)
    (role,) = job("pretrain", "-j", "1x2", "--cpu", "6", "--memMB", "9000", "--gpu", "2").roles
    assert (role.num_replicas, role.resource.cpu, role.resource.memMB, role.resource.gpu) == (1, 6, 9000, 2)
    assert role.env["OMP_NUM_THREADS"] == "3"


def test_the_users_environment_wins():
    (role,) = job("pretrain", "--cpu", "6", "--env", "OMP_NUM_THREADS=5,A=b").roles
    assert (role.env["OMP_NUM_THREADS"], role.env["A"]) == ("5", "b")


def test_plain_arguments_can_be_read_in_a_dry_run():
    (role,) = job("pretrain", "-j", "1x2", "--", "--data", "my data", "--train.epochs", "3").roles
    assert role.args[1].endswith("-m recgpt_torchrec.pretrain --data 'my data' --train.epochs 3")


def kubelet(word, environment):
    """What Kubernetes makes of a word of a container's command: `$$` is `$`, and a known `$(NAME)` its value."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: environment.get(m[1], m[0]) if m[1] else "$", word)


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_arguments_reach_the_stage_whole(scheduler, tmp_path, monkeypatch):
    """The command that a scheduler runs, with stand-ins for srun and for the interpreter."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    app = job("pretrain", "--", *NASTY)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "HOME": "/home/me"}
    if scheduler == "slurm":
        command = ["bash", "-c", create_scheduler("test").submit_dryrun(app, {}).request.materialize()]
    else:
        values = macros.Values(img_root="", app_id="x", replica_id="0", rank0_env="RANK0")
        (role,) = app.roles
        command = [kubelet(word, environment) for word in [role.entrypoint, *values.apply(role).args]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    words = json.loads(done.stdout.splitlines()[0])
    assert words[1:3] == ["-m", "recgpt_torchrec.launch.node"], done.stderr
    given = torchrun.substitute(node.guard_arguments(words[3:]), "0")
    assert given[given.index("-m") :] == ["-m", "--", "recgpt_torchrec.pretrain", *NASTY]


@pytest.mark.parametrize("word", [*NASTY, "\udcff no text", MARK, f"{MARK}%24", "%24$", "\x00\x1b"])
def test_a_packed_argument_is_unpacked_to_itself_and_holds_no_dollar(word):
    assert unpack(pack(word)) == word and "$" not in pack(word)


@pytest.mark.parametrize(("stage", "j"), [("prepare", "1x2"), ("prepare", "2x1"), ("pretrain", "two")])
def test_a_wrong_number_of_processes_is_refused(stage, j):
    with pytest.raises(ComponentValidationException, match=j):
        job(stage, "-j", j)


def test_slurm_gets_a_task_a_node_with_memory_cores_and_the_first_nodes_name():
    with get_runner() as runner:
        script = repr(runner.dryrun(job("pretrain", "-j", "2x2", "--", "--data", "d"), "slurm").request)
    assert script.count("--ntasks-per-node=1 --cpus-per-task=4 --mem=8192") == 2
    assert "--rdzv_endpoint ${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:0" in script
    assert f"python={sys.executable};" in script


def test_kubernetes_gets_pods_with_the_same_limits():
    pytest.importorskip("kubernetes", reason="the kubernetes package is not installed")
    with get_runner() as runner:
        request = runner.dryrun(job("pretrain", "-j", "2x2"), "kubernetes", cfg={"queue": "default"}).request
    tasks = yaml.safe_load(str(request))["spec"]["tasks"]
    assert len(tasks) == 2
    assert tasks[0]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "4000m", "memory": "8192M"}


def test_a_job_runs_from_any_folder_with_the_environments_own_python(tmp_path):
    done = torchx(
        "run", "-s", "local_cwd", "recgpt_torchrec.prepare", "--", "--help", cwd=tmp_path
    )  # no .venv/bin on PATH, no project in this folder
    assert done.returncode == 0, done.stderr
    assert "--input" in done.stdout and "--input" not in done.stderr  # torchx alone prints both to standard error


def test_in_a_clone_a_job_runs_on_this_machine_without_naming_a_scheduler(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "recgpt_torchrec", clone / "recgpt_torchrec", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".torchxconfig", "torchx_components.py"):
        shutil.copy(ROOT / name, clone)
    write_dataset(clone / "data", walks(20, 10), items=10)
    small = "--model.dim 8 --model.max_len 8 --train.epochs 1 --batch.tokens 100 --loss.candidates all".split()
    words = ["--data", "data", "--output", "run", *small]
    done = torchx("run", "recgpt_torchrec.pretrain", "--", *words, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert (clone / "run/best.json").exists()
    more = [*words, "--stream.workers", "1"]
    cluster = torchx("run", "-s", "slurm", "--dryrun", "recgpt_torchrec.pretrain", "-j", "1x2", "--", *more, cwd=clone)
    assert cluster.returncode == 0 and "#SBATCH" in cluster.stdout, cluster.stderr
    planned = re.search(r"--cpus-per-task=(\d+) --mem=(\d+)", cluster.stdout)
    assert planned is not None and int(planned[1]) == 6 and 2000 < int(planned[2]) < 6144, cluster.stdout
    said = rf"6 cores and {int(planned[2]):,} MB, as recgpt plan estimates this run \(1\.3 x ([\d,]+) MB, and 600 MB"
    counted = re.search(said, cluster.stderr)
    assert counted is not None, cluster.stderr
    assert 0 <= int(planned[2]) - 1.3 * int(counted[1].replace(",", "")) - 2 * 600 < 256 + 1.3  # rounded up


def test_a_failed_rank_ends_the_job_with_its_own_words_and_no_foreign_traceback(stand_in):
    component = stand_in / "component.py"
    component.write_text(
        "from torchx import specs\n"
        "from recgpt_torchrec.launch import job\n"
        "def broken(*args: str) -> specs.AppDef:\n"
        '    """A stage that fails."""\n'
        "    return job.make_job('stand_in', *args, j='1x2')\n"
    )
    done = torchx("run", "-s", "local_cwd", f"{component}:broken", "--", "fail", *NASTY, cwd=stand_in)
    assert done.returncode == 3, "torchx's own is 1"
    assert "[1]:the cause: no such column" in done.stderr
    assert "stand_in failed: rank 1 ended with exit status 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((stand_in / "given-1").read_text()) == ["fail", *NASTY]


def test_the_status_of_a_job_is_that_of_the_cause():
    assert choose_status([LOST, 137]) == 137 and choose_status([1, REFUSED]) == REFUSED
    assert choose_status([0, -signal.SIGKILL]) == 137 and choose_status([LOST, 0]) == LOST
    assert choose_status([]) == choose_status([0]) == 0


def start_node(cwd, *options, job_id="job", **environment):
    run = [sys.executable, "-m", "recgpt_torchrec.launch.node", "--rdzv_backend", "c10d", "--rdzv_id", job_id]
    return subprocess.Popen(
        [*run, *options],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_jobs_of_two_nodes_each_run_on_one_machine_at_a_time(tmp_path):
    (tmp_path / "meets.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(f'{sys.argv[1]}-{os.environ[\"RANK\"]}').touch()\n"
        "until = time.monotonic() + 60\n"
        "while len(list(pathlib.Path().glob('*-[01]'))) < 4 and time.monotonic() < until: time.sleep(.05)\n"
        "print(sys.argv[1], os.environ['WORLD_SIZE'], len(list(pathlib.Path().glob('*-[01]'))))\n"
    )
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", "localhost:0", "-m", "meets"]
    nodes = [(each, start_node(tmp_path, *options, each, job_id=each)) for each in ("one", "two") for _ in range(2)]
    for each, launcher in nodes:
        said, errors = launcher.communicate(timeout=120)
        assert (launcher.returncode, said) == (0, f"{each} 2 4\n"), errors  # all four ranks ran at the same time


def test_the_port_of_a_job_follows_from_its_id_and_not_where_one_is_given():
    ports = {int(node.with_port("host:0", str(job)).removeprefix("host:")) for job in range(1000, 1100)}
    assert len(ports) > 95 and 20_000 <= min(ports) and max(ports) < 32_000
    assert node.with_port("host:0", "7") == node.with_port("host:0", "7")
    assert node.with_port("host:1234", "7") == "host:1234" and node.with_port("[::1]:0", "7").startswith("[::1]:2")


def test_a_refused_run_is_not_started_again(tmp_path):
    """What ended with another status is: see tests/distributed/test_elastic.py."""
    (tmp_path / "ends.py").write_text(f"import sys\nopen('starts', 'a').write('x')\nsys.exit({REFUSED})\n")
    options = ["--nnodes", "1", "--nproc_per_node", "1", "--rdzv_endpoint", "localhost:0", "--max_restarts", "1"]
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "TORCHX_MAX_RETRIES": "3"}
    launcher = start_node(tmp_path, *options, "-m", "ends", **slurm)
    _, errors = launcher.communicate(timeout=120)
    assert (launcher.returncode, (tmp_path / "starts").read_text()) == (REFUSED, "x"), errors
    assert (tmp_path / "asked").read_text() == "update JobId=42 Requeue=0\n"


def test_the_scheduler_is_that_of_the_command_line(tmp_path, monkeypatch):
    for words in (["run", "-s", "slurm", "x"], ["run", "--scheduler", "slurm"], ["run", "--scheduler=slurm"]):
        assert named_scheduler(words) == "slurm"
    settings = tmp_path / "settings"
    monkeypatch.setenv("TORCHXCONFIG", str(settings))
    settings.write_text("")
    assert named_scheduler(["run", "recgpt_torchrec.pretrain", "--", "-s", "slurm"]) == "local_cwd"
    settings.write_text("[cli:run]\nscheduler = kubernetes\n")
    assert named_scheduler(["run", "recgpt_torchrec.pretrain"]) == "kubernetes"


def test_memory_that_cannot_be_planned_is_the_default_and_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchx", "run", "-s", "slurm"])
    (role,) = job("evaluate", "-j", "1x3").roles
    assert (role.resource.cpu, role.resource.memMB) == (6, 3 * 4096)
    assert "6 cores and 12,288 MB, whatever this run needs (it can be estimated for pretrain" in capsys.readouterr().err
    (role,) = job("evaluate", "-j", "1x3", "--cpu", "1", "--memMB", "2").roles
    assert (role.resource.cpu, role.resource.memMB, capsys.readouterr().err) == (1, 2, "")


def test_processes_share_the_cores_of_the_node(stand_in):
    run = [sys.executable, "-m", "recgpt_torchrec.launch.node", "--nnodes", "1", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*run, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "stand_in", "succeed"],
        cwd=stand_in,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    threads = max(1, node.available_cores() // 2)
    assert done.stdout.count(f"threads {threads} python {sys.executable}") == 2


def test_options_of_a_stage_are_not_taken_for_torchruns():
    words = ["recgpt_torchrec.export", "--event", "buy", "--m", "7", "-m", "--", "x"]
    args = run.parse_args(node.guard_arguments(["--nproc-per-node", "2", "-m", *words]))
    assert (args.module, args.nproc_per_node) == (True, "2")
    assert [args.training_script, *args.training_script_args] == words
    assert node.guard_arguments(["train.py"]) == ["train.py"]


def test_threads_are_an_even_share_and_never_none():
    assert [node.threads_per_process(8, n) for n in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]


def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(node, "QUOTA_FILE", quota)
    unlimited = node.available_cores()
    assert unlimited >= 1
    for text, expected in [("100000 100000", 1), ("50000 100000", 1), ("max 100000", unlimited)]:
        quota.write_text(text)
        assert node.available_cores() == expected


def test_how_a_rank_ended_is_described_in_words():
    assert "exit status 2" in node.describe(3, 2) and "[3]" in node.describe(3, 2)
    assert "SIGKILL (is there enough memory?" in node.describe(0, -signal.SIGKILL)
