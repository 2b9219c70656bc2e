"""Which device a rank computes on, and what is refused before anything else happens; torch.cuda is replaced."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recgpt_torchrec.config.fields import options
from recgpt_torchrec.config.stages import STAGES
from recgpt_torchrec.distributed import processes as joined
from recgpt_torchrec.distributed.devices import choose_device
from recgpt_torchrec.distributed.processes import process_group
from recgpt_torchrec.errors import REFUSED, InputError
from recgpt_torchrec.launcher import Launched
from tests.support import stage


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets how many GPUs torch sees, and the process's place on its node."""

    def see(count: int, local_rank: int | None = None, processes: int | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name, value in {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": processes}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return see


def test_auto_takes_the_gpu_of_the_process_and_without_one_the_cpu(gpus: Any) -> None:
    gpus(0, 1, 2)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    gpus(2, 1, 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    gpus(4)  # no launcher
    assert choose_device("auto") == torch.device("cuda", 0)


def test_cuda_without_a_gpu_says_what_torch_sees(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match=r"--device cuda: torch sees no GPU \(torch .* CUDA_VISIBLE_DEVICES is ''\)"):
        choose_device("cuda")


@pytest.mark.parametrize("option", ["auto", "cuda"])
@pytest.mark.parametrize(("count", "local_rank", "processes"), [(1, 0, 2), (1, 1, None), (2, 1, 4)])
def test_processes_that_would_share_a_gpu_are_refused_before_they_join(
    gpus: Any, option: Any, count: int, local_rank: int, processes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(count, local_rank, processes)
    monkeypatch.setattr(joined, "read_launcher", lambda: Launched(local_rank, 4, "localhost", 29500))
    monkeypatch.setattr(joined, "meet", lambda *_: dist.HashStore())
    wanted = rf"{processes or 2} processes on this node, but torch sees {count} GPUs? .*-j 1x{count} .*--device cpu"
    with pytest.raises(InputError, match=wanted), process_group(device=option):
        pass
    assert not dist.is_initialized()
    assert choose_device("cpu") == torch.device("cpu")


COMPUTING = ("pretrain", "generate_prompts", "prompt_tune", "evaluate", "export")


def test_the_stages_that_compute_with_torch_have_the_option() -> None:
    having = {name for name, stage in STAGES.items() if any(each.name == "device" for each in options(stage.config))}
    # plan and doctor have the options of pretrain, and run those of every stage.
    assert having == {*COMPUTING, "plan", "doctor", "recommend", "run"}


@pytest.mark.parametrize("name", COMPUTING)
def test_a_stage_without_its_device_is_refused_before_it_reads_or_writes(
    name: str, gpus: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(0)
    given = {"--data": tmp_path / "nowhere", "--output": tmp_path / "out", "--device": "cuda"}
    if name != "pretrain":
        given["--checkpoint"] = tmp_path / "nowhere"
    assert stage(name, given) == REFUSED
    assert "error: --device cuda: torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
