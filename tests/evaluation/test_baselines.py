"""The baselines against plain loops, and what item ids may not tell."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec.config import Prepare
from recgpt_torchrec.data.dataset import Dataset, Manifest
from recgpt_torchrec.data.ragged import Ragged
from recgpt_torchrec.data.split import cut
from recgpt_torchrec.evaluation import baselines
from recgpt_torchrec.evaluation.baselines import Cooccurrence, Popularity
from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks
from recgpt_torchrec.evaluation.sampling import choose_users
from recgpt_torchrec.preparation.pipeline import prepare
from tests.support import training_part, walks, write_dataset


def plain_cooccurrence(training: list[list[int]], history: list[int], items: int, window: int) -> list[float]:
    """The formula of the class docstring, pair by pair."""
    count = [max(1, sum(h.count(i) for h in training)) for i in range(items)]
    weight = np.zeros((items, items))
    for h in training:
        for p, i in enumerate(h):
            for q, j in enumerate(h):
                if i != j and p != q and abs(p - q) <= window:
                    weight[i, j] += abs(p - q) ** -0.5 * (1 if q > p else 0.25)
    scores = np.zeros(items)
    for age, i in enumerate(reversed(history)):
        for j in range(items):
            scores[j] += 0.7**age * weight[i, j] * count[i] ** -0.5 * count[j] ** -0.15
    return scores.tolist()


@pytest.mark.parametrize("window", [1, 3, 20])
def test_cooccurrence_agrees_with_a_loop_over_pairs_however_users_are_split_into_batches(window, monkeypatch):
    monkeypatch.setattr(Cooccurrence, "WINDOW", window)
    training = [*walks(users=12, items=9, seed=1), [4], [], [2, 2, 2]]
    histories = [*walks(users=5, items=9, seed=2, shortest=1), []]
    baseline = Cooccurrence(9)
    for first in range(0, len(training), 4):
        baseline.add(Ragged.from_lists(training[first : first + 4]))
    scores = baseline.scores(Ragged.from_lists(histories))
    assert scores.shape == (6, 9) and scores.dtype == torch.float32
    expected = [plain_cooccurrence(training, history, 9, window) for history in histories]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_cooccurrence_forgets_what_is_older_than_its_memory(monkeypatch):
    monkeypatch.setattr(Cooccurrence, "MEMORY", 1)
    baseline = Cooccurrence(4)
    baseline.add(Ragged.from_lists([[0, 1], [2, 3]]))
    assert torch.equal(baseline.scores(Ragged.from_lists([[0, 2]])), baseline.scores(Ragged.from_lists([[2]])))


def test_cooccurrence_keeps_memory_linear_in_the_length_of_a_history():
    baseline = Cooccurrence(3000)
    baseline.add(Ragged.from_lists([list(range(3000))]))
    assert baseline.weights.nnz <= 2 * Cooccurrence.WINDOW * 3000


def test_popularity_scores_by_training_count_the_same_for_everyone():
    baseline = Popularity(3)
    baseline.add(Ragged.from_lists([[0, 2, 2], [2]]))
    assert baseline.scores(Ragged.from_lists([[0], []])).tolist() == [[1.0, 0.0, 3.0]] * 2


def test_fit_sees_training_items_only(tmp_path):
    histories = [[0, 1, 2, 3], [4, 5], [6]]
    fitted = baselines.fit_baselines(write_dataset(tmp_path / "data", histories))
    assert isinstance(fitted["popularity"], Popularity)
    assert fitted["popularity"].counts.tolist() == [1, 1, 0, 0, 1, 1, 1]
    assert sum(len(training_part(h)) for h in histories) == 5


def test_generated_items_of_a_prompt_dataset_are_neither_learned_from_nor_held_out(tmp_path):
    plain = write_dataset(tmp_path / "plain", [[0, 1, 2, 3], [3, 2, 1, 0]], items=6)
    prompts = write_dataset(
        tmp_path / "prompts",
        [[0, 5, 1, 2, 4, 3], [3, 2, 1, 5, 0, 5]],
        items=6,
        segments=[[0, 1, 0, 0, 1, 0], [0, 0, 0, 2, 0, 1]],
    )
    for name, protocols in baselines.evaluate_baselines(prompts, "test").items():
        for how, metrics in protocols.items():
            assert metrics.result() == baselines.evaluate_baselines(plain, "test")[name][how].result()


def test_processes_together_count_every_user_once(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=20, rows_per_group=7)
    alone = baselines.evaluate_baselines(dataset, "validation")
    shares = [baselines.evaluate_baselines(dataset, "validation", rank=rank, world_size=3) for rank in range(3)]
    for name in alone:
        merged = shares[0][name]["masked"]
        for share in shares[1:]:
            merged.state().add_(share[name]["masked"].state())  # as an all-reduce does
        assert merged.users == alone[name]["masked"].users == 60
        assert merged.result() == pytest.approx(alone[name]["masked"].result())


def test_cooccurrence_finds_the_structure_that_popularity_cannot(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(users=300, items=60), items=60, rows_per_group=50)
    results = baselines.evaluate_baselines(dataset, "test")
    assert results["cooccurrence"]["masked"].result()["HR@5"] > 0.6
    assert results["popularity"]["masked"].result()["HR@5"] < 0.3


def test_no_metric_changes_under_a_permutation_of_item_ids(tmp_path):
    histories = walks(users=200, items=50)
    new_id = np.random.default_rng(3).permutation(50)
    before = write_dataset(tmp_path / "before", histories, items=50)
    after = write_dataset(tmp_path / "after", [new_id[h].tolist() for h in histories], items=50)
    for split_name in ("validation", "test"):
        first, second = (baselines.evaluate_baselines(dataset, split_name) for dataset in (before, after))
        for name, protocols in first.items():
            for how, metrics in protocols.items():
                assert second[name][how].result() == pytest.approx(metrics.result(), abs=1e-12), (split_name, name, how)


def test_a_baseline_beyond_its_bytes_is_left_out_with_a_line(monkeypatch, capfd):
    monkeypatch.setattr(baselines, "available_bytes", lambda device: 2**40)
    small = Manifest(users=10**6, items=10**6, interactions=30 * 10**6)
    assert baselines.choose_baselines(small) == ["popularity", "cooccurrence"]
    large = Manifest(users=10**9, items=10**8, interactions=10**10)
    assert baselines.choose_baselines(large) == ["popularity"]
    (line,) = capfd.readouterr().out.splitlines()
    assert "Baseline cooccurrence is left out: it may need 4,481.5 GiB" in line and "limit is 16.0 GiB" in line
    assert "100,000,000 items, 10,000,000,000 interactions with up to 20 pairs each" in line
    assert baselines.choose_baselines(Manifest(users=1, items=2 * 10**9, interactions=1)) == []


def test_estimates_follow_the_items_and_the_longest_history():
    few = Manifest(users=9, items=10, interactions=10**6, preparation={"lengths": {"max": 4}})
    assert baselines.estimate_bytes(few)["cooccurrence"][0] == 10 * 120 + 100 * 24  # no more pairs than items squared
    short = Manifest(users=9, items=10**6, interactions=1000, preparation={"lengths": {"max": 4}})
    assert baselines.estimate_bytes(short)["cooccurrence"][0] == 10**6 * 120 + 3 * 1000 * 24


def test_a_baseline_that_memory_does_not_suffice_for_is_left_out(monkeypatch, capfd):
    monkeypatch.setattr(baselines, "available_bytes", lambda device: 2**20)
    both = ["popularity", "cooccurrence"]
    assert baselines.choose_baselines(Manifest(users=9, items=100, interactions=10**5)) == both
    assert baselines.choose_baselines(Manifest(users=9, items=10**4, interactions=10**5)) == ["popularity"]
    # Of 144 items 24 and 120 bytes each, and 24 per pair, are below half of 2**20 bytes; of 145 they are not.
    assert baselines.choose_baselines(Manifest(users=9, items=144, interactions=10**5)) == both
    assert baselines.choose_baselines(Manifest(users=9, items=145, interactions=10**5)) == ["popularity"]
    assert "a rank can spare 0.0 GiB" in capfd.readouterr().out


def test_popularity_alone_is_the_same(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=23, rows_per_group=7)
    both = baselines.evaluate_baselines(dataset, "test")["popularity"]
    alone = baselines.evaluate_baselines(dataset, "test", names=["popularity"])
    assert list(alone) == ["popularity"] and alone["popularity"]["masked"].result() == both["masked"].result()
    assert baselines.evaluate_baselines(dataset, "test", names=[]) == {}


def test_a_sample_of_users_is_ranked(tmp_path):
    dataset = write_dataset(tmp_path / "data", walks(users=60, items=20), items=20, rows_per_group=7)
    sample = choose_users(dataset, "test", 25, seed=1)
    results = [
        baselines.evaluate_baselines(dataset, "test", sample=sample, rank=rank, world_size=2)["cooccurrence"]["masked"]
        for rank in range(2)
    ]
    assert sum(metrics.users for metrics in results) == 25 and all(metrics.users for metrics in results)


def next_ids_ndcg(histories: list[list[int]]) -> float:
    """NDCG@10 of answering `max(history) + 1` to `+ 10`, which knows nothing but how ids were given."""
    items = Ragged.from_lists(histories)
    held = cut(items.offsets, "test")
    assert held.target is not None
    known = items.cut(held.start, held.stop)
    largest = np.maximum.reduceat(known.values, known.offsets[:-1])
    metrics = RankingMetrics(ks=(10,))
    answer = torch.from_numpy(largest[:, None] + np.arange(1, 11))
    metrics.update(list_ranks(answer, torch.from_numpy(items.values[held.target])))
    return metrics.result()["NDCG@10"]


def prepared(log: Path, output: Path, min_count: int) -> list[list[int]]:
    prepare(Prepare(input=[str(log)], input_format="sequences", output=str(output), min_count=min_count))
    parts = Dataset.open(str(output)).manifest.sequences
    return [ids for part in parts for ids in pq.read_table(output / part.path)["item_ids"].to_pylist()]


def test_ids_by_first_appearance_give_the_target_away_and_those_of_prepare_do_not(tmp_path):
    rng = np.random.default_rng(0)
    seen: dict[int, int] = {}
    drawn = [rng.choice(2000, size=8, replace=False).tolist() for _ in range(300)]
    histories = [[seen.setdefault(item, len(seen)) for item in items] for items in drawn]
    log = tmp_path / "log.txt"
    log.write_text("".join(f"{u} {' '.join(map(str, items))}\n" for u, items in enumerate(histories)))
    assert next_ids_ndcg(histories) > 0.2
    assert next_ids_ndcg(prepared(log, tmp_path / "data", min_count=1)) < 0.02


def test_beauty_leak_is_gone_and_cooccurrence_reaches_the_published_knn(shared_data, tmp_path):
    log = shared_data / "Beauty.txt"
    raw = [[int(item) for item in line.split()[1:]] for line in log.read_text().splitlines()]
    assert next_ids_ndcg(raw) > 0.04
    assert next_ids_ndcg(prepared(log, tmp_path / "data", min_count=5)) < 0.002
    results = baselines.evaluate_baselines(Dataset.open(str(tmp_path / "data")), "test")
    masked = results["cooccurrence"]["masked"].result()
    assert masked == pytest.approx({"HR@5": 0.0651, "NDCG@5": 0.0475, "HR@10": 0.0867, "NDCG@10": 0.0544}, abs=2e-4)
    assert results["cooccurrence"]["masked"].users == 22363
    assert results["popularity"]["masked"].result()["NDCG@10"] < 0.01
