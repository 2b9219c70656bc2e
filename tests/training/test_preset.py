"""`--preset auto`: options from a dataset's statistics, with reasons, below those that are given."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec import api, cli
from recgpt_torchrec.config import Pretrain, PromptTune
from recgpt_torchrec.config.fields import given_names, option_value, options
from recgpt_torchrec.config.preset.rule import Statistics, choose
from recgpt_torchrec.config.reports.doctor import Doctor
from recgpt_torchrec.config.reports.plan import Plan
from recgpt_torchrec.config.serving.run import RunAll, stage_config
from recgpt_torchrec.data.reading.preset import apply_preset, statistics_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.planning.workload import Workload
from tests.support import change_json, read_epochs, stage, walks, write_dataset
from tests.test_pretrain import checkpoints, tensors

LENGTHS = {"mean": 8.9, "min": 5, "50%": 6, "90%": 14, "99%": 43, "max": 204}
FEW = ["--train.epochs", "2", "--model.dim", "8", "--model.heads", "1", "--device", "cpu"]


def chosen(
    tuned: bool = False, epochs: int | None = None, max_len: int | None = None, **changes: Any
) -> dict[str, Any]:
    """What the rule chooses for Beauty's statistics with some changes."""
    values = {"users": 22_363, "items": 12_101, "interactions": 198_502, "targets": 131_413, "entries": 198_502}
    statistics = Statistics(**{**values, "lengths": LENGTHS, **changes})
    return {choice.name: choice.value for choice in choose(statistics, tuned, epochs, max_len)}


def test_what_is_chosen_for_a_log_of_beautys_size() -> None:
    assert chosen() == {
        "model.output_map": True,
        "model.history_in": True,
        "model.history_out": True,
        "model.layers": 1,
        "model.dropout": 0.5,
        "model.attention_dropout": 0.5,
        "model.user_dropout": 0.5,
        "model.max_len": 50,
        "batch.thinning": 0.3,
        "batch.thinned": 0.3,
        "loss.candidates": "all",
        "batch.step_tokens": 768,
        "train.epochs": 16,
        "train.patience": 0,
        "train.validate_every": 2,
    }


def test_the_configuration_that_was_measured_on_beauty_is_what_the_rule_chooses_for_it() -> None:
    words = ["--config", "configs/beauty.yaml", "--data", "d", "--output", "o"]
    written = cli.parse(Pretrain, "stage", words)
    differ = {name for name, value in chosen().items() if option_value(written, name) != value}
    assert differ == {"train.validate_every"}  # fewer, as each takes as long as half an epoch there


