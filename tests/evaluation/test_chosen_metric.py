"""`--train.metric`: the figure that decides which checkpoint is best is the one that was asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.config.metric import Metric
from recgpt_torchrec.data.candidates import id_range
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.reading.hashing import hash_numbers
from recgpt_torchrec.evaluation.repeats.sample import RepeatSample
from tests.evaluation.test_repeats import draw, write_log
from tests.support import SMALL, read_sequences, stage
from tools.ranks import run_ranks

KS = (3, 10)


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("NDCG@10", ("NDCG@10", 10, True)),
        ("HR@1", ("HR@1", 1, True)),
        ("unmasked.HR@500", ("HR@500", 500, False)),
    ],
)
def test_a_metric_is_a_figure_of_lists_of_one_length(name, metric):
    assert Metric.parse(name) == metric


@pytest.mark.parametrize("name", ["NDCG", "NDCG@0", "ndcg@10", "masked.HR@5", "MRR@10", "HR@10 ", "unmasked.", ""])
def test_another_name_is_refused_with_what_it_may_be(name, tmp_path, capfd):
    options = {"--data": tmp_path, "--output": tmp_path / "run", "--train.metric": name}
    assert stage("pretrain", options) == 2
    assert f"--train.metric is {name}; it must be HR@K or NDCG@K" in capfd.readouterr().err


def measure_on_ranks(rank: int, world_size: int, users: int) -> tuple[float, dict[str, float]]:
    vectors, queries, seen, targets = draw(2)
    first, stop = id_range(len(vectors), rank, world_size)
    catalogue = Catalogue.of_vectors(torch.from_numpy(vectors[first:stop].copy()), len(vectors), first)
    sample, own = RepeatSample(users), np.arange(rank, len(queries), world_size)
    if world_size == 3:  # one rank has all users
        own = np.arange(len(queries)) if rank == 1 else own[:0]
    part = Ragged.from_lists([seen[row] for row in own])
    sample.add(own, torch.from_numpy(queries[own]), torch.from_numpy(targets[own]), part)
    bias = sample.fit(catalogue)
    return bias, sample.measure(catalogue, bias, KS)


@pytest.mark.parametrize("users", [50, 8192])
def test_unmasked_figures_are_those_of_a_plain_sort_on_any_number_of_ranks(users):
    vectors, queries, seen, targets = draw(2)
    results = [result for ranks in (1, 2, 3) for result in run_ranks(measure_on_ranks, ranks, users)]
    bias = results[0][0]
    chosen = np.argsort(hash_numbers(np.arange(len(queries)), 0))[:users]
    ranks = []
    for row in chosen:
        scores = queries[row] @ vectors.T
        scores[sorted(set(seen[row]))] += bias
        ranks.append(int((scores > scores[targets[row]]).sum()))
    found = np.array(ranks)
    wanted = {}
    for k in KS:
        wanted[f"HR@{k}"] = np.mean(found < k)
        wanted[f"NDCG@{k}"] = np.mean(np.where(found < k, 1 / np.log2(found + 2), 0))
    for other, figures in results:
        assert other == bias and figures == pytest.approx(wanted)


TRAIN: dict[str, Any] = {
    **SMALL,
    "--loss.candidates": "all",
    "--model.dim": 16,
    "--batch.tokens": 200,
    "--train.precision": "fp32",
    "--train.epochs": 6,
    "--train.patience": 0,
    "--saving.keep": 10,
}


def repeated(data: Path) -> float:
    """Share of the histories whose validation item was there before."""
    lists = read_sequences(data)["item_ids"]
    return float(np.mean([items[-2] in items[:-2] for items in lists]))


def train(folder: Path, name: str, metric: str, expect: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """best.json and the lines of history.jsonl of a run."""
    options = {"--data": folder / "data", "--output": folder / name, **TRAIN, "--train.metric": metric}
    assert stage("pretrain", options) == expect
    lines = [json.loads(line) for line in (folder / name / "history.jsonl").read_text().splitlines()]
    return json.loads((folder / name / "best.json").read_text()), lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("metric")
    write_log(folder / "data", repeats=0.5)
    return folder


def test_the_best_checkpoint_is_that_of_the_metric_which_evaluate_finds_again(folder, capfd):
    metric = "unmasked.NDCG@3"
    best, lines = train(folder, "unmasked", metric)
    assert f"validation {metric} {best['value']:.4f}" in capfd.readouterr().out
    values = [line[metric] for line in lines]
    assert best["value"] == max(values) and best["epoch"] == 1 + int(np.argmax(values))
    # What is trained does not depend on it, and what others see of validation is there as before.
    hint = "of the users is in their history"
    assert hint not in "".join(capfd.readouterr())
    of_default, default_lines = train(folder, "masked", "NDCG@10")
    said = "".join(capfd.readouterr())
    assert said.count(hint) == 1 and "--train.metric unmasked.NDCG@10" in said
    assert f"the held-out item of {repeated(folder / 'data'):.0%} {hint}" in said
    figures = ("loss", "HR@5", "NDCG@5", "HR@10", "NDCG@10")
    assert [[line[name] for name in figures] for line in lines] == [
        [line[name] for name in figures] for line in default_lines
    ]
    assert of_default["value"] == max(line["NDCG@10"] for line in default_lines)
    assert not any(name.startswith("unmasked") for line in default_lines for name in line)
    checkpoint = find_checkpoint(str(folder / "unmasked"))
    given = {"--data": folder / "data", "--checkpoint": checkpoint, "--output": folder / "unmasked.json"}
    assert stage("evaluate", {**given, "--split": "validation", "--ks": 3}) == 0
    found = json.loads((folder / "unmasked.json").read_text())["results"]["pretrain"]["unmasked"]
    assert found["NDCG@3"] == pytest.approx(best["value"], abs=1e-6)


def test_a_run_that_was_begun_with_another_metric_is_refused_and_a_report_tells_it(folder, capfd):
    before, _ = train(folder, "long", "HR@20")
    capfd.readouterr()
    assert train(folder, "long", "NDCG@10", expect=2)[0] == before
    assert "--train.metric" in capfd.readouterr().err
    page = folder / "report.html"
    assert stage("report", {"--runs": folder / "long", "--output": page}) == 0
    assert f"HR@20 {before['value']:.4f} after epoch {before['epoch']}" in page.read_text()
    assert "Validation HR@20" in page.read_text()
