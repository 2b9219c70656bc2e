"""The example service of docs/serving.md: its answers are those of the export, and what it refuses."""

import importlib.util
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.merging import Lists, merge_rule
from tests.serving.conftest import INTERESTS, ITEMS, options
from tests.serving.test_encoder import exported_histories
from tests.support import stage

Ask = Callable[..., tuple[int, dict[str, Any]]]
KINDS = ["clicked", "generated", "shown"]


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[2] / "docs" / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def service(example, folder) -> Iterator[Any]:
    limits = example.Limits(body=20_000, batch=50, length=60, k=20, seconds=0.5)
    service = example.Service(("127.0.0.1", 0), example.Recommender(str(folder / "full"), limits))
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield service
    service.shutdown()
    service.server_close()


@pytest.fixture
def ask(service) -> Ask:
    def send(path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", service.server_address[1], timeout=30)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        return answer.status, content

    return send


def requests(folder: Path, rows: int) -> tuple[dict[str, Any], np.ndarray]:
    """Histories of the dataset as a request, and the vectors that the stage made of them."""
    arguments, expected = exported_histories(folder)
    histories = []
    for row in range(rows):
        end = arguments["lengths"][row]
        entries = zip(arguments["items"][row, :end], arguments["segments"][row, :end], strict=True)
        histories.append([{"item": f"item {item}", "kind": KINDS[segment]} for item, segment in entries])
    return {"histories": histories, "users": [f"user {user}" for user in arguments["users"][:rows]]}, expected[:rows]


def expected_list(folder: Path, vectors: np.ndarray, history: list[dict[str, str]], k: int) -> list[str]:
    """Keys of a two-step list, from all scores."""
    _, items = open_export(str(folder / "full")).item_vectors()
    seen = {int(entry["item"].split()[1]) for entry in history if entry["kind"] == "clicked"}
    scores = torch.from_numpy(vectors[:2] @ items.T)
    scores[:, list(seen)] = -torch.inf
    best = scores.sort(dim=1, descending=True, stable=True)
    found = torch.where(best.values.isfinite(), best.indices, -1)[:, :k]
    merged = merge_rule("two_step").merge(Lists(found[None], best.values[None, :, :k]), k)
    return [f"item {item}" for item in merged.items[0].tolist() if item >= 0]


def test_it_answers_the_vectors_of_the_stage_and_the_best_new_items(folder, ask):
    request, expected = requests(folder, 30)
    status, content = ask("/encode", request)
    assert status == 200 and content["unknown"] == [0] * 30
    np.testing.assert_allclose(np.array(content["vectors"]), expected, atol=1e-5)
    some = {name: values[:5] for name, values in request.items()}
    status, content = ask("/recommend", {**some, "k": 7})
    assert status == 200
    for history, vectors, answer in zip(some["histories"], expected, content["lists"], strict=False):
        assert [each["item"] for each in answer] == expected_list(folder, vectors, history, 7)


def test_with_the_step_program_and_an_index_answers_are_the_same(folder, example, tmp_path):
    shutil.copytree(folder / "full", tmp_path / "step")
    more = {"--encoder.kind": "step", "--index.kind": "flat", "--index.shards": 2, "--index.sample": 0}
    assert stage("export", {**options(folder), "--output": tmp_path / "step", **more}) == 0
    request, expected = requests(folder, 6)
    step = example.Recommender(str(tmp_path / "step"), example.Limits())
    assert step.shards and step.encoder.manifest.kind == "step"
    np.testing.assert_allclose(np.array(step.answer_vectors(request)["vectors"]), expected, atol=1e-5)
    full = example.Recommender(str(folder / "full"), example.Limits())
    lists = [each.answer_lists({**request, "k": 9})["lists"] for each in (full, step)]
    assert [[e["item"] for e in one] for one in lists[0]] == [[e["item"] for e in one] for one in lists[1]]


def test_unknown_items_are_skipped_and_counted_and_unknown_users_have_no_vector(ask):
    known = ["item 1", "item 2"]
    status, content = ask("/encode", {"histories": [["what", *known], known, ["what"], []], "users": ["who"] * 4})
    assert status == 200 and content["unknown"] == [1, 0, 1, 0]
    np.testing.assert_allclose(content["vectors"][0], content["vectors"][1], atol=1e-5)
    assert content["vectors"][2:] == [[], []]
    assert len(content["vectors"][0]) == INTERESTS
    status, content = ask("/recommend", {"histories": [["what"], known], "k": 3})
    assert status == 200 and [len(each) for each in content["lists"]] == [0, 3]
    assert ask("/health", method="GET") == (
        200,
        {"status": "ok", "items": ITEMS, "interests": INTERESTS, "encoder": "full"}
        | {"reads": ["items", "lengths", "segments", "users"]},
    )


ONE = [["item 1"]]
REFUSED: dict[str, tuple[int, Any, str]] = {
    "not JSON": (400, b"{", "not JSON"),
    "not UTF-8": (400, b"\xff\xff", "not JSON"),
    "nested": (400, b"[" * 15_000, "not JSON"),
    "a list": (400, [], "JSON object"),
    "no histories": (400, {}, "histories"),
    "unknown field": (400, {"histories": ONE, "item": 1}, "unknown field"),
    "too many": (400, {"histories": ONE * 51}, "more than 50"),
    "too long": (400, {"histories": [["item 1"] * 61]}, "61 entries, more than 60"),
    "numbers": (400, {"histories": [[1]]}, "no item"),
    "a word": (400, {"histories": ["item 1"]}, "not a list"),
    "other users": (400, {"histories": ONE, "users": []}, "as many users"),
    "user 1": (400, {"histories": ONE, "users": [1]}, "text"),
    "k 0": (400, {"histories": ONE, "k": 0}, "k is 0; it must be 1 to 20"),
    "k 21": (400, {"histories": ONE, "k": 21}, "k is 21"),
    "k true": (400, {"histories": ONE, "k": True}, "whole number"),
    "k NaN": (400, b'{"histories": [["item 1"]], "k": NaN}', "whole number"),
    "merge": (400, {"histories": ONE, "merge": "best"}, "two_step"),
    "kind": (400, {"histories": [[{"item": "item 1", "kind": "seen"}]]}, "kind is one of"),
    "not read": (400, {"histories": [[{"item": "item 1", "kind": "skipped"}]]}, "does not read"),
    "entry field": (400, {"histories": [[{"item": "item 1", "price": 1}]]}, "unknown field"),
    "large time": (400, {"histories": [[{"item": "item 1", "time": 2**64}]]}, "whole number"),
    "large body": (413, b" " * 20_001, "more than 20000"),
}


def test_what_it_refuses_names_the_mistake(ask):
    for case, (expected, body, message) in REFUSED.items():
        status, content = ask("/recommend", body)
        assert (status, message in content["error"]) == (expected, True), (case, status, content)
    assert ask("/items", {})[0] == 404
    assert ask("/recommend", None, **{"Content-Length": "-1"})[0] == 400
    assert ask("/recommend", {"histories": ONE, "k": 1})[0] == 200


def test_more_requests_at_once_than_allowed_and_silent_clients_are_turned_away(service, ask):
    taken = 0
    while service.places.acquire(blocking=False):
        taken += 1
    try:
        assert taken == 8 and ask("/recommend", {"histories": ONE})[0] == 503
    finally:
        for _ in range(taken):
            service.places.release()
    with socket.create_connection(service.server_address, timeout=30) as silent:
        assert silent.recv(1) == b""  # closed by the service
