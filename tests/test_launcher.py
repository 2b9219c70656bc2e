"""What a launcher's environment says: numbers that cannot be right are refused, and what is left over is no job."""

import os
import sys
import threading
import time
from threading import Event

import pytest
import torch

import recgpt_torchrec as rg
from recgpt_torchrec import cli, launcher, prepare
from recgpt_torchrec.config import Evaluate, Prepare
from recgpt_torchrec.distributed.group import joining
from recgpt_torchrec.distributed.processes import local_world_size, process_group
from recgpt_torchrec.errors import REFUSED, InputError
from recgpt_torchrec.launcher import Launched, find_processes, own_rank, read_launcher, started_processes

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    *launcher.OTHER_LAUNCHERS,
)
JOB = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a.node", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def give(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_rank_of_a_job(monkeypatch):
    assert read_launcher() is None and own_rank() == 0 and started_processes() == 1
    give(monkeypatch, JOB)
    assert read_launcher() == Launched(3, 4, "a.node", 29500) and own_rank() == 3 and started_processes() == 4
    assert find_processes() == "WORLD_SIZE is 4"
    give(monkeypatch, {"WORLD_SIZE": "1", "RANK": "0"})
    assert read_launcher() == Launched(0, 1, "a.node", 29500) and find_processes() is None
    give(monkeypatch, {"MASTER_PORT": " 0 "})
    assert read_launcher() == Launched(0, 1, "a.node", 0)


def test_a_stage_of_one_process_is_refused_on_several(monkeypatch, capsys, tmp_path):
    """In the command, by rank 0; a program that calls it on one of its ranks knows what it does."""
    (tmp_path / "log.txt").write_text("".join(f"u{user} a b c d e\n" for user in range(6)))
    words = ["--input", str(tmp_path / "log.txt"), "--output", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["recgpt prepare", *words])
    monkeypatch.setattr(cli, "RANK_0_SECONDS", 0)
    for given, said in (
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
        (JOB | {"RANK": "0"}, "WORLD_SIZE is 4"),
        (JOB, ""),
    ):
        give(monkeypatch, given)
        with pytest.raises(SystemExit) as end:
            cli.run(Prepare, prepare.main, "recgpt prepare")
        error = capsys.readouterr().err
        assert end.value.code == REFUSED and said in error
        assert bool(said) == ("prepare runs in one process; start it once, without torchrun or with -j 1x1" in error)
    assert rg.Dataset.prepare(words[1], output=words[3]).manifest.users == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes .* start torchrun, once per node"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but not MASTER_ADDR and MASTER_PORT; start the stage with torchrun"),
        ({**JOB, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment; it must be a whole number, at least 1"),
        ({**JOB, "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({**JOB, "WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"),
        ({**JOB, "RANK": "4"}, "RANK is '4' .* from 0 to 3, since WORLD_SIZE is 4. .* or unset WORLD_SIZE"),
        ({**JOB, "RANK": "-1"}, "RANK is '-1'"),
        ({**JOB, "RANK": "1.0"}, "RANK is '1.0'"),
        ({**JOB, "MASTER_PORT": "99999"}, "MASTER_PORT is '99999' .* from 1 to 65535"),
        ({**JOB, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0' .* from 1 to 4"),
        ({**JOB, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is '8'"),
        ({**JOB, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_what_cannot_be_right_is_refused(given, message, monkeypatch):
    """Else each process would do all the work and write to the same folder, or wait for a rank that never comes."""
    give(monkeypatch, given)
    with pytest.raises(InputError, match=message):
        read_launcher()


def test_what_is_left_over_of_a_job_makes_this_process_no_rank(monkeypatch, capsys):
    give(monkeypatch, {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "abc"})
    assert own_rank() == 0 and started_processes() == 1
    assert find_processes() is None
    with process_group():
        assert local_world_size() == 1 and "LOCAL_RANK" not in os.environ
        assert torch.distributed.get_world_size() == 1
    with pytest.raises(SystemExit):
        cli.parse(Evaluate, "recgpt evaluate", ["--nope", "1"])
    assert "unknown option --nope" in capsys.readouterr().err


def test_a_rank_that_finds_no_place_to_meet_says_where_it_looks(monkeypatch, capsys):
    joining._say_waiting(Launched(1, 2, "no.such.host.invalid", 29500), 600, Event())
    said = capsys.readouterr().out
    assert "rank 1 of 2 waits for rank 0 at no.such.host.invalid:29500, a name that this node cannot resolve" in said
    words = "rank 1 of 2 waits for rank 0 at 127.0.0.1:9 (MASTER_ADDR and MASTER_PORT), 1 s at most"
    before = {*threading.enumerate()}
    for say_s, said in ((0.2, True), (600, False)):
        monkeypatch.setattr(joining, "SAY_S", say_s)
        with pytest.raises(joining.NotJoined):
            joining.meet(Launched(1, 2, "127.0.0.1", 9), 1.0)
        time.sleep(0.5)
        assert (words in capsys.readouterr().out) == said
        assert not {*threading.enumerate()} - before  # what was to say it has ended