@pytest.mark.parametrize(
    ("option", "changes", "value"),
    [
        ("model.layers", {"items": 100_000, "targets": 1_999_999}, 1),
        ("model.layers", {"items": 100_000, "targets": 2_000_000}, 2),
        ("model.layers", {"items": 1000, "targets": 29_999}, 1),
        ("model.layers", {"items": 1000, "targets": 30_000}, 2),
        ("model.dropout", {"items": 1000, "targets": 29_999}, 0.5),
        ("model.dropout", {"items": 1000, "targets": 30_000}, 0.3),
        ("model.attention_dropout", {"items": 1000, "targets": 99_999}, 0.3),
        ("model.attention_dropout", {"items": 1000, "targets": 100_000}, 0.2),
        ("model.dropout", {"items": 1, "targets": 10**12}, 0.2),
        ("model.max_len", {"lengths": {"90%": 50, "99%": 50}}, 50),
        ("model.max_len", {"lengths": {"90%": 51, "99%": 51}}, 100),
        ("model.max_len", {"lengths": {"90%": 100, "99%": 100}}, 100),
        ("model.max_len", {"lengths": {"90%": 241, "99%": 447}}, 200),
        ("model.max_len", {"lengths": {}}, None),
        ("batch.long_histories", {"lengths": {"90%": 200, "99%": 200}}, None),
        ("batch.long_histories", {"lengths": {"90%": 201, "99%": 201}}, "windows"),
        ("batch.long_histories", {"lengths": {"90%": 50, "99%": 50}, "max_len": 50}, None),
        ("batch.long_histories", {"lengths": {"90%": 50, "99%": 50}, "max_len": 49}, "windows"),
        ("batch.long_histories", {"lengths": {"90%": 241, "99%": 447}, "max_len": 1000}, None),
        ("batch.long_histories", {"lengths": {}, "max_len": 1}, None),
        ("loss.candidates", {"items": 30_000}, "all"),
        ("loss.negatives", {"items": 30_000}, None),
        ("loss.candidates", {"items": 30_001}, "sampled"),
        ("loss.negatives", {"items": 30_001}, 7500),
        ("loss.negatives", {"items": 10**8}, 32_768),
        ("batch.step_tokens", {"targets": 131_413 // 2}, 384),  # as many steps of an epoch
        ("batch.step_tokens", {"targets": 4 * 131_413}, 1536),  # twice as many
        ("batch.step_tokens", {"targets": 100 * 131_413}, 7680),
        ("batch.step_tokens", {"targets": 0}, 128),
        ("batch.step_tokens", {"entries": 2 * 198_502}, 1536),
        ("train.epochs", {"targets": 0}, 24),
        ("train.epochs", {"items": 10**6, "targets": 16 * 131_413}, 8),
        ("train.epochs", {"items": 1000, "targets": 16 * 131_413}, 14),
        ("train.epochs", {"targets": 10**12}, 1),
        ("train.validate_every", {"targets": 10**12}, 1),
        ("train.validate_every", {"targets": 0}, 3),
        ("train.validate_every", {"epochs": 2}, 1),
        ("train.validate_every", {"epochs": 80}, 10),
    ],
)
def test_the_rule_at_its_boundaries(option: str, changes: dict[str, Any], value: Any) -> None:
    assert chosen(**changes).get(option) == value


def test_the_length_of_a_share_lies_between_the_recorded_quantiles() -> None:
    statistics = Statistics(
        users=1, items=1, interactions=1, targets=1, entries=1, lengths={"90%": 10, "99%": 1000}
    )  # a share of 1 / length ** .5 is longer, but for a factor
    found = [statistics.length_at(share) for share in (0.9, 0.95, 0.99)]
    assert found == pytest.approx([10, 10 * (0.1 / 0.05) ** 2, 1000])


def test_all_that_is_chosen_are_options_with_reasons_and_tuning_leaves_the_model_alone() -> None:
    for tuned, config in ((False, Pretrain), (True, PromptTune)):
        known = {option.name for option in options(config)}
        for items in (1000, 100_000):
            given = Statistics(users=9, items=items, interactions=10**6, targets=10**5, entries=10**6, lengths=LENGTHS)
            for choice in choose(given, tuned):
                assert {choice.name, *choice.yields_to} <= known and len(choice.reason.split()) > 4
                assert not (tuned and choice.name.startswith("model."))
    assert chosen(tuned=True)["train.epochs"] == 8


@pytest.mark.parametrize(("targets", "rates"), [(29_999, (0.02, 0.002, 0.001)), (30_000, (0.005, 0.0005, 0.0003))])
def test_tuning_learns_more_slowly_where_items_have_many_targets(targets: int, rates: tuple[float, ...]) -> None:
    found = chosen(tuned=True, items=1000, targets=targets)
    assert tuple(found[name] for name in ("tables.lr", "tables.user_lr", "optimizer.lr")) == rates
    assert "tables.lr" not in chosen(items=1000, targets=targets)  # pre-training has one for all


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset") / "data"
    write_dataset(folder, walks(users=60, items=20), items=20)
    record(folder, LENGTHS)
    return folder


def record(folder: Path, lengths: dict[str, float]) -> None:
    """Record lengths as `prepare` does."""
    change_json(folder / "manifest.json", lambda values: values["preparation"].update(lengths=lengths))


def resolve(data: Path, *words: str) -> tuple[Pretrain, list[str]]:
    return apply_preset(cli.parse(Pretrain, "x", ["--data", str(data), "--output", "o", *words]))


def test_without_a_preset_nothing_is_read_or_changed(data: Path) -> None:
    config, lines = resolve(data / "nowhere", "--model.dropout", "0.25")
    assert lines == [] and config.model.dropout == 0.25 and config.preset == "none"


def test_a_command_line_overrides_a_file_and_a_file_the_preset(data: Path, tmp_path: Path) -> None:
    default, _ = resolve(data, "--preset", "auto")
    assert (default.model.dropout, default.model.user_dropout, default.model.output_map) == (0.5, 0.5, True)
    assert (default.loss.candidates, default.train.epochs, default.train.patience) == ("all", 24, 0)
    file = tmp_path / "mine.yaml"
    file.write_text("preset: auto\nmodel: {dropout: 0.25, layers: 3}\ntrain: {epochs: 20}\n")
    config, lines = resolve(data, "--model.layers", "2", "--config", str(file), "--train.epochs", "5")
    # A group of a file replaces what it names, and no other option of the group.
    assert (config.model.dropout, config.model.output_map, config.model.max_len) == (0.25, True, 50)
    assert (config.model.layers, config.train.epochs, config.train.patience) == (3, 5, 0)  # the file came after layers
    given = [line for line in lines if "given" in line]
    assert given == [
        "preset auto: model.layers 3 as given, instead of 1",
        "preset auto: model.dropout 0.25 as given, instead of 0.5",
        "preset auto: train.epochs 5 as given, instead of 24",
    ]
    said = [line.removeprefix("preset auto: ").split()[0] for line in lines]
    assert said == list(chosen(targets=0)) and len(lines) - len(given) == 12


def test_histories_longer_than_the_length_that_is_given_are_trained_whole(data: Path) -> None:
    assert resolve(data, "--preset", "auto")[0].batch.long_histories == "newest"
    config, lines = resolve(data, "--preset", "auto", "--model.max_len", "19")  # .95 of LENGTHS have at most 20
    assert (config.model.max_len, config.batch.long_histories) == (19, "windows")
    assert "preset auto: model.max_len 19 as given, instead of 50" in lines
    assert any(
        line.startswith("preset auto: batch.long_histories windows, since about 5% of the his") for line in lines
    )
    config, lines = resolve(data, "--preset", "auto", "--model.max_len", "19", "--batch.long_histories", "newest")
    assert config.batch.long_histories == "newest"
    assert "preset auto: batch.long_histories newest as given, instead of windows" in lines
    config, lines = resolve(data, "--preset", "auto", "--model.max_len", "19", "--soft_targets", "0.3")
    assert config.batch.long_histories == "newest"  # answers follow the newest items alone
    assert "preset auto: batch.long_histories is not set to windows, since soft_targets 0.3 is given" in lines


def test_a_value_that_is_given_counts_though_it_is_the_default(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[n % 5 for n in range(60)]] * 20, items=5)
    assert resolve(tmp_path, "--preset", "auto")[0].model.dropout == 0.2
    config, lines = resolve(tmp_path, "--preset", "auto", "--model.dropout", "0.5")
    assert (config.model.dropout, config.model.attention_dropout) == (0.5, 0.2)
    assert "preset auto: model.dropout 0.5 as given, instead of 0.2" in lines


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--loss.negatives", "99"], "loss.candidates is not set to all, since loss.negatives 99 is given"),
        (["--train.steps", "7"], "train.epochs is not set to 24, since train.steps 7 is given"),
    ],
)
def test_an_option_that_excludes_a_choice_is_named(data: Path, words: list[str], line: str) -> None:
    config, lines = resolve(data, "--preset", "auto", *words)
    assert f"preset auto: {line}" in lines
    assert (config.loss.candidates == "sampled") == ("negatives" in line)


