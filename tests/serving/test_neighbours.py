"""Requests with neighbours raised: lists of `retrieve --neighbours.path` and of plain loops (20 s in all)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import recgpt_torchrec as rg
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.neighbours.folder import open_neighbours
from recgpt_torchrec.serving.recommender import Recommender
from tests.support import SMALL, stage, walks, write_dataset
from tests.test_recall_neighbours import MEMORY, RAISING, RECENCY, WEIGHT, raised_by_hand

USERS, ITEMS, K = 40, 30, 8
WALKS = walks(USERS, ITEMS, shortest=1, longest=16)
TRAIN = {"--loss.candidates": "all", "--batch.tokens": 200, "--train.epochs": 1, "--train.validate_every": 100}
DATA = {"pretrained": "data", "tuned": "prompts"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, its neighbours, a model and one that is tuned on prompts."""
    made = tmp_path_factory.mktemp("serving_neighbours")
    data: dict[str, Any] = {"--data": made / "data"}
    write_dataset(made / "data", WALKS, items=ITEMS)
    assert stage("find_neighbours", {**data, "--output": made / "near", "--count": 6}) == 0
    assert stage("pretrain", {**data, "--output": made / "pretrained", **SMALL, **TRAIN}) == 0
    model = {"--checkpoint": made / "pretrained"}
    assert stage("generate_prompts", {**data, **model, "--output": made / "prompts"}) == 0
    assert stage("prompt_tune", {"--data": made / "prompts", **model, "--output": made / "tuned", **TRAIN}) == 0
    return made


def load(made: Path, kind: str = "pretrained") -> Recommender:
    options = rg.RecallNeighbours(path=str(made / "near"), weight=WEIGHT, memory=MEMORY, recency=RECENCY)
    return Recommender.load(made / kind, made / DATA[kind], neighbours=options)


def keys_of(items: list[int]) -> list[str]:
    return [f"item {item}" for item in items]


def order_by_hand(made: Path, vector: np.ndarray, vectors: np.ndarray, history: list[int]) -> list[str]:
    """All items that a history lacks, best first by the raised scores."""
    scores = (vectors @ vector).astype(np.float64)
    for item, value in raised_by_hand(made, history).items():
        scores[item] += value
    return keys_of([item for item in np.argsort(-scores, kind="stable").tolist() if item not in history])


@pytest.mark.parametrize("kind", DATA)
def test_lists_of_every_user_are_those_of_retrieve(made: Path, tmp_path: Path, kind: str) -> None:
    """With one interest and with three, with items of the history left out and weighed, and of allowed items."""
    data, near = made / DATA[kind], made / "near"
    given: dict[str, Any] = {"--data": data, "--checkpoint": made / kind, "--output": tmp_path / "vectors"}
    assert stage("export", {**given, "--interests": 3}) == 0
    given = {"--export": tmp_path / "vectors", "--data": data, "--index": "exact", "--neighbours.path": near, **RAISING}
    allow = keys_of([item for item in range(ITEMS) if item % 3])
    (tmp_path / "allow.txt").write_text("\n".join(allow))
    recommender, plain = load(made, kind), Recommender.load(made / kind, data)
    histories, users = [keys_of(walk) for walk in WALKS], [f"user {user}" for user in range(USERS)]
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"interests": 1, "merge": "score"}, {}),
        ({"interests": 3, "merge": "quota"}, {}),
        ({"interests": 1, "merge": "score", "seen": "weigh"}, {}),
        ({"interests": 3, "merge": "quota"}, {"allow": allow}),
    ]
    for number, (options, only) in enumerate(asked):
        words = {f"--{name}": value for name, value in options.items()} | {"--k": K, "--output": tmp_path / f"{number}"}
        assert stage("retrieve", {**given, **words, "--allow": tmp_path / "allow.txt" if only else None}) == 0
        rows = pq.read_table(tmp_path / f"{number}/lists").to_pylist()
        lists = {row["user_id"]: keys_of(row["item_ids"]) for row in rows}
        answers = recommender.recommend(histories, K, users=users, **options, **only)
        assert {user: answer.items for user, answer in enumerate(answers)} == lists and len(lists) == USERS
        one = recommender.recommend(histories[3], K, users=users[3], **options, **only)
        assert one.items == lists[3]
        others = plain.recommend(histories, K, users=users, **options, **only)
        assert sum(a.items != b.items for a, b in zip(answers, others, strict=True)) > USERS / 2


