"""The repeat bias: its fit against scipy, its sample on any number of ranks, and what it does to unmasked figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.checkpoints.repeat_bias import BOUND, describe_bias
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reading.hashing import hash_numbers
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.repeats.fitting import fit_bias
from recgpt_torchrec.evaluation.repeats.sample import RepeatSample
from recgpt_torchrec.training.progress import Progress
from tests.support import SMALL, change_json, stage, write_dataset
from tools.ranks import run_ranks


def likeliest(scores: np.ndarray, seen: list[list[int]], targets: np.ndarray) -> float:
    """The bias under which the targets are likeliest by the softmax over all items, by scipy's search."""

    def loss(bias: float) -> float:
        biased = scores.astype(np.float64)
        for row, items in enumerate(seen):
            biased[row, sorted(set(items))] += bias
        return float(np.sum(np.logaddexp.reduce(biased, axis=1) - biased[np.arange(len(targets)), targets]))

    return float(minimize_scalar(loss, bounds=(-BOUND, BOUND), method="bounded", options={"xatol": 1e-6}).x)


def draw(seed: int, users: int = 300, items: int = 40, dim: int = 4) -> tuple[Any, ...]:
    """Vectors of items and of users, their histories with repeats, and targets of which some repeat."""
    rng = np.random.default_rng(seed)
    vectors, queries = (rng.normal(size=(n, dim)).astype(np.float32) for n in (items, users))
    seen = [rng.integers(0, items, rng.integers(0, 12)).tolist() for _ in range(users)]
    targets = np.array(
        [rng.choice(s) if s and rng.random() < seed % 5 / 5 + 0.1 else rng.integers(items) for s in seen]
    )
    return vectors, queries, seen, targets


def sample_of(vectors: np.ndarray, users: int = 8192) -> tuple[RepeatSample, Catalogue]:
    return RepeatSample(users), Catalogue.of_vectors(torch.from_numpy(vectors))


@pytest.mark.parametrize("seed", range(5))
def test_the_bias_is_the_likeliest_one(seed):
    vectors, queries, seen, targets = draw(seed)
    sample, catalogue = sample_of(vectors)
    for rows in np.array_split(np.arange(len(queries)), 4):
        part = Ragged.from_lists([seen[row] for row in rows])
        sample.add(rows, torch.from_numpy(queries[rows]), torch.from_numpy(targets[rows]), part)
    assert sample.fit(catalogue) == pytest.approx(likeliest(queries @ vectors.T, seen, targets), abs=2e-3)


@given(
    st.lists(st.tuples(st.one_of(st.floats(-50, 50), st.sampled_from([-np.inf, np.inf])), st.booleans()), max_size=20)
)
def test_expected_repeats_equal_those_there_are_or_the_bias_is_at_its_bound(users):
    # A user without a history cannot repeat, and one who has everything cannot do otherwise.
    users = [(odds, is_repeat and odds > -np.inf or odds == np.inf) for odds, is_repeat in users]
    log_odds, is_repeat = np.array([odds for odds, _ in users]), np.array([repeat for _, repeat in users], bool)
    bias = fit_bias(log_odds, is_repeat)
    finite = np.isfinite(log_odds)
    if not finite.any():
        assert bias is None
        return
    repeats, odds = int(is_repeat[finite].sum()), log_odds[finite]
    assert bias is not None and -BOUND <= bias <= BOUND
    expected = [sum(1 / (1 + np.exp(-np.longdouble(x + b))) for x in odds) for b in (bias - 1e-3, bias, bias + 1e-3)]
    if bias > -BOUND:
        assert expected[0] <= repeats + 1e-9
    if bias < BOUND:
        assert expected[2] >= repeats - 1e-9
    if repeats in (0, odds.size):
        assert bias == (BOUND if repeats else -BOUND)