def test_what_does_not_fit_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"--data": data, "--output": tmp_path / "run", "--preset": "best"}
    assert stage("pretrain", words) == 2
    assert "--preset is best; it must be one of none, auto" in capsys.readouterr().err
    assert stage("pretrain", {**words, "--preset": "auto", "--data": tmp_path / "gone"}) == 2
    assert f"{tmp_path / 'gone'} is not a dataset" in capsys.readouterr().err
    for value, message in ((0, "--batch.step_tokens is 0; it must be at least 1"), (9, "--batch.tokens both say")):
        with pytest.raises(InputError, match=message):
            cli.make_config(Pretrain, "x", {"data": "d", "output": "o", "batch.step_tokens": value, "batch.tokens": 60})


def test_a_run_prints_and_records_what_was_chosen_and_resumes_to_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"--data": data, "--output": tmp_path / "whole", "--preset": "auto"}
    words |= dict(zip(FEW[::2], FEW[1::2], strict=True))
    assert stage("pretrain", words) == 0
    said = [line for line in "".join(capsys.readouterr()).splitlines() if line.startswith("preset auto: ")]
    assert [line.split()[2] for line in said] == list(chosen(targets=0))
    assert said[4] == "preset auto: model.dropout 0.5, since there are 12.9 training targets per item (258 of 20)"
    assert "preset auto: train.epochs 2 as given, instead of 24" in said
    recorded = json.loads((tmp_path / "whole/run.json").read_text())["config"]
    assert recorded["preset"] == "auto" and recorded["model"]["output_map"] is True
    assert (recorded["loss"]["candidates"], recorded["train"]["patience"]) == ("all", 0)

    # Stopped after its first epoch, on this folder.
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(checkpoints(tmp_path / "stopped")[-1])
    (tmp_path / "stopped/best.json").unlink(missing_ok=True)
    words["--output"] = tmp_path / "stopped"
    assert stage("pretrain", words) == 0
    ours, theirs = (tensors(checkpoints(tmp_path / name)[-1]) for name in ("stopped", "whole"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    assert len(read_epochs(tmp_path / "stopped")) == 2

    # The values make the run, wherever they come from; without them it is another.
    explicit = {"--model.output_map": "true", "--loss.candidates": "all", "--train.patience": 0}
    explicit |= {"--batch.thinning": 0.3, "--batch.thinned": 0.3, "--batch.step_tokens": 128}
    assert stage("pretrain", {**words, "--preset": "none", **explicit}) == 0
    assert "is already trained" in capsys.readouterr().out
    assert stage("pretrain", {**words, "--preset": "none"}) == 2
    assert "--loss.candidates: all there, sampled now" in capsys.readouterr().err


def test_the_python_interface_takes_it(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Pretrain] = []

    def train_run(config: Pretrain, _: Any) -> str:
        seen.append(config)
        return ""

    monkeypatch.setattr("recgpt_torchrec.pretrain.train_run", train_run)
    api.pretrain(str(data), str(tmp_path / "run"), {"model.layers": 2, "device": "cpu"}, preset="auto")
    (config,) = seen
    assert (config.model.layers, config.model.output_map, config.loss.candidates) == (2, True, "all")
    made = Pretrain(data=str(data), output="o", preset="auto")  # no names of given options: those unlike the defaults
    made.train.epochs = 3
    assert given_names(made) == {"data", "output", "preset", "train.epochs"}
    assert apply_preset(made)[0].train.epochs == 3


def test_prompt_tuning_takes_the_checkpoints_model_and_counts_prompts(tmp_path: Path) -> None:
    segments = [[0, 1, 0, 1, 0, 1, 0, 1, 0]] * 3
    dataset = write_dataset(tmp_path, [[1, 9, 2, 9, 3, 9, 4, 9, 5]] * 3, items=10, segments=segments)
    dataset.manifest.interactions = 15
    assert statistics_of(dataset.manifest, prompts=True).entries == 27
    assert statistics_of(dataset.manifest).entries == 15
    words = ["--data", str(tmp_path), "--checkpoint", "c", "--output", "o", "--preset", "auto"]
    config, lines = apply_preset(cli.parse(PromptTune, "x", words))
    assert config.model is None and config.loss.candidates == "all" and config.train.epochs == 12
    assert lines[0] == "preset auto: model options are those of the checkpoint"


def test_of_a_folder_of_days_the_first_day_chooses(tmp_path: Path) -> None:
    from tests.preparation.test_append import append_day

    rows = [(f"user {n % 9}", f"item {n % 7}", n) for n in range(300)]
    append_day(tmp_path, rows[:200], 1, hold_out="none", history=12)
    before = resolve(tmp_path / "data", "--preset", "auto")
    append_day(tmp_path, rows[200:], 2, hold_out="none", history=12)
    config, lines = resolve(tmp_path / "data", "--preset", "auto")
    assert (dataclasses.asdict(config), lines) == (dataclasses.asdict(before[0]), before[1])
    assert lines[0].endswith("for all of its days") and config.model.max_len == 12
    _, lines_of_short = resolve(tmp_path / "data", "--preset", "auto", "--model.max_len", "5")
    assert not any("long_histories" in line for line in lines_of_short)  # days are trained in windows anyway
    assert any(line.startswith("preset auto: model.max_len 12, since days keep the newest 12") for line in lines)


def test_plan_and_doctor_describe_the_run_that_the_preset_makes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(data), "--preset", "auto", "--gpu", "cpu", "--gpus", "1"]
    config, _ = apply_preset(cli.parse(Plan, "x", words))
    assert Workload.of(config).candidates == 20 and config.loss.candidates == "all"
    examined, lines = apply_preset(cli.parse(Doctor, "x", ["--data", str(data), "--preset", "auto"]))
    assert examined.loss.candidates == "all" and len(lines) == 15
    assert stage("plan", {"--items": 9, "--users": 9, "--preset": "auto"}) == 2
    assert "--preset auto follows a dataset's statistics; give --data DIR" in capsys.readouterr().err


def test_the_runner_of_all_stages_passes_on_which_options_were_given(data: Path) -> None:
    words = ["log.csv", "--output", "o", "--pretrain.preset", "auto", "--pretrain.model.dropout", "0.5"]
    config = cli.parse(RunAll, "run", [*words, "--prompt_tune.seed", "3"])
    built = stage_config(Pretrain, config, "pretrain", data=str(data), output="o")
    assert given_names(built) == {"preset", "model.dropout"}
    assert "preset auto: model.dropout 0.5 as given" in apply_preset(built)[1]


def test_step_tokens_are_those_of_all_ranks_within_the_limits() -> None:
    from recgpt_torchrec.config.defaults import FEWEST, MOST, tokens_of_step

    for ranks in (1, 2, 8):
        assert tokens_of_step(100_000, ranks, "cpu", 1536) == 1536
        assert tokens_of_step(100_000, ranks, "cpu", 1) == FEWEST
        assert tokens_of_step(100_000, ranks, "cpu", 10**6) == MOST["cpu"] * ranks