def test_what_is_excluded_denied_or_not_allowed_stays_out_and_raises_nothing(made: Path) -> None:
    """Against plain loops, of strangers, with items in the histories that the dataset does not know."""
    recommender = load(made)
    histories = [["new", *keys_of(walk), 12] for walk in WALKS]
    vectors, encoded = recommender.vectors()[1], recommender.encode(histories)[:, 0]
    orders = [order_by_hand(made, vector, vectors, walk) for vector, walk in zip(encoded, WALKS, strict=True)]
    denied, allow = keys_of([4, 9]), keys_of(list(range(0, ITEMS, 2)))
    best = [order[:3] for order in orders]  # neighbours raise most of them
    raised = [keys_of(list(raised_by_hand(made, walk))) for walk in WALKS]
    assert np.mean([len({*first} & {*own}) for first, own in zip(best, raised, strict=True)]) > 1

    def check(leave: Any, **asked: Any) -> None:
        answers = recommender.recommend(histories, K, users=["nobody"] * USERS, **asked)
        for user, (answer, order) in enumerate(zip(answers, orders, strict=True)):
            assert answer.items == [key for key in order if leave(user, key)][:K], user
            assert not answer.user_known and answer.unknown == ["new", 12] and answer.fallback is None

    check(lambda user, key: True)
    check(lambda user, key: key not in best[user], exclude=best)
    check(lambda user, key: key not in denied, deny=denied)
    check(lambda user, key: key in allow, allow=allow)
    check(
        lambda user, key: key in allow and key not in best[user] and key not in denied,
        exclude=best,
        deny=denied,
        allow=allow,
    )
    weighed = recommender.recommend(histories, ITEMS, seen="weigh", exclude=best, deny=denied)
    for answer, out in zip(weighed, best, strict=True):
        assert {*answer.items} == {*keys_of(list(range(ITEMS)))} - {*out, *denied}


def test_popular_and_similar_items_stay_as_they_are(made: Path) -> None:
    with_them, plain = load(made), Recommender.load(made / "pretrained", made / "data")
    asked: list[list[Any]] = [[], ["new", 12]]
    assert with_them.recommend(asked, K) == plain.recommend(asked, K)
    assert with_them.similar("item 4", K) == plain.similar("item 4", K)
    none = Recommender.load(made / "pretrained", made / "data", neighbours=rg.RecallNeighbours())
    assert none.recommend(["item 4"], K) == plain.recommend(["item 4"], K)
    default = Recommender.load(made / "pretrained", made / "data", neighbours=made / "near").recommend(["item 4"], K)
    options = rg.RecallNeighbours(path=str(made / "near"))
    same = Recommender.load(made / "pretrained", made / "data", neighbours=options).recommend(["item 4"], K)
    assert default == same != plain.recommend(["item 4"], K)


def test_the_command_lists_the_same(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"--checkpoint": made / "pretrained", "--data": made / "data", "--k": K}
    given |= {"--neighbours.path": made / "near", **RAISING}
    recommender, history = load(made), keys_of(WALKS[3])
    assert stage("recommend", {**given, "--history": ",".join(history), "--exclude": "item 4", "--json": "true"}) == 0
    said = json.loads(capsys.readouterr().out)
    answer = recommender.recommend(history, K, exclude=["item 4"])
    assert said["items"] == answer.items and said["scores"] == pytest.approx(answer.scores)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"items": keys_of(walk)}) + "\n" for walk in WALKS))
    assert stage("recommend", {**given, "--input": tmp_path / "in.jsonl", "--output": tmp_path / "out.jsonl"}) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = recommender.recommend([keys_of(walk) for walk in WALKS], K)
    assert [line["items"] for line in lines] == [answer.items for answer in answers]
    capsys.readouterr()
    assert stage("recommend", {**given, "--history": "item 4", "--neighbours.memory": 21}) == 2
    assert "--neighbours.memory" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["other", "damaged", "missing"])
def test_neighbours_that_are_not_the_datasets_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    path, data = tmp_path / wrong, made / "data"
    if wrong == "other":
        write_dataset(tmp_path / "data", walks(20, 12), items=12)
        assert stage("find_neighbours", {"--data": tmp_path / "data", "--output": path}) == 0
    elif wrong == "damaged":
        assert stage("find_neighbours", {"--data": data, "--output": path, "--count": 6}) == 0
        next((path / "neighbours").glob("*.parquet")).unlink()
    with pytest.raises(rg.InputError) as expected:
        open_neighbours(str(path), Dataset.open(str(data)))
    with pytest.raises(rg.InputError) as found:
        Recommender.load(made / "pretrained", data, neighbours=path)
    assert str(found.value) == str(expected.value) and str(path) in str(found.value)
    capsys.readouterr()
    given = {"--checkpoint": made / "pretrained", "--data": data, "--history": "item 4", "--neighbours.path": path}
    assert stage("recommend", given) == 2
    told = capsys.readouterr()
    assert str(path) in told.err and "Traceback" not in told.err and not told.out
