"""The command that loads exports and deltas into real vector stores; skipped like test_stores.py."""

import sys

import numpy as np
import pytest

from tests.tools.store_helpers import (
    DIM,
    Where,
    chain,
    check_lists,
    fail_at,
    random_vectors,
    write_delta_folder,
    write_export_folder,
)
from tools.stores import __main__ as command
from tools.stores import loading
from tools.stores.store import open_store

pytestmark = pytest.mark.filterwarnings("ignore")  # of the stores' clients


def run(monkeypatch: pytest.MonkeyPatch, where: Where, name: str, *words: str) -> int:
    store, uri, table = where
    options = ["tools.stores", name, "--store", store, "--uri", uri, "--table", table, *words]
    monkeypatch.setattr(sys, "argv", options)
    return command.main()


def test_the_command_loads_applies_shows_and_compares(where, export, tmp_path, monkeypatch, capsys):
    (first, second), _ = chain(tmp_path, export)
    assert run(monkeypatch, where, "load", "--export", export.path) == 0
    assert run(monkeypatch, where, "compare", "--export", export.path, "--users", "7", "--k", "5") == 0
    said = capsys.readouterr().out
    assert "600 items" in said and "7 lists of 5, 100.0% equal" in said and "recall@5 1.0000" in said
    assert run(monkeypatch, where, "apply", "--delta", second.path, first.path) == 2
    message = capsys.readouterr().err
    assert "is for the state" in message and "Traceback" not in message
    assert run(monkeypatch, where, "apply", "--delta", first.path, second.path) == 0
    assert run(monkeypatch, where, "show") == 0
    said = capsys.readouterr().out
    assert "30 items new or moved, 2 removed" in said and f"state {second.state[:12]}, 640 items" in said
    assert run(monkeypatch, where, "compare", "--export", export.path) == 2
    assert "compare it with the export it holds" in capsys.readouterr().err
    assert run(monkeypatch, where, "load", "--export", first.path) == 2, "a delta taken for an export"


def test_lists_of_an_approximate_index_are_called_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lancedb", reason="make stores installs it")
    from recgpt_torchrec.retrieval.list_folder import open_lists
    from tests.support import stage

    export = write_export_folder(tmp_path / "export", random_vectors(600, DIM), random_vectors(40, DIM, seed=1))
    lists, where = tmp_path / "lists", ("lancedb", str(tmp_path / "lance"), "items")
    searching = {"--index": "ivf", "--ivf.clusters": 15, "--ivf.probes": 1}
    assert stage("retrieve", {"--export": export.path, "--output": lists, "--k": 15, **searching}) == 0
    measured = open_lists(str(lists)).measured["recall"]["recall@15"]
    assert measured < 0.9
    assert run(monkeypatch, where, "load", "--export", export.path) == 0
    capsys.readouterr()
    words = ["--export", export.path, "--k", "15", "--lists", str(lists), "--output", str(tmp_path / "figures.json")]
    assert run(monkeypatch, where, "compare", *words) == 0
    assert f"beside {lists} (approximate index ivf, its recall {measured:.4f}): 40 users" in capsys.readouterr().out
    assert '"index": "ivf"' in (tmp_path / "figures.json").read_text()


def test_deltas_can_be_applied_again_after_a_crash_in_the_second(where, export, tmp_path, monkeypatch, capsys):
    deltas, items = chain(tmp_path, export)
    deltas.append(write_delta_folder(tmp_path / "third", deltas[1].state, {7: np.ones(DIM, np.float32)}, [8], 639))
    first, second, third = (delta.path for delta in deltas)
    assert run(monkeypatch, where, "load", "--export", export.path) == 0
    assert run(monkeypatch, where, "apply", "--delta", first, third) == 2, "a gap"
    assert "leads to" in capsys.readouterr().err
    with open_store(*where) as store:
        record = store.read_record()
        assert record is not None and (record.state, record.pending) == (export.state, ""), "something was written"
        loading.apply(store, deltas[0])
        fail_at(store, monkeypatch, "upsert", 1)
        with pytest.raises(KeyboardInterrupt):
            loading.apply(store, deltas[1])
    assert run(monkeypatch, where, "apply", "--delta", first) == 2
    assert "second was applied to" in capsys.readouterr().err
    assert run(monkeypatch, where, "apply", "--delta", first, second, third) == 0
    said = capsys.readouterr().out
    assert said.count("Applied") == 2 and f"state {deltas[2].state[:12]}, 639 items" in said
    assert run(monkeypatch, where, "apply", "--delta", first, second, third) == 0
    said = capsys.readouterr().out
    assert said.count("Already there") == 1 and "Applied" not in said
    assert run(monkeypatch, where, "apply", "--delta", first, second) == 2, "an earlier state"
    with open_store(*where) as store:
        items[7] = np.ones(DIM, np.float32)
        del items[8]
        check_lists(store, items, np.stack(list(random_vectors(5, DIM, seed=2).values())))


def test_only_load_makes_a_store(where, export, tmp_path, monkeypatch, capsys):
    (first, _), _ = chain(tmp_path, export)
    mistyped = tmp_path / "mistyped.db"
    for name, *words in (["show"], ["compare", "--export", export.path], ["apply", "--delta", first.path]):
        assert run(monkeypatch, (where[0], str(mistyped), where[2]), name, *words) == 2
        assert f"there is no {where[0]} store at {mistyped}; check --uri" in capsys.readouterr().err
        assert not mistyped.exists()


def test_only_load_writes_into_a_database_of_postgres(postgres, monkeypatch, capsys):
    psycopg = pytest.importorskip("psycopg", reason="make stores installs it")
    pytest.importorskip("pgvector", reason="make stores installs it")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE mistyped")
    uri = postgres.replace("/postgres?", "/mistyped?")
    assert run(monkeypatch, ("pgvector", uri, "items"), "show") == 2
    assert "vector type not found in the database; check --uri" in capsys.readouterr().err
    with psycopg.connect(uri) as connection:
        connection.execute("CREATE EXTENSION vector")
    assert run(monkeypatch, ("pgvector", uri, "items"), "show") == 0
    assert "holds no export" in capsys.readouterr().out
    with psycopg.connect(uri) as connection:
        assert connection.execute("SELECT to_regclass('items_state')").fetchone() == (None,)


def test_a_server_that_does_not_answer_is_said(export, monkeypatch, capsys):
    pytest.importorskip("pgvector", reason="make stores installs it")
    where = ("pgvector", "postgresql://nobody@127.0.0.1:1/none?connect_timeout=2", "items")
    assert run(monkeypatch, where, "load", "--export", export.path) == 2
    assert "cannot open postgresql://" in capsys.readouterr().err
