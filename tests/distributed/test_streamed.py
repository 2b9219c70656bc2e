"""Stages whose item vectors do not fit memory look them up in each pass: two such ranks write what one rank writes."""

import json
import os
import socket
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from recgpt_torchrec.catalogue import catalogue as catalogue_module
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from tests.support import SMALL, read_sequences, stage, walks, write_dataset
from tools.ranks import run_ranks

USERS, ITEMS = 40, 30
STAGES = ("evaluate", "generate_prompts", "export")


def options_of(folder: Path, name: str, output: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"--data": folder / "data", "--checkpoint": folder / "run"}
    if name == "evaluate":
        return options | {"--output": output / "test.json", "--recall.interests": 3, "--batch.tokens": 60}
    if name == "export":
        return options | {"--output": output / "export", "--interests": 3, "--batch.tokens": 60}
    return options | {"--output": output / "prompts", "--batch_users": 7, "--prompts.answers": 12}


def on_rank(rank: int, world_size: int, ports: list[int], folder: str, output: str) -> list[int]:
    dist.destroy_process_group()  # each stage joins its own
    ends = []
    for name, port in zip(STAGES, ports, strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with (
            mock.patch.object(catalogue_module, "available_bytes", lambda device: 0),
            mock.patch.object(catalogue_module, "BLOCK_BYTES", 4 * 8 * 4),
            mock.patch.object(catalogue_module, "PASS_BYTES", 2000),
        ):
            ends.append(stage(name, options_of(Path(folder), name, Path(output))))
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    write_dataset(folder / "data", walks(USERS, ITEMS, shortest=3, longest=12), items=ITEMS, rows_per_group=6)
    training = {**SMALL, "--model.max_len": 8, "--train.epochs": 1, "--optimizer.warmup_steps": 2}
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **training}) == 0
    return folder


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def read_vectors(path: Path) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    export = open_export(str(path))
    users = {
        user: vectors
        for batch in export.users()
        for user, vectors in zip(batch["user_id"].to_pylist(), vectors_of(batch), strict=True)
    }
    return export.item_vectors()[1], users


def test_two_ranks_that_look_vectors_up_anew_write_what_one_writes_that_holds_them(folder, tmp_path):
    alone, streamed = tmp_path / "alone", tmp_path / "streamed"
    for path in (alone, streamed):
        path.mkdir()
    for name in STAGES:
        assert stage(name, options_of(folder, name, alone)) == 0
    arguments = free_ports(len(STAGES)), str(folder), str(streamed)
    assert run_ranks(on_rank, 2, *arguments, timeout=240) == [[0] * len(STAGES)] * 2
    results = [json.loads((path / "test.json").read_text())["results"] for path in (alone, streamed)]
    assert results[0].keys() == results[1].keys() and "pretrain_interests_3_score" in results[0]
    for name, protocols in results[0].items():
        for protocol, figures in protocols.items():
            assert results[1][name][protocol] == pytest.approx(figures), (name, protocol)
    expected, found = (read_sequences(path / "prompts") for path in (alone, streamed))
    scores = [np.concatenate([np.array(row) for row in each.pop("answer_scores")]) for each in (expected, found)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-5)
    assert found == expected
    (items, users), (other_items, other_users) = (read_vectors(path / "export") for path in (alone, streamed))
    assert np.array_equal(items, other_items) and users.keys() == other_users.keys()
    for user, own in users.items():
        np.testing.assert_allclose(other_users[user], own, rtol=1e-4, atol=1e-5)
