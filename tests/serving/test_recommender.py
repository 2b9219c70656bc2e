"""Answers to requests of raw keys are those of `export` and `retrieve`, for every kind of model (20 s in all)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.serving.recommender import Recommender
from recgpt_torchrec.serving.requests import History, Shown
from tests.support import SMALL, stage, walks, write_dataset
from tests.test_events import write_log
from tools import feedback_log

TRAIN = {**SMALL, "--loss.candidates": "all", "--train.epochs": 1, "--train.validate_every": 100}
TUNE = {"--loss.candidates": "all", "--batch.tokens": 200, "--train.epochs": 1, "--train.validate_every": 100}
WALKS = walks(40, 30, shortest=1, longest=14)
KINDS = ["pretrained", "tuned", "tuned_drawn", "feedback", "tuned_both", "events"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain histories, a log with feedback, times, places and attributes, one with event types; and models of each."""
    folder = tmp_path_factory.mktemp("serving")

    def run(name: str, **options: Any) -> None:
        assert stage(name, {f"--{key.replace('__', '.')}": value for key, value in options.items()}) == 0

    write_dataset(folder / "plain", WALKS, items=30)
    assert stage("pretrain", {"--data": folder / "plain", "--output": folder / "pretrained", **TRAIN}) == 0
    run("generate_prompts", data=folder / "plain", checkpoint=folder / "pretrained", output=folder / "prompts")
    tuned: dict[str, Any] = {
        "--checkpoint": folder / "pretrained",
        "--data": folder / "prompts",
        "--output": folder / "tuned",
    }
    assert stage("prompt_tune", {**tuned, **TUNE}) == 0
    drawn: dict[str, Any] = {"prompts__temperature": 1.0, "prompts__seed": 3, "output": folder / "drawn"}
    run("generate_prompts", data=folder / "plain", checkpoint=folder / "pretrained", **drawn)
    assert stage("prompt_tune", {**tuned, **TUNE, "--data": folder / "drawn", "--output": folder / "tuned_drawn"}) == 0

    log = folder / "feedback.csv"
    feedback_log.main(["--output", str(log), "--users", "60", "--regions", "2", "--noise", "1"])
    keys = sorted({line.split(",")[1] for line in log.read_text().splitlines()[1:]})
    table = folder / "items.csv"
    table.write_text("item_id,kind,title\n" + "".join(f"{key},k{n % 3},title {n}\n" for n, key in enumerate(keys)))
    clicks = {"click_column": "label", "click_values": "click", "dislike_values": "dislike", "min_count": 1}
    given = {"position_column": "place", "items": table, "item_attributes": "kind,title:text"}
    run("prepare", input=log, output=folder / "clicks", **clicks, **given)
    times = {"--time.use": ["past_gap", "next_gap", "hour", "weekday"]}
    options: dict[str, Any] = {"--data": folder / "clicks", "--output": folder / "feedback"}
    assert stage("pretrain", {**options, **TRAIN, **times, "--model.max_len": 8}) == 0
    both: dict[str, Any] = {"prompts__source": "both", "prompts__k": 3, "output": folder / "shown"}
    run("generate_prompts", data=folder / "clicks", checkpoint=folder / "feedback", **both)
    tuned = {"--checkpoint": folder / "feedback", "--data": folder / "shown", "--output": folder / "tuned_both"}
    assert stage("prompt_tune", {**tuned, **TUNE, "--tuning.places": "true"}) == 0

    write_log(folder / "events.csv", 40)
    run("prepare", input=folder / "events.csv", output=folder / "typed", event_column="event", min_count=1)
    options = {"--data": folder / "typed", "--output": folder / "events", "--events.ask": "true"}
    assert stage("pretrain", {**options, **TRAIN, **{"--time.use": "past_gap"}}) == 0
    return folder


DATA = {"pretrained": "plain", "tuned": "prompts", "feedback": "clicks", "tuned_both": "shown", "events": "typed"}
DATA["tuned_drawn"] = "drawn"
SOURCE = {**DATA, "tuned": "plain", "tuned_drawn": "plain", "tuned_both": "clicks"}
"""Where the histories are without generated prompts."""