def test_nobody_repeats_everybody_repeats_and_nobody_is_there():
    odds = np.linspace(-5, 0, 50)
    assert fit_bias(odds, np.zeros(50, bool)) == -30 and fit_bias(odds, np.ones(50, bool)) == 30
    assert fit_bias(np.zeros(0), np.zeros(0, bool)) is None and fit_bias(np.array([-np.inf]), np.array([False])) is None
    # Half of the users repeat where the odds are even: nothing is to be added.
    assert fit_bias(np.zeros(50), np.arange(50) % 2 == 0) == pytest.approx(0, abs=1e-3)


def test_without_histories_the_bias_is_0_and_a_line_says_so(capfd):
    vectors, queries, _, targets = draw(1)
    sample, catalogue = sample_of(vectors)
    none = Ragged.from_lists([[]] * len(queries))
    sample.add(np.arange(len(queries)), torch.from_numpy(queries), torch.from_numpy(targets), none)
    assert sample.fit(catalogue) == 0.0
    assert "Repeat bias 0: no user with a validation item has a history" in "".join(capfd.readouterr())


def fit_on_ranks(rank: int, world_size: int, seed: int, users: int) -> float:
    vectors, queries, seen, targets = draw(seed)
    first, stop = id_range(len(vectors), rank, world_size)
    catalogue = Catalogue.of_vectors(torch.from_numpy(vectors[first:stop].copy()), len(vectors), first)
    sample = RepeatSample(users)
    own = np.arange(rank, len(queries), world_size)
    if world_size == 3:  # one rank has all users
        own = np.arange(len(queries)) if rank == 1 else own[:0]
    for rows in np.array_split(own, 5):
        part = Ragged.from_lists([seen[row] for row in rows])
        sample.add(rows, torch.from_numpy(queries[rows]), torch.from_numpy(targets[rows]), part)
    return sample.fit(catalogue)


@pytest.mark.parametrize("users", [50, 8192])
def test_it_is_the_same_on_any_number_of_ranks_and_of_the_users_with_the_smallest_hashes(users):
    vectors, queries, seen, targets = draw(2)
    chosen = np.argsort(hash_numbers(np.arange(len(queries)), 0))[:users]
    wanted = likeliest(queries[chosen] @ vectors.T, [seen[row] for row in chosen], targets[chosen])
    found = {bias for ranks in (1, 2, 3) for bias in run_ranks(fit_on_ranks, ranks, 2, users)}
    assert len(found) == 1 and found.pop() == pytest.approx(wanted, abs=2e-3)


def test_a_bias_is_told_with_its_meaning():
    assert describe_bias(-30) == "bias -30: no item of a history comes back"
    assert describe_bias(30) == "bias 30: only items of the history come"
    assert "0.135 times" in describe_bias(-2.0) and "as much as any others" in describe_bias(0.0)


# ------------------------------------------------------------------------------------------- whole stages


def write_log(folder: Path, repeats: float, users: int = 200, items: int = 60) -> None:
    """Each item is followed by the next on a ring; a share `repeats` of the interactions takes a known item again."""
    rng, histories = np.random.default_rng(0), []
    for _ in range(users):
        at = int(rng.integers(items))
        history = [at]
        while len(history) < 9:
            if rng.random() < repeats:
                history.append(int(rng.choice(history)))
            else:
                at = (at + 1) % items
                history.append(at)
        histories.append(history)
    write_dataset(folder, histories, items=items)


RUNS: dict[str, dict[str, Any]] = {"with": {}, "without": {"--recall.repeat_bias": "false"}}
"""Evaluations by name, with their options."""
TRAIN = {**SMALL, "--loss.candidates": "all", "--model.dim": 16, "--batch.tokens": 200, "--train.precision": "fp32"}


def run_options(folder: Path, repeats: float) -> dict[str, Any]:
    """Where half repeat, two epochs are too few to learn it from the log."""
    options = {"--data": folder / "data", "--output": folder / "run", **TRAIN}
    return {**options, "--train.epochs": 2 if repeats == 0.5 else 4}


