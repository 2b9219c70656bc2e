"""The command line: options from fields, one-line errors with the nearest name, lists, and `recgpt STAGE`."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from recgpt_torchrec import __main__, cli
from recgpt_torchrec.config import Evaluate, Prepare, Pretrain, PromptTune
from recgpt_torchrec.config.fields import options
from recgpt_torchrec.config.stages import STAGES
from tools.mutations import hostile_yaml

WHERE_AND_HOW_FAST = """
    data output stream.workers stream.prefetch stream.damaged stream.damaged_limit stream.checksums tables.sharding
    tables.data_parallel_mb tables.kernel tables.cache_ratio tables.user.sharding tables.user.kernel
    tables.item.sharding tables.item.kernel tables.output.sharding tables.output.kernel
    tables.attributes.sharding tables.attributes.kernel
    train.non_finite train.non_finite_limit train.stall_seconds train.timeout_seconds
    train.precision train.attention train.fused_loss train.compile train.profile device preset
""".split()


@pytest.mark.parametrize("stage", [Pretrain, PromptTune])
def test_a_resumed_run_may_change_where_and_how_fast_it_trains_and_nothing_else(stage: type) -> None:
    saving = {f"saving.{name}" for name in ("every_steps", "every_minutes", "keep", "asynchronous")}
    assert {option.name for option in options(stage) if option.may_change} == {*WHERE_AND_HOW_FAST, *saving}


def test_help_says_what_a_resumed_run_may_change(capsys: Any) -> None:
    for stage, times in ((Pretrain, 34), (Evaluate, 0)):
        with pytest.raises(SystemExit) as end:
            cli.parse(stage, "stage", ["--help"])
        assert end.value.code == 0
        assert " ".join(capsys.readouterr().out.split()).count("A resumed run may change it.") == times


REQUIRED: dict[type, list[str]] = {
    Prepare: ["--input", "log.csv", "--output", "o"],
    Pretrain: ["--data", "d", "--output", "o"],
    PromptTune: ["--data", "d", "--checkpoint", "c", "--output", "o"],
    Evaluate: ["--data", "d", "--checkpoint", "c", "--output", "o"],
}


def parsed(stage: type, *words: str) -> Any:
    return cli.parse(stage, "stage", [*REQUIRED[stage], *words])


def refused(capsys: Any, stage: type, words: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.parse(stage, "recgpt_torchrec.stage", words)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err.removeprefix("recgpt_torchrec.stage: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("stage", "words", "message"),
    [
        (Pretrain, ["--model.layer", "3"], "unknown option --model.layer; did you mean --model.layers?"),
        (Pretrain, ["--epochs=3"], "unknown option --epochs; did you mean --train.epochs?"),
        (Pretrain, ["--lr", "1"], "unknown option --lr; did you mean --tables.lr or --optimizer.lr?"),
        (Pretrain, ["--zzz", "1"], "unknown option --zzz; --help lists all"),
        (Pretrain, ["--checkpoint.keep", "3"], "unknown option --checkpoint.keep; did you mean --saving.keep?"),
        (PromptTune, ["--checkpoint.keep", "3"], "unknown option --checkpoint.keep; did you mean --saving.keep?"),
        (PromptTune, ["--checkpointing.keep=3"], "unknown option --checkpointing.keep; did you mean --saving.keep?"),
        (Prepare, ["--min-count", "3"], "unknown option --min-count; did you mean --min_count?"),
        (Pretrain, ["--model.layers", "x"], "--model.layers is x; it must be a whole number"),
        (PromptTune, ["--model.layers", "x"], "--model.layers is x; it must be a whole number"),
        (PromptTune, ["--model.heads", "3"], "--model.heads 3 must divide --model.dim 64"),
        (Pretrain, ["--optimizer.lr", "fast"], "--optimizer.lr is fast; it must be a number"),
        (Pretrain, ["--saving.asynchronous", "no!"], "--saving.asynchronous is no!; it must be true or false"),
        (Pretrain, ["--targets", "old"], "--targets is old; it must be one of all, new"),
        (Pretrain, ["--seed", "-1"], "--seed is -1; it must be from 0 to 4294967295"),
        (Pretrain, ["--seed"], "--seed needs a value"),
        (
            Pretrain,
            ["--output", "-name"],
            "argument --output: expected one argument; a value that begins with - is given as --output=-...",
        ),
        (
            Pretrain,
            ["--seed", "1", "2"],
            "unexpected '2' after --seed; an option begins with -- and takes one value, quoted where it has spaces",
        ),
        (Evaluate, ["--ks", "5", "x"], "--ks is 5 x; it must be one or more whole numbers"),
        (Evaluate, ["--ks", "--split", "test"], "--ks needs a value"),
        (Pretrain, ["--config", "gone.yaml"], "--config gone.yaml: no such file"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_the_nearest_name(
    stage: type, words: list[str], message: str, capsys: Any
) -> None:
    assert refused(capsys, stage, [*REQUIRED[stage], *words]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: 3", "model is 3, but it is a group of options; write its options below it, like model.dim"),
        ("model: null", "model is None, but it is a group"),
        ("model: [1]", "model is [1], but it is a group"),
        ("loss: all", "loss is 'all', but it is a group"),
    ],
)
def test_a_group_that_holds_no_options_costs_one_line(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.parse(Pretrain, "x", ["--config", str(tmp_path / "mine.yaml"), "--data", "d", "--output", "o"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and message in said
    # Where a group may be null, null is a value.
    arguments = ["--config", str(tmp_path / "mine.yaml"), "--data", "d", "--output", "o", "--checkpoint", "c"]
    if text == "model: null":
        assert cli.parse(PromptTune, "x", arguments).model is None


def test_the_file_of_one_group_is_checked_like_any_other(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model.yaml").write_text("layers: 3\n")
    arguments = ["--model", str(tmp_path / "model.yaml"), "--data", "d", "--output", "o"]
    assert cli.parse(Pretrain, "x", arguments).model.layers == 3
    (tmp_path / "model.yaml").write_text("layer: 3\n")
    with pytest.raises(SystemExit):
        cli.parse(Pretrain, "x", arguments)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "did you mean model.layers?" in said


def test_all_missing_options_are_named_together(capsys: Any) -> None:
    assert refused(capsys, Pretrain, ["--seed", "1"]) == "--data, --output must be given"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {epochs: 3}", "{}: unknown option trian; did you mean train?"),
        ("train: {epoch: 3}", "{}: unknown option train.epoch; did you mean train.epochs?"),
        ("checkpointing: {keep: 3}", "{}: unknown option checkpointing; did you mean saving?"),
        ("checkpoint: {keep: 3}", "{}: unknown option checkpoint; did you mean saving?"),
        ("train: {epochs: few}", "{}: train.epochs is few; it must be a whole number"),
        ("- 3", "--config {} holds no options; write them as lines like seed: 1"),
        ("saving: {keep: null}", "{}: saving.keep is null; it must be a whole number"),
        ("saving: {asynchronous: }", "{}: saving.asynchronous is null; it must be true or false"),
        ("seed: 1\nseed: 2", "--config {}, line 2 is not YAML: seed is given twice"),
        ("seed: 2001-99-99", "--config {} holds a value that cannot be read: month must be in 1..12"),
        ("a: " + "[" * 9999, "--config {} is nested too deeply"),
        ("#" * 2**20 + "\nseed: 1", "--config {} has more than 1,048,576 characters; no file of options has"),
        ("config: c.yaml", "--config {} names itself as config, directly or through others"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_the_files_name(
    text: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    said = refused(capsys, PromptTune, [*REQUIRED[PromptTune], "--config", str(path)])
    assert said == message.format(path)


@pytest.mark.parametrize("name", hostile_yaml(""))
@pytest.mark.timeout(20)
def test_a_file_of_options_makes_no_objects_and_grows_no_larger(name: str, tmp_path: Path, capsys: Any) -> None:
    """A file that names commands and classes, or stands for more than it is, costs one line."""
    content = hostile_yaml(f"{tmp_path}/canary")[name]
    (tmp_path / "config.yaml").write_bytes(content)
    for stage in (Pretrain, PromptTune):
        said = refused(capsys, stage, [*REQUIRED[stage], "--config", str(tmp_path / "config.yaml")])
        assert len(said) < 1000
    assert not (tmp_path / "canary").exists()


def test_only_rank_0_reports_a_mistake_and_every_rank_ends_with_status_2(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(cli, "RANK_0_SECONDS", 0)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "RANK", "0")
    assert refused(capsys, Pretrain, []) != ""
    for words in ([], [*REQUIRED[Pretrain], "--seed", "-1"]):
        monkeypatch.setitem(os.environ, "RANK", "1")
        with pytest.raises(SystemExit) as end:
            cli.parse(Pretrain, "stage", words)
        assert end.value.code == 2 and capsys.readouterr() == ("", "")


def test_a_list_is_words_or_one_word_or_yaml(tmp_path: Path) -> None:
    for words in (["--ks", "20", "50"], ["--ks", "[20, 50]"], ["--ks=[20,50]"]):
        assert parsed(Evaluate, *words, "--split", "test").ks == [20, 50]
    assert parsed(Evaluate, "--ks", "20").ks == parsed(Evaluate, "--ks=20").ks == [20]
    tuned = parsed(PromptTune, "--tuning.trained", "users", "items", "--seed", "3")
    assert (tuned.tuning.trained, tuned.seed) == (["users", "items"], 3)
    assert parsed(PromptTune, "--tuning.trained", "[users,items]").tuning.trained == ["users", "items"]
    assert parsed(Prepare, "--input", "a b.csv", "[ab].csv", "3").input == ["a b.csv", "[ab].csv", "3"]
    path = tmp_path / "c.yaml"
    for given in ({"ks": [20, 50]}, {"ks": 20}):
        path.write_text(yaml.safe_dump(given))
        assert parsed(Evaluate, "--config", str(path)).ks == [20, 50][: 1 + isinstance(given["ks"], list)]
    path.write_text("tuning: {trained: users}")
    assert parsed(PromptTune, "--config", str(path)).tuning.trained == ["users"]


def test_whole_numbers_may_be_written_as_1e8(tmp_path: Path, capsys: Any) -> None:
    assert parsed(Pretrain, "--loss.negatives", "1e4", "--batch.tokens", "4.096e3").loss.negatives == 10_000
    assert parsed(Pretrain, "--batch.tokens=4.096e3").batch.tokens == 4096
    assert parsed(Pretrain, "--batch.tokens", "auto").batch.tokens == "auto"
    assert parsed(Evaluate, "--ks", "1e1", "50").ks == [10, 50]
    path = tmp_path / "c.yaml"
    path.write_text("{loss: {negatives: 1e4}, batch: {tokens: 4.096e+3}, optimizer: {lr: 1e-3}}")
    config = parsed(Pretrain, "--config", str(path))
    assert (config.loss.negatives, config.batch.tokens, config.optimizer.lr) == (10_000, 4096, 1e-3)
    assert parsed(Pretrain, "--data", "1e4").data == "1e4"  # text stays text
    for value in ("1.5", "1e-1", "1e400", "nan", "inf"):
        said = refused(capsys, Pretrain, [*REQUIRED[Pretrain], "--loss.negatives", value])
        assert said == f"--loss.negatives is {value}; it must be a whole number"


def test_later_options_win_over_files_and_a_files_group_over_that_of_the_file_below_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{seed: 3, model: {layers: 3, dim: 32}, optimizer: {lr: 1e-4}}")
    (tmp_path / "mine.yaml").write_text("config: base.yaml\nmodel: {layers: 2}\ninitial: null\n")
    mine = ["--config", str(tmp_path / "mine.yaml")]
    config = parsed(Pretrain, *mine, "--train.epochs", "7", "--optimizer.warmup_steps", "10")
    assert (config.seed, config.model.layers, config.model.dim, config.optimizer.lr) == (3, 2, 64, 1e-4)
    assert (config.train.epochs, config.optimizer.warmup_steps, config.initial) == (7, 10, None)
    assert parsed(Pretrain, *mine, "--model.layers", "5").model.layers == 5
    assert parsed(Pretrain, "--model.layers", "5", *mine).model.layers == 2


def recgpt(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "importtime", "-m", "recgpt_torchrec", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_installed_command_recgpt_names_a_callable() -> None:
    """From pyproject.toml where the installed metadata is older than the command, or the package is not installed."""
    installed = list(importlib.metadata.entry_points(group="console_scripts", name="recgpt"))
    if not installed:
        project = tomllib.loads((Path(cli.__file__).parents[1] / "pyproject.toml").read_text())["project"]
        installed = [importlib.metadata.EntryPoint("recgpt", project["scripts"]["recgpt"], "console_scripts")]
    for command in installed:
        assert command.load() is __main__.main


def test_recgpt_lists_the_stages_in_order_without_importing_torch() -> None:
    done = recgpt("--help")
    assert done.returncode == 0
    assert not any(line.endswith(("| torch", "| pyarrow")) for line in done.stderr.splitlines())
    named = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert named == list(STAGES)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_recgpt_stage_runs_the_stage(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["recgpt", "pretrain", "--model.layer", "3"])
    with pytest.raises(SystemExit) as end:
        __main__.main()
    expected = "recgpt pretrain: error: unknown option --model.layer; did you mean --model.layers?\n"
    assert (end.value.code, capsys.readouterr().err) == (2, expected)
    called: list[Any] = []
    monkeypatch.setattr("recgpt_torchrec.pretrain.main", called.append)
    monkeypatch.setattr(sys, "argv", ["recgpt", "pretrain", "--data", "d", "--output", "o"])
    __main__.main()
    assert called == [Pretrain(data="d", output="o")]


def test_an_unknown_stage_is_reported_in_one_line_with_the_nearest_name(capsys: Any, monkeypatch: Any) -> None:
    for word, end_of_line in (("pre-train", "did you mean pretrain?"), ("unknown", "--help lists all")):
        monkeypatch.setattr(sys, "argv", ["recgpt", word])
        with pytest.raises(SystemExit) as end:
            __main__.main()
        assert (end.value.code, capsys.readouterr().err) == (2, f"recgpt: error: unknown stage {word}; {end_of_line}\n")


def test_every_stage_program_is_registered_with_its_options() -> None:
    package = Path(cli.__file__).parent
    programs = {path.stem for path in package.glob("*.py") if "cli.run(" in path.read_text()} - {"cli", "__main__"}
    assert programs == set(STAGES)
    for name, stage in STAGES.items():
        assert (
            f'cli.run({stage.config.__name__}, main, "recgpt_torchrec.{name}")' in (package / f"{name}.py").read_text()
        )
