"""A small model and its export with an encoder."""

from pathlib import Path
from typing import Any

import pytest

from recgpt_torchrec.retrieval.exports.reading import open_export
from tests.support import SMALL, SmallAttribute, stage, walks, write_dataset

USERS, ITEMS, INTERESTS = 40, 30, 2
BRAND = SmallAttribute.draw("item", "brand", ITEMS, 5)
COUNTRY = SmallAttribute.draw("user", "country", USERS, 4)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A model with attributes, tuned on prompts, with an output table; its export with the program of all interests."""
    folder = tmp_path_factory.mktemp("encoder")
    histories = walks(USERS, ITEMS, shortest=1, longest=16)
    write_dataset(folder / "data", histories, items=ITEMS, attributes=[BRAND, COUNTRY])
    small = {**SMALL, "--train.epochs": 1, "--batch.tokens": 200}
    assert stage("pretrain", {"--data": folder / "data", "--output": folder / "run", **small}) == 0
    prompts = {"--data": folder / "data", "--checkpoint": folder / "run", "--output": folder / "prompts"}
    assert stage("generate_prompts", {**prompts, "--prompts.k": 1}) == 0
    tuned = {"--data": folder / "prompts", "--checkpoint": folder / "run", "--output": folder / "tuned"}
    assert stage("prompt_tune", {**tuned, "--train.epochs": 1, "--batch.tokens": 200}) == 0
    assert stage("export", options(folder)) == 0
    before = open_export(str(folder / "full")).fingerprint
    assert stage("export", {**options(folder), "--encoder.kind": "auto"}) == 0
    assert open_export(str(folder / "full")).fingerprint == before
    return folder


def options(folder: Path, output: str = "full") -> dict[str, Any]:
    given = {"--data": folder / "prompts", "--checkpoint": folder / "tuned", "--output": folder / output}
    return {**given, "--interests": INTERESTS}