@pytest.fixture(scope="module", params=[0.5, 0.1, 0.0], ids=["half", "a tenth", "nobody"])
def trained(request, tmp_path_factory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("repeats")
    write_log(folder / "data", request.param)
    assert stage("pretrain", run_options(folder, request.param)) == 0
    for name, more in RUNS.items():
        given = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / f"{name}.json"}
        assert stage("evaluate", {**given, "--split": "test", "--recall.interests": 2, **more}) == 0
    return folder, request.param


def ndcg(folder: Path, name: str, path: str, how: str) -> float:
    return json.loads((folder / f"{name}.json").read_text())["results"][path][how]["NDCG@10"]


PATHS = ["pretrain", "pretrain_two_step", "pretrain_interests_2_quota", "pretrain_interests_2_score"]


def test_the_bias_says_how_many_repeat_and_unmasked_figures_are_never_worse_than_masked(trained):
    folder, repeats = trained
    settings = CheckpointSettings.read(find_checkpoint(str(folder / "run")))
    with_bias, without = (json.loads((folder / f"{name}.json").read_text()) for name in ("with", "without"))
    assert with_bias["repeat_bias"] == settings.repeat_bias and without["repeat_bias"] == 0
    for path in PATHS:  # masked figures know nothing of it
        assert with_bias["results"][path]["masked"] == without["results"][path]["masked"]
    for path in ("popularity", "cooccurrence"):
        assert with_bias["results"][path] == without["results"][path]
    one = PATHS[0]
    figures = [ndcg(folder, "with", one, "masked"), *(ndcg(folder, name, one, "unmasked") for name in RUNS)]
    print(repeats, settings.repeat_bias, "masked, with the bias, without:", figures)
    masked, unmasked, raw = figures
    if repeats == 0.5:
        # Likelier, but no better by NDCG: the model's own scores already put what is known first.
        assert settings.repeat_bias > 0 and unmasked > masked
        return
    if repeats:
        assert -30 < settings.repeat_bias < 0 and unmasked > max(masked, raw)
        return
    assert settings.repeat_bias == -30
    for path in PATHS:
        assert ndcg(folder, "with", path, "unmasked") == ndcg(folder, "with", path, "masked")
    assert raw < unmasked


def test_a_run_says_its_bias_and_resuming_initial_and_tuning_keep_it(trained, capfd):
    folder, repeats = trained
    bias = CheckpointSettings.read(find_checkpoint(str(folder / "run"))).repeat_bias
    assert stage("pretrain", run_options(folder, repeats)) == 0
    assert f"Repeat {describe_bias(bias)}" in capfd.readouterr().out
    # A run on a dataset that holds nothing out fits none: it keeps that of the checkpoint it starts from.
    write_dataset(folder / "all", [[0, 1, 2], [3, 4, 59]] * 100, items=60, hold_out="none")
    more = {"--data": folder / "all", "--output": folder / "more", "--initial": folder / "run", **TRAIN}
    assert stage("pretrain", {**more, "--train.epochs": 1}) == 0
    said = "".join(capfd.readouterr())
    assert f"{describe_bias(bias)}; nothing is held out to fit it on" in said
    assert CheckpointSettings.read(find_checkpoint(str(folder / "more"))).repeat_bias == bias != 0


def test_a_checkpoint_of_an_earlier_version_has_no_bias_and_a_wrong_one_is_refused(trained, tmp_path):
    folder, _ = trained
    old = Path(shutil.copytree(find_checkpoint(str(folder / "run")), tmp_path / "old"))
    change_json(old / "checkpoint.json", lambda values: values["progress"].pop("repeat_bias"))
    assert CheckpointSettings.read(str(old)).repeat_bias == Progress.of_checkpoint(str(old)).repeat_bias == 0
    wrong: Any
    for wrong in (31, "much"):
        values = json.loads((old / "checkpoint.json").read_text())
        values["progress"]["repeat_bias"] = wrong
        (old / "checkpoint.json").write_text(json.dumps(values))
        for read in (CheckpointSettings.read, Progress.of_checkpoint):
            with pytest.raises(InputError, match=r"progress.repeat_bias is"):
                read(str(old))
