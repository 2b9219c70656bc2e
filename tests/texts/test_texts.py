"""Commands, tables and counted nouns that programs print."""

import shlex
import sys

import pytest

from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.launch import job
from recgpt_torchrec.texts import commands
from recgpt_torchrec.texts.tables import figures_table, table
from recgpt_torchrec.texts.words import agree, count


@pytest.fixture(autouse=True)
def start(monkeypatch):
    """No launcher, and a start with python -m."""
    for name in (commands.JOB, "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(commands, "_started_as_recgpt", False)


def test_a_command_has_the_form_of_the_start_and_survives_a_shell(monkeypatch):
    options = {"data": "my data", "ks": [5, 10], "per_user": True, "event": None, "history": "it's,b"}
    words = ["--data", "my data", "--ks", "5", "10", "--per_user", "true", "--history", "it's,b"]
    plain = commands.command("evaluate", options)
    assert shlex.split(plain) == ["python", "-m", "recgpt_torchrec.evaluate", *words]
    commands.set_form("recgpt evaluate")
    assert shlex.split(commands.command("evaluate", options)) == ["recgpt", "evaluate", *words]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launched = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "recgpt_torchrec.evaluate", *words]
    assert shlex.split(commands.command("evaluate", options)) == launched
    assert commands.program("recommend") == "recgpt recommend"  # it runs in one process
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    many = "--nnodes 3 --rdzv-backend c10d --rdzv-endpoint node0:29500 --nproc-per-node 2"
    assert commands.program("evaluate") == f"torchrun {many} -m recgpt_torchrec.evaluate"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("run recgpt_torchrec.pretrain -j 1x2 -- --data d", "torchx run recgpt_torchrec.export -j 1x2 --"),
        ("run -s slurm --scheduler_args 'partition=a b' recgpt_torchrec.pretrain --gpu 8 --name x --env A=b -j 2x8 --",
         "torchx run -s slurm --scheduler_args 'partition=a b' recgpt_torchrec.export --gpu 8 -j 2x8 --"),
        ("run --dryrun recgpt_torchrec.pretrain --env=A=b", "torchx run recgpt_torchrec.export --"),
        ("a program that makes a job", "torchx run recgpt_torchrec.export -j 1x2 --"),
    ],
)  # fmt: skip
def test_a_job_of_torchx_prints_the_command_that_started_it(given, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torchx", *shlex.split(given)])
    (role,) = job.make_job("recgpt_torchrec.pretrain", j="1x2").roles
    monkeypatch.setenv(commands.JOB, role.env[commands.JOB])
    assert commands.program("export") == expected
    assert "-j" not in commands.program("doctor")  # it runs in one process


def test_every_program_in_one_process_is_one():
    import torchx_components

    for name in STAGES:
        try:
            getattr(torchx_components, name)(j="1x2")
            refused = False
        except Exception:
            refused = True
        assert refused == (name in commands.ONE_PROCESS), name


def test_a_message_with_a_command_is_told_from_one_about_commands():
    assert commands.holds_command(f"Train a new run: {commands.command('pretrain', {'data': 'd'})}")
    assert not commands.holds_command("--data d has no prompts; recgpt")


def test_columns_are_as_wide_as_their_widest_cell():
    assert table([["a", "number"], ["bcd", "1"]], right=(1,)) == "a    number\nbcd       1"
    assert table([["a", ""], ["b", "c"]], indent="  ") == "  a\n  b  c"
    assert figures_table([["", "x", "y"], ["p", "1.5", "10"]]) == "     x   y\np  1.5  10"


def test_nouns_agree_with_their_number():
    assert [count(n, "history") for n in (0, 1, 1200)] == ["0 histories", "1 history", "1,200 histories"]
    assert (count(1, "day"), count(2, "day"), count(2, "index", "indexes")) == ("1 day", "2 days", "2 indexes")


def test_summaries_agree_with_the_number_1():
    said = "1 users have 1 histories of 11 items, 2.1 items, 1 new interactions; 1 rows are left of run-1 users"
    assert agree(said) == "1 user has 1 history of 11 items, 2.1 items, 1 new interaction; 1 row is left of run-1 users"


def test_no_next_command_is_given_where_the_runner_goes_on():
    with commands.run_goes_on():
        assert commands.next_line("export", {"data": "d"}) == "Next:    run goes on with the next stage"
    assert commands.next_line("export", {"data": "d"}) == "Next:    python -m recgpt_torchrec.export --data d"