def keys_of(data: Path, kind: str) -> list[str]:
    """Raw keys by id."""
    rows = [row for path in sorted((data / f"{kind}s").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [row["key"] for row in sorted(rows, key=lambda row: row[f"{kind}_id"])]


def requests_of(data: Path, event: str | None = None, shown: bool = False) -> Iterator[tuple[int, History]]:
    """Every user of a dataset and his whole history, as its files have it."""
    items, users = keys_of(data, "item"), keys_of(data, "user")
    words, names = [None, *Dataset.open(str(data)).manifest.events], {2: "shown", 3: "disliked", 4: "skipped"}
    for path in sorted((data / "sequences").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            count = len(row["item_ids"])
            columns = ("segment_ids", "timestamps", "event_ids", "places")
            segments, times, events, places = (row.get(name) or [0] * count for name in columns)
            chosen = [n for n in range(count) if segments[n] == 0]
            after: list[list[Any]] = []
            for n in range(count):
                if segments[n] == 0:
                    after.append([])
                elif after:
                    item = items[row["item_ids"][n]]
                    after[-1].append(Shown(item=item, kind=names[segments[n]], time=times[n], place=places[n]))
            yield (
                row["user_id"],
                History(
                    items=[items[row["item_ids"][n]] for n in chosen],
                    user=users[row["user_id"]],
                    times=[times[n] for n in chosen],
                    events=[words[events[n]] for n in chosen],
                    places=[places[n] for n in chosen],
                    shown=after if shown else None,
                    event=event,
                ),
            )


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_lists_are_those_of_export_and_retrieve(folder: Path, kind: str, tmp_path: Path) -> None:
    """For every user by his key, one at a time and in a batch, with one interest and with three."""
    event = "buy" if kind == "events" else None
    given = {"--data": folder / DATA[kind], "--checkpoint": folder / kind, "--output": tmp_path / "vectors"}
    assert stage("export", {**given, "--interests": 3, "--event": event}) == 0
    options = {"--export": tmp_path / "vectors", "--data": folder / DATA[kind], "--k": 10}
    lists: dict[int, dict[int, list[int]]] = {}
    for interests, merge in ((1, "score"), (3, "quota")):
        output = tmp_path / f"lists{interests}"
        assert stage("retrieve", {**options, "--interests": interests, "--merge": merge, "--output": output}) == 0
        table = pq.read_table(output / "lists").to_pylist()
        lists[interests] = {row["user_id"]: row["item_ids"] for row in table}
    expected: dict[int, np.ndarray] = {}
    for batch in open_export(str(tmp_path / "vectors")).users():
        expected |= dict(zip(batch["user_id"].to_pylist(), vectors_of(batch), strict=True))
    recommender = Recommender.load(str(folder / kind), str(folder / DATA[kind]))
    asked = dict(requests_of(folder / SOURCE[kind], event, shown=kind == "tuned_both"))
    assert set(asked) == set(expected) and len(asked) > 30
    requests = list(asked.values())
    vectors = recommender.encode(requests, interests=3)
    assert vectors.dtype == np.float32 and vectors.shape == (len(asked), 3, recommender.dim)
    np.testing.assert_allclose(vectors, np.stack([expected[user] for user in asked]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(recommender.encode(requests[3], interests=2), vectors[3:4, :2], rtol=0, atol=1e-5)
    items = keys_of(folder / DATA[kind], "item")
    for interests in (1, 3):
        answers = recommender.recommend(requests, 10, interests=interests)
        for user, answer in zip(asked, answers, strict=True):
            assert answer.items == [items[item] for item in lists[interests][user]], user
            assert answer.user_known and not answer.unknown and answer.fallback is None


@pytest.mark.parametrize("bias", [-0.05, 30.0])
def test_items_of_a_history_may_compete_with_the_bias_of_the_model(folder: Path, bias: float) -> None:
    """Against a sort of biased scores; what is excluded, or not allowed, stays out."""
    recommender = Recommender.load(str(folder / "pretrained"), str(folder / "plain"))
    recommender.repeat_bias = bias
    keys, vectors = recommender.vectors()
    history, out, allow = WALKS[3], ["item 4", f"item {WALKS[3][0]}"], [f"item {n}" for n in range(0, 30, 2)]
    scores = vectors @ recommender.encode([f"item {item}" for item in history])[0, 0]
    scores[sorted(set(history))] += np.float32(bias)
    order = [keys[int(place)].as_py() for place in np.argsort(-scores, kind="stable")]
    asked: dict[str, Any] = {"k": 6, "seen": "weigh"}
    items = [f"item {item}" for item in history]
    assert recommender.recommend(items, **asked).items == order[:6]
    assert recommender.recommend(items, **asked, exclude=out).items == [key for key in order if key not in out][:6]
    assert recommender.recommend(items, **asked, deny=out).items == [key for key in order if key not in out][:6]
    assert recommender.recommend(items, **asked, allow=allow).items == [key for key in order if key in allow][:6]
    assert not set(recommender.recommend(items, 6).items) & set(items)
    with pytest.raises(InputError, match="seen is 'mask'; give leave_out or weigh"):
        recommender.recommend(items, seen="mask")  # type: ignore[arg-type]


def test_a_stranger_has_the_user_vector_zero(folder: Path) -> None:
    """As the model computes it once his row of the table is 0; and users with rows differ from it."""
    recommender = Recommender.load(str(folder / "pretrained"), str(folder / "plain"))
    items = [f"item {item}" for item in WALKS[3]]
    stranger = recommender.encode(items)
    np.testing.assert_array_equal(recommender.encode(items, users="nobody"), stranger)
    assert np.abs(recommender.encode(items, users="user 3") - stranger).max() > 1e-4
    weights = recommender._encoder.model.tables.embedding_bags["user"].weight.data
    weights[3] = 0
    np.testing.assert_allclose(recommender.encode(items, users="user 3"), stranger, rtol=0, atol=1e-6)
    assert not recommender.recommend(items, users="nobody").user_known


def test_unknown_items_are_skipped_and_counted_and_an_empty_history_gets_popular_items(folder: Path) -> None:
    recommender = Recommender.load(str(folder / "pretrained"), str(folder / "plain"))
    known, mixed, empty, strange = recommender.recommend(
        [["item 1", "item 5"], ["item 1", "new", "item 5"], [], ["new", 12]], 4
    )
    assert mixed.items == known.items and mixed.scores == pytest.approx(known.scores)
    assert known.unknown == [] and mixed.unknown == ["new"] and strange.unknown == ["new", 12]
    counts = np.bincount([item for walk in WALKS for item in walk], minlength=30)
    popular = [f"item {item}" for item in np.argsort(-counts, kind="stable")[:4]]
    for answer in (empty, strange):
        assert answer.items == popular and answer.interests == [-1] * 4
    assert empty.fallback == "popular items: the history is empty"
    assert strange.fallback == "popular items: none of its items is known"
    assert known.fallback is None and not recommender.encode([[]]).any()
    only = recommender.recommend([[]], 2, allow=["item 7", "item 9", "item 11"], exclude=[["item 7"]])
    assert sorted(only[0].items) == ["item 11", "item 9"]


def test_allow_deny_and_exclude_leave_the_order_of_the_others(folder: Path) -> None:
    recommender = Recommender.load(str(folder / "pretrained"), str(folder / "plain"))
    history = ["item 1", "item 5"]
    everything = recommender.recommend(history, 30).items
    assert len(everything) == 28 and not {*history} & {*everything}
    some = everything[::3]
    assert recommender.recommend(history, 30, allow=[*some, "item 1", "none"]).items == some
    rest = [item for item in everything if item not in some]
    assert recommender.recommend(history, 30, deny=[*some, "none"]).items == rest
    assert recommender.recommend(history, 30, exclude=some).items == rest
    assert recommender.recommend([history, history], 30, exclude=[some, []])[1].items == everything
    with pytest.raises(InputError, match="none is an item"):
        recommender.recommend(history, allow=["none"])


def test_similar_items_are_those_at_the_smallest_angle(folder: Path) -> None:
    recommender = Recommender.load(str(folder / "tuned"), str(folder / "prompts"))
    keys, vectors = recommender.vectors()
    assert keys.to_pylist() == [f"item {item}" for item in range(30)] and vectors.shape == (30, recommender.dim)
    cosine = (vectors @ vectors[4]) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[4])
    found = recommender.similar("item 4", 5)
    assert found.items == [f"item {item}" for item in np.argsort(-cosine) if item != 4][:5]
    np.testing.assert_allclose(found.scores, np.sort(cosine)[::-1][1:6], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"histories": "item 1"}, "give a list of keys"),
        ({"histories": ["item 1"], "k": 0}, "k is 0"),
        ({"histories": ["item 1"], "interests": 33}, "interests is 33"),
        ({"histories": ["item 1"], "shown": [["item 2"]]}, "reads no items that were shown"),
        ({"histories": ["item 1"], "shown": ["item 2"]}, "give a list for each item"),
        ({"histories": ["item 1"], "time": 5}, "reads no times"),
        ({"histories": ["item 1"], "event": "buy"}, "not told which event type"),
        ({"histories": [["item 1"], ["item 2"]], "users": ["a"]}, "there are 2 histories, and user has 1"),
        ({"histories": [["item 1"], ["item 2"]], "users": "a"}, "there are 2 histories"),
        ({"histories": [None]}, "the key None is a NoneType"),
        ({"histories": ["item 1"], "merge": "two_step", "interests": 6}, "two_step merges 2"),
    ],
)
def test_what_is_asked_wrongly_is_refused(folder: Path, arguments: dict[str, Any], message: str) -> None:
    recommender = Recommender.load(str(folder / "pretrained"), str(folder / "plain"))
    with pytest.raises(InputError, match=message):
        recommender.recommend(**arguments)


def test_what_a_model_reads_must_be_given(folder: Path) -> None:
    """Times, event types and kinds of feedback that the model of a request reads, or cannot read."""
    timed = Recommender.load(str(folder / "feedback"))
    key = keys_of(folder / "clicks", "item")[0]
    with pytest.raises(InputError, match="reads times"):
        timed.recommend([key])
    early, late = (timed.encode([key], times=[0], time=time) for time in ("2001-01-01", "2021-01-01T12:00"))
    assert np.abs(early - late).max() > 0
    with pytest.raises(InputError, match="fall from 5 to 3"):
        timed.recommend([key, key], times=[5, 3])
    typed = Recommender.load(str(folder / "events"))
    with pytest.raises(InputError, match="reads event types"):
        typed.recommend(["v1"], times=[0])
    with pytest.raises(InputError, match="no such event type"):
        typed.recommend(["v1"], times=[0], events=["eat"])
    with pytest.raises(InputError, match="has no prompts"):
        Recommender.load(str(folder / "tuned"), str(folder / "plain"))
    with pytest.raises(InputError, match="another checkpoint than"):
        Recommender.load(str(folder / "tuned"), str(folder / "prompts"), pretrained=str(folder / "tuned"))
