"""What is measured of a step equals plain counts, and its time goes to the parts that take it."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recgpt_torchrec.config import Loss, Model
from recgpt_torchrec.training import meter
from recgpt_torchrec.training.execution import Execution
from recgpt_torchrec.training.meter import PARTS, Speed, StepMeter, peak_of
from tests.support import SMALL, read_epochs, stage, training_part, walks, write_dataset

HISTORIES = walks(users=60, items=20)


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> list[StepMeter]:
    """The meters that are made, in order."""
    made: list[StepMeter] = []
    initialise = StepMeter.__init__

    def keep(self: StepMeter, *args: Any) -> None:
        initialise(self, *args)
        made.append(self)

    monkeypatch.setattr(StepMeter, "__init__", keep)
    return made


def train(folder: Path, **options: Any) -> Path:
    write_dataset(folder / "data", HISTORIES, items=20)
    given = {"--data": folder / "data", "--output": folder / "run", **SMALL}
    assert stage("pretrain", {**given, **{f"--{name}": value for name, value in options.items()}}) == 0
    return folder / "run"


def test_counts_of_an_epoch_are_those_of_a_plain_loop(tmp_path: Path, meters: list[StepMeter]) -> None:
    run = train(tmp_path)
    lengths = [len(training_part(history)[-11:]) - 1 for history in HISTORIES]
    tokens, attended = sum(lengths), sum(place + 1 for length in lengths for place in range(length))
    counts = meters[0].epoch_counts
    assert counts.targets == counts.own_targets == counts.own_tokens == tokens
    # Products of a weight matrix [in, out]: 2 in out per token; as many again for each of two gradients.
    weights = sum(
        weight.numel()
        for name, weight in Linear(Model(dim=8, max_len=10)).named_parameters()
        if weight.ndim == 2 and "position" not in name
    )
    candidates = 10 + 0  # sampled negatives of SMALL; how many are distinct varies
    least = 6 * (tokens * weights + 2 * attended * 8)
    assert least < counts.flops <= least + 6 * tokens * candidates * 8
    for line in read_epochs(run):
        assert line["targets_per_s"] == pytest.approx(line["tokens_per_s"])
        assert line["targets_per_s"] >= tokens / line["train_s"]
        assert 0 < line["share_of_peak"] < 1 and line["memory_mib"] == line["host_memory_mib"] > 50


def Linear(model: Model) -> torch.nn.Module:  # noqa: N802
    from recgpt_torchrec.model.decoder import Decoder

    return Decoder(model)


def test_each_part_of_a_step_takes_the_time_between_its_marks(
    tmp_path: Path, meters: list[StepMeter], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    run = train(tmp_path, **{"train.epochs": 2, "batch.tokens": 20})
    lines = read_epochs(run)
    assert lines[0]["step"] > 11  # the eleventh is split
    assert set(lines[0]["split"]) == set(PARTS) and sum(lines[0]["split"].values()) == pytest.approx(1)
    # One tick from each mark to the next: the clock is asked at nothing else within a step.
    tick = lines[0]["split"]["decoder"]
    for part in ("lookup", "loss", "backward", "optimizer"):
        assert lines[0]["split"][part] == pytest.approx(tick)
    assert lines[0]["split"]["data wait"] / tick == pytest.approx(round(lines[0]["split"]["data wait"] / tick))


def test_a_compiled_model_has_no_hook_within_and_one_part_for_both(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Execution, "choose", classmethod(lambda cls, *_: Execution("cpu", compile=True)))
    line = read_epochs(train(tmp_path, **{"train.epochs": 1, "batch.tokens": 20}))[0]
    assert set(line["split"]) == set(PARTS) - {"loss"}


class Event:
    """A CUDA event of a device that is done with what was launched before `done`."""

    now = done = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        assert stream == "the default stream"
        Event.now += 1.0
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.done

    def elapsed_time(self, later: "Event") -> float:
        return (later.at - self.at) * 1000


def test_on_cuda_events_are_read_only_once_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the default stream")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(meter, "rank", lambda: 1)  # without a model
    measured = StepMeter(None, None, torch.device("cuda", 0), Execution("cuda", "bf16"))  # type: ignore[arg-type]
    measured.active, measured.peak = True, 1e12
    measured.begin(10)
    measured._mark("decoder")
    measured.end(targets=5.0)
    assert measured.newest().split == {} and measured.newest().memory_mib == 3
    Event.done = Event.now
    assert measured.newest().split == {"decoder": 0.5, "communication": 0.5}
    measured.begin(11)  # not split
    measured.end(targets=5.0)
    assert Event.now == Event.done and measured.epoch_counts.targets == 10


def test_the_peak_is_the_makers_rating_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_of(torch.device("cuda", 0), Execution("cuda", "bf16")) == 989e12
    assert 1e8 < peak_of(torch.device("cpu"), Execution("cpu")) < 1e14


def test_ranks_other_than_the_first_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "rank", lambda: 1)
    idle = StepMeter(None, None, torch.device("cpu"), Execution("cpu"))  # type: ignore[arg-type]
    idle.start_epoch()
    idle.begin(10)
    assert list(idle.watch(iter([1, 2]))) == [1, 2]  # type: ignore[list-item]
    idle.end(targets=5.0)
    assert idle.epoch().share_of_peak == 0.0 and idle.epoch().split == {}


def test_one_line_says_it_all() -> None:
    speed = Speed(1234.0, 2345.0, 5e9, 2e10, 300.0, 400.0, {"lookup": 0.25, "decoder": 0.75})
    assert str(speed) == (
        "1,234 targets/s, 2,345 tokens/s, 25.0% of peak (5.0 of 20.0 GFLOP/s), 300 MiB; step: lookup 25%, decoder 75%"
    )
    assert Loss().candidates == "sampled"
