"""The command line: options as fields, one line for a mistake with the nearest name, lists, and `recgpt STAGE`."""

from typing import Any

import pytest

from recgpt_torchrec import cli
from recgpt_torchrec.config import Evaluate, Pretrain, PromptTune
from recgpt_torchrec.config.fields import options

WHERE_AND_HOW_FAST = """
    data output stream.workers stream.prefetch stream.damaged stream.damaged_limit stream.checksums tables.sharding
    tables.data_parallel_mb train.non_finite train.non_finite_limit train.stall_seconds train.timeout_seconds
""".split()


@pytest.mark.parametrize("stage", [Pretrain, PromptTune])
def test_a_resumed_run_may_change_where_and_how_fast_it_trains_and_nothing_else(stage: type) -> None:
    saving = {f"saving.{name}" for name in ("every_steps", "every_minutes", "keep", "asynchronous")}
    assert {option.name for option in options(stage) if option.may_change} == {*WHERE_AND_HOW_FAST, *saving}


def test_help_says_what_a_resumed_run_may_change(capsys: Any) -> None:
    for stage, times in ((Pretrain, 17), (Evaluate, 0)):
        with pytest.raises(SystemExit) as end:
            cli.parse(stage, "stage", ["--help"])
        assert end.value.code == 0
        assert " ".join(capsys.readouterr().out.split()).count("A resumed run may change it.") == times
