"""Jobs for Kubernetes as they are written: golden files, what each stage's command line becomes, what is refused."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from torch.distributed import run

from recgpt_torchrec import cli
from recgpt_torchrec import manifest as program
from recgpt_torchrec.config.launch.manifest import Manifest
from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.errors import REFUSED, STOPPED, InputError
from recgpt_torchrec.launch import fetch, node, resources
from recgpt_torchrec.texts.commands import ONE_PROCESS
from tests.launch.manifest_cases import CASES, GOLDEN, KINDS, place_container, pod_of, write

PRETRAIN = ["--", "pretrain", "--data", "/data/d", "--output", "/runs/r"]
CLAIMS = ["--volumes", "datasets:/data", "runs:/runs"]


def refusal(*words: str) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(InputError) as error:
        program.main(cli.parse(Manifest, "recgpt manifest", ["--kind", "jobset", *words]))
    return str(error.value)


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case in CASES for kind in KINDS])
def test_what_is_written_is_what_was_recorded(case: str, kind: str, tmp_path: Path) -> None:
    text = write(kind, CASES[case], tmp_path)
    assert text == (GOLDEN / f"{case}-{kind}.yaml").read_text(), "python -m tests.launch.manifest_cases records anew"


@pytest.mark.parametrize("kind", KINDS)
def test_the_launcher_gets_the_stages_own_words(kind: str, tmp_path: Path) -> None:
    words = [
        "--data",
        "/data/a b, 'c' $(HOME) $$x",
        "--output",
        "/runs/r",
        "--seed",
        "7",
        "--time.use",
        "past_gap",
        "hour",
    ]
    text = write(kind, ["--nodes", "2", "--processes", "4", *CLAIMS, "--", "pretrain", *words], tmp_path)
    container = place_container(list(yaml.safe_load_all(text)))
    assert container["command"] == ["python", "-m", "recgpt_torchrec.launch.node"]
    expanded = [word.replace("$$", "$") for word in container["args"]]  # as the kubelet does where no variable is meant
    assert not any("$" in word.replace("$$", "") for word in container["args"])
    args = run.parse_args(node.guard_arguments(expanded))
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend) == ("2", "4", "c10d")
    received = [word.replace("$$", "$") for word in args.training_script_args]  # torchrun's own reading of them
    assert args.training_script == "recgpt_torchrec.pretrain" and received == words


def test_the_endpoint_is_the_first_pods_name_in_its_service(tmp_path: Path) -> None:
    expected = {"jobset": "r-node-0-0.r", "trainjob": "r-node-0-0.r", "volcano": "r-node-0.r"}
    for kind in KINDS:
        objects = list(yaml.safe_load_all(write(kind, ["--name", "r", "--nodes", "2", *CLAIMS, *PRETRAIN], tmp_path)))
        args = place_container(objects)["args"]
        assert args[args.index("--rdzv_endpoint") + 1] == f"{expected[kind]}:29500"
        wait = pod_of(objects)["initContainers"][0]["args"]
        assert wait[wait.index("--host") + 1] == expected[kind]  # the other pods wait until that name is known


def test_exit_statuses_retry_or_end_the_job(tmp_path: Path) -> None:
    (jobset,) = yaml.safe_load_all(write("jobset", ["--retries", "5", *CLAIMS, *PRETRAIN], tmp_path))
    (task,) = jobset["spec"]["replicatedJobs"]
    rules = task["template"]["spec"]["podFailurePolicy"]["rules"]
    actions = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])}
    assert actions == {REFUSED: "FailJob", STOPPED: "Ignore"}  # all others fail the Job, which JobSet starts again
    assert task["template"]["spec"]["backoffLimit"] == 0
    assert task["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # or the policy is refused
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    (volcano,) = yaml.safe_load_all(write("volcano", ["--retries", "5", *CLAIMS, *PRETRAIN], tmp_path))
    assert volcano["spec"]["maxRetry"] == 6  # Volcano gives up when its count, which the first failure makes 1, is this
    assert volcano["spec"]["policies"][0] == {"exitCode": REFUSED, "action": "TerminateJob"}


def test_a_file_of_options_is_written_out(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("seed: 9\nmodel:\n  dim: 32\ntime:\n  use: [hour, weekday]\n")
    text = write("jobset", [*CLAIMS, *PRETRAIN, "--config", str(file), "--seed", "3"], tmp_path)
    args = place_container(list(yaml.safe_load_all(text)))["args"]
    words = args[args.index("recgpt_torchrec.pretrain") + 1 :]
    assert str(file) not in text
    parsed: Any = cli.parse(STAGES["pretrain"].config, "recgpt pretrain", words)
    given: Any = cli.parse(
        STAGES["pretrain"].config, "recgpt pretrain", [*PRETRAIN[2:], "--config", str(file), "--seed", "3"]
    )
    assert parsed == given


def test_a_misspelt_option_of_the_stage_is_refused_as_the_stage_would(capsys: Any) -> None:
    words = ["--kind", "jobset", *CLAIMS, *PRETRAIN, "--model.layer", "3"]
    with pytest.raises(SystemExit) as end:
        program.main(cli.parse(Manifest, "recgpt manifest", words))
    expected = "recgpt pretrain: error: unknown option --model.layer; did you mean --model.layers?\n"
    assert (end.value.code, capsys.readouterr().err) == (2, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--", "pre-train"], "did you mean pretrain?"),
        (["--", "manifest"], "manifest is not a stage"),
        (["--nodes", "2", *CLAIMS, "--", "prepare", "--input", "/data/l", "--output", "/data/d"], "one process"),
        ([*CLAIMS, *PRETRAIN, "--device", "cuda"], "--gpus"),
        (["--gpus", "1", *CLAIMS, *PRETRAIN, "--device", "cpu"], "leave --gpus out"),
        (["--gpus", "1", *CLAIMS, "--", "prepare", "--input", "/data/l", "--output", "/data/d"], "leave --gpus out"),
        (["--volumes", "datasets:/data", *PRETRAIN], "--output is /runs/r, which no volume"),
        (["--volumes", "datasets:/data", "runs:/runs:ro", *PRETRAIN], "leave its :ro out"),
        ([*CLAIMS, "--", "pretrain", "--data", "data/d", "--output", "/runs/r"], "--data is data/d, which no volume"),
        ([*CLAIMS, "--scratch", "9", "--copy_data", "s3://b/d", *PRETRAIN], "give it a folder in /scratch"),
        ([*CLAIMS, "--scratch", "9", "--", "pretrain", "--data", "/scratch/d", "--output", "/runs/r"], "--copy_data"),
        ([*CLAIMS, "--scratch", "9", "--", "pretrain", "--data", "/data/d", "--output", "/scratch/r"], "no volume"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(words: list[str], message: str) -> None:
    assert message in refusal(*words)


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "2", "--processes", "3"],
        ["--name", "Run_1"],
        ["--name", "a" * 41],
        ["--volumes", "data"],
        ["--volumes", "a:/data", "b:/data"],
        ["--env", "A"],
        ["--rdma", "rdma/hca"],
        ["--copy_data", "s3://b/d"],
        ["--memory", "3", "--shm", "4"],
        ["--nodes", "0"],
        ["--time", "1:00:00"],
        ["--flow", "flow.yaml"],
    ],
)
def test_options_that_cannot_work_are_refused(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(Manifest, "recgpt manifest", ["--kind", "jobset", *words, *PRETRAIN])
    assert end.value.code == REFUSED and f"{words[0]} " in capsys.readouterr().err


def share(kind: str, words: list[str], folder: Path) -> tuple[float, str, str]:
    """Cores and memory per node of the job that a command line gives, and the comment on them."""
    text = write(kind, words, folder)
    comment = next(line for line in text.splitlines() if line.startswith("# Each node gets"))
    if kind == "slurm":
        (cores,), memory = re.findall(r"--cpus-per-task=(\d+)", text), re.findall(r"--mem=(\d+)M", text)
        return float(cores), f"{memory[0]}Mi" if memory else "", comment
    asked = place_container(list(yaml.safe_load_all(text)))["resources"]["requests"]
    return float(asked["cpu"].removesuffix("m")) / 1000, asked["memory"], comment


@pytest.mark.parametrize("kind", ["slurm", *KINDS])
def test_memory_is_what_is_planned_where_the_data_is_here_and_what_is_given_wins(
    kind: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def plan(stage: str, words: list[str], *sizes: int) -> resources.Resources:
        asked.append((stage, sizes, words[words.index("--data") + 1]))
        return resources.Resources(7, 2560, "as recgpt plan estimates this run (so and so)", is_planned=True)

    asked: list[Any] = []
    monkeypatch.setattr(resources, "plan_resources", plan)
    claims = [] if kind == "slurm" else ["--volumes", f"shared:{tmp_path}"]
    sizes = ["--nodes", "2", "--processes", "3", *claims]
    words = ["--", "pretrain", "--data", str(tmp_path), "--output", f"{tmp_path}/r"]
    with_shm = 0 if kind == "slurm" else 4096
    assert share(kind, [*sizes, *words], tmp_path)[:2] == (7, f"{2560 + with_shm}Mi")
    assert "(so and so)" in share(kind, [*sizes, *words], tmp_path)[2]
    assert share(kind, [*sizes, "--cpus", "5", *words], tmp_path)[:2] == (5, f"{2560 + with_shm}Mi")
    assert set(map(repr, asked)) == {repr(("pretrain", (2, 3, 0), str(tmp_path)))}
    asked.clear()
    assert share(kind, [*sizes, "--memory", "9", *words], tmp_path)[:2] == (6, "9216Mi")
    absent = ["--", "pretrain", "--data", f"{tmp_path}/none", "--output", f"{tmp_path}/r"]
    cores, memory, comment = share(kind, [*sizes, *absent], tmp_path)
    assert (cores, memory) == (6, "" if kind == "slurm" else "16384Mi") and f"--data {tmp_path}/none is not" in comment
    assert not asked  # no seconds are spent on a plan that is not needed, or cannot be made


def test_the_plan_is_made_with_the_data_that_pods_copy(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[list[str]] = []

    def plan(stage: str, words: list[str], *sizes: int) -> resources.Resources:
        asked.append(words)
        raise ValueError("no such bucket")

    monkeypatch.setattr(resources, "plan_resources", plan)
    copied = ["--volumes", "runs:/runs", "--scratch", "9", "--copy_data", "s3://b/d"]
    words = ["--", "pretrain", "--data", "/scratch/d", "--output", "/runs/r"]
    assert "no such bucket" in share("jobset", [*copied, *words], tmp_path)[2]
    assert asked == [["--data", "/scratch/d", "--output", "/runs/r", "--data", "s3://b/d"]]


def test_another_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    words = ["--output", str(file), *CLAIMS]
    program.main(cli.parse(Manifest, "recgpt manifest", ["--kind", "jobset", *words, *PRETRAIN]))
    first = file.read_text()
    program.main(cli.parse(Manifest, "recgpt manifest", ["--kind", "jobset", *words, *PRETRAIN]))  # the same again
    assert "--overwrite" in refusal("--nodes", "2", *words, *PRETRAIN)
    assert file.read_text() == first
    program.main(
        cli.parse(Manifest, "x", ["--kind", "jobset", "--nodes", "2", "--overwrite", "true", *words, *PRETRAIN])
    )
    assert file.read_text() != first


def test_stages_of_one_process_are_those_that_torchx_refuses_several_for() -> None:
    source = (Path(cli.__file__).parents[1] / "torchx_components.py").read_text()
    named = {line.split('"')[1] for line in source.splitlines() if "require_one_process(" in line}
    assert named == set(ONE_PROCESS)


def fetch_status(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "recgpt_torchrec.launch.fetch", *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr + done.stdout


def test_the_step_before_a_stage_copies_a_folder_once_and_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "store", tmp_path / "disk/d"
    (source / "sequences").mkdir(parents=True)
    (source / "manifest.json").write_text("{}")
    (source / "sequences/a.parquet").write_bytes(b"123")
    partial = tmp_path / "disk/d.partial"  # what a kill left
    partial.mkdir(parents=True)
    (partial / "rubbish").write_text("x")
    fetch.copy(f"file://{source}", str(target))
    copied = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert copied == {"manifest.json": b"{}", "sequences/a.parquet": b"123"} and not partial.exists()
    (source / "manifest.json").write_text("new")
    fetch.copy(f"file://{source}", str(target))
    assert (target / "manifest.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError):
        fetch.copy(f"file://{tmp_path}/none", str(tmp_path / "other"))


def test_the_step_before_a_stage_says_what_is_missing(tmp_path: Path) -> None:
    missing = str(tmp_path / "d")
    status, message = fetch_status("--require", str(tmp_path), "--require", missing)
    assert status == REFUSED and f"{missing} is not there" in message and "Traceback" not in message
    assert fetch.wait_for_host("localhost", 1) and not fetch.wait_for_host("no-such-host.invalid", 0.01)


def test_the_image_leaves_out_what_only_development_needs() -> None:
    """containers/development.txt is the lock without what pyproject.toml's dependencies need."""
    root = Path(cli.__file__).parents[1]
    locked = {
        normal(line.partition("==")[0]) for line in (root / "requirements-cpu.lock").read_text().split() if "==" in line
    }
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    todo = [Requirement(each) for each in project["dependencies"]]
    needed: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = {"fbgemm-gpu": "fbgemm-gpu-cpu"}.get(normal(requirement.name), normal(requirement.name))
        key = (name, frozenset(requirement.extras))
        if key in needed or name not in locked:
            continue
        needed.add(key)
        for more in map(Requirement, importlib.metadata.requires(name) or []):
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in {"", *requirement.extras}):
                todo.append(more)
    left_out = {normal(line.strip("^=\n")) for line in (root / "containers/development.txt").open()}
    assert left_out == locked - {name for name, _ in needed} - {
        "iopath",
        "portalocker",
    }  # imported by torchrec, undeclared


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
