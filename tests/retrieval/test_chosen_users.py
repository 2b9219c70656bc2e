"""`--users FILE`: only these users' lists are made, as among all; and all options together on several ranks."""

import contextlib
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec import retrieve as stage_retrieve
from recgpt_torchrec.config import Retrieve
from recgpt_torchrec.distributed import processes
from recgpt_torchrec.preparation.engines import engine
from recgpt_torchrec.preparation.key_files import KeyFile
from recgpt_torchrec.retrieval import chosen_users
from recgpt_torchrec.retrieval.list_folder import open_lists
from tests.retrieval.filter_helpers import ITEMS, USERS, WALKS, make_export, plain_list, retrieve
from tools.ranks import run_ranks

ABSENT = [3, 4, USERS - 1]
CHOSEN = [0, 3, 5, 17, 22, USERS - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset, an export without some of its users, and files of keys."""
    path = tmp_path_factory.mktemp("chosen")
    make_export(path, absent=ABSENT)
    (path / "users.txt").write_text("".join(f"user {user}\n" for user in [*CHOSEN, 5, 5]) + "nobody\nno one\n")
    pq.write_table(pa.table({"who": [f"user {user}" for user in CHOSEN]}), path / "users.parquet")
    (path / "deny.txt").write_text("".join(f"item {item}\n" for item in range(0, ITEMS, 3)))
    return path


def test_only_the_lists_of_the_chosen_users_are_made(folder, tmp_path, capfd):
    everyone = retrieve(folder, tmp_path / "all", data=folder / "data")
    found = retrieve(folder, tmp_path / "lists", data=folder / "data", users=folder / "users.txt")
    assert found == {user: everyone[user] for user in CHOSEN if user not in ABSENT}
    assert found == {user: plain_list(user, 5, range(ITEMS), WALKS[user]) for user in found}
    said = capfd.readouterr().out
    assert "users.txt: 4 users chosen; keys unknown to the export: 4 (such as 'no one')" in said
    filled = retrieve(folder, tmp_path / "filled", data=folder / "data", users=folder / "users.txt", fallback="popular")
    assert filled.keys() == set(CHOSEN) and {user: filled[user] for user in found} == found
    assert open_lists(str(tmp_path / "filled")).popular == 2
    assert "users.txt: 6 users chosen; keys unknown to the export: 2" in capfd.readouterr().out
    options: dict[str, Any] = {"users": folder / "users.parquet", "user_column": "who", "index": "hnsw"}
    assert retrieve(folder, tmp_path / "table", data=folder / "data", **options).keys() == found.keys()
    retrieve(folder, tmp_path / "table", data=folder / "data", **options)
    assert "Already there" in capfd.readouterr().out
    retrieve(folder, tmp_path / "table", 2, data=folder / "data", **options | {"users": folder / "deny.txt"})
    assert "content of --users" in capfd.readouterr().err


def one_rank(rank: int, world_size: int, folder: str, output: str) -> None:
    alone: Any = lambda *_, **__: contextlib.nullcontext(torch.device("cpu"))  # noqa: E731
    processes.process_group = alone  # the ranks are in a group already
    options: dict[str, Any] = {"export": f"{folder}/vectors", "data": f"{folder}/data", "fallback": "popular", "k": 5}
    options |= {"deny": f"{folder}/deny.txt", "users": f"{folder}/users.txt"}
    stage_retrieve.main(Retrieve(output=f"{output}/exact", **options))
    stage_retrieve.main(Retrieve(output=f"{output}/hnsw", index="hnsw", **options))


def test_three_ranks_write_what_one_writes(folder, tmp_path):
    options = {"data": folder / "data", "deny": folder / "deny.txt", "users": folder / "users.txt"}
    alone = retrieve(folder, tmp_path / "alone", fallback="popular", **options)
    run_ranks(one_rank, 3, str(folder), str(tmp_path))
    for name in ("exact", "hnsw"):
        table = pq.read_table(tmp_path / name / "lists")
        found = dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))
        if name == "exact":
            assert found == alone
        assert found.keys() == set(CHOSEN) and not any(item % 3 == 0 for row in found.values() for item in row)
        one, several = (open_lists(str(tmp_path / each)) for each in ("alone", name))
        assert several.filters == one.filters and several.popular == one.popular == 2
        assert several.filters["users"].unknown == 2 and len(several.parts) > 1


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("nobody\n", "users.txt", "none of its 1 keys, such as 'nobody', is a user of"),
        ("", "users.txt", "it is empty"),
        (
            "key\nuser 1\n",
            "users.csv",
            "has no column 'user_id' for the user; it has 'key'. Name the right one with --user",
        ),
        (None, "users.txt", "no such file"),
    ],
)
def test_refused(folder, tmp_path, capfd, text, name, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    retrieve(folder, tmp_path / "lists", 2, users=tmp_path / name)
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "lists").exists()
    assert not list(tmp_path.glob(".*"))


def test_recall_is_measured_among_the_chosen_users_or_not_told(folder, tmp_path, capfd):
    users = tmp_path / "users.txt"
    users.write_text("".join(f"user {user}\n" for user in range(1, 29, 2)))  # with odd ids alone
    options = {"data": folder / "data", "index": "ivf", "users": users}
    retrieve(folder, tmp_path / "few", **options, sample=7)
    assert "of the exact lists of 7 users" in capfd.readouterr().out
    users.write_text(f"user {ABSENT[0]}\n")
    retrieve(folder, tmp_path / "none", **options, fallback="popular")
    said = capfd.readouterr().out
    assert "of the exact lists" not in said and "fallback    1 user without a vector" in said
    users.write_text("user 1\n")
    retrieve(folder, tmp_path / "one", **options, fallback="popular")
    assert "not needed: every chosen user of --data has a vector" in capfd.readouterr().out


@pytest.mark.parametrize("when", ["starts", "reads", "joins"])
def test_a_lack_of_scratch_space_is_told_with_what_retrieve_can_do(folder, tmp_path, monkeypatch, capfd, when):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("full") if when == "starts" else duckdb.IOException("full")

    if when == "starts":
        monkeypatch.setattr(engine.tempfile, "mkdtemp", fail)
    elif when == "reads":
        monkeypatch.setattr(KeyFile, "load", fail)
    else:
        monkeypatch.setattr(chosen_users.pa, "table", fail)
    retrieve(folder, tmp_path / "lists", 2, users=folder / "users.txt")
    said = capfd.readouterr().err
    assert "full" in said and str(tmp_path) in said and "--scratch" not in said and "Traceback" not in said
    assert ("give an --output in another folder" if when == "starts" else "free space there") in said
    assert not (tmp_path / "lists").exists() and not list(tmp_path.glob(".*"))
