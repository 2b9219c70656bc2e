"""The program doctor: each broken set-up gives its finding, and a sound one none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recgpt_torchrec.config.reports.doctor import Doctor
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.diagnosis.contents import Contents
from recgpt_torchrec.diagnosis.datasets import check_dataset
from recgpt_torchrec.diagnosis.finding import Finding, report, summary
from recgpt_torchrec.diagnosis.machine import FILES, GIB, Gpu, Machine, check_machine
from recgpt_torchrec.diagnosis.settings import check_settings
from recgpt_torchrec.diagnosis.versions import TOGETHER, check_imports, check_versions, installed_versions
from tests.support import change_json, rewrite, stage, write_dataset

INSTALLED = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0+cpu",
    "fbgemm-gpu-cpu": "1.8.0",
    "torchmetrics": "1.0.3",
    "torchx": "0.7.0",
}
NOW = 1_800_000_000.0
MACHINE = Machine(
    cores=8,
    threads=1,
    open_files=FILES,
    address_space=None,
    memory=16 * GIB,
    shared_memory=4 * GIB,
    disks={"/here": 100 * GIB, "/tmp": 10 * GIB},
    writable=True,
    now=NOW,
    skew=0.01,
    name="host",
    has_address=True,
    driver=None,
    cuda=None,
    nccl=False,
)
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0))
WITH_GPUS = replace(MACHINE, driver="580.65.06", cuda="13.0", nccl=True, gpus=[H100, H100])


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(each.severity, each.subject) for each in findings if each.severity != "ok"]


# ------------------------------------------------------------------------------------------------------- versions


def test_the_versions_are_those_of_the_project():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, version in TOGETHER.items():
        assert f'"{name}=={version}"' in text


def test_this_environment_is_sound():
    assert bad(check_versions(installed_versions())) == [] and check_imports() == []


@pytest.mark.parametrize(
    ("changes", "python", "expected"),
    [
        ({}, "3.12.1", []),
        ({"torchrec": "1.7.0"}, "3.11.7", [("error", "torchrec")]),
        ({"torch": "2.15.0+cpu"}, "3.11.7", [("error", "torch")]),
        ({"torchmetrics": None}, "3.11.7", [("error", "torchmetrics")]),
        ({"torchx": "0.8.0"}, "3.11.7", [("warning", "torchx")]),
        ({"fbgemm-gpu-cpu": None}, "3.11.7", [("error", "fbgemm-gpu")]),
        ({"fbgemm-gpu": "1.8.0"}, "3.11.7", [("error", "fbgemm-gpu")]),
        ({"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}, "3.11.7", [("error", "fbgemm-gpu")]),
        ({"torch": "2.13.0+cu130"}, "3.11.7", [("error", "fbgemm-gpu")]),
        ({"torch": "2.13.0"}, "3.11.7", []),
        ({}, "3.10.2", [("error", "Python")]),
        ({}, "3.14.0", [("error", "Python")]),
    ],
)
def test_versions_that_do_not_fit_are_errors(changes, python, expected):
    installed = {name: version for name, version in {**INSTALLED, **changes}.items() if version is not None}
    findings = check_versions(installed, python)
    assert bad(findings) == expected
    assert all(each.cure for each in findings if each.severity != "ok")


def test_a_library_that_cannot_be_loaded_is_an_error():
    def load(name: str) -> None:
        if name == "fbgemm_gpu":
            raise OSError("undefined symbol: _ZN3c104impl\nand so on")

    (finding,) = check_imports(load)
    assert (finding.severity, finding.subject) == ("error", "fbgemm_gpu") and "undefined symbol" in finding.text
    assert "and so on" not in finding.text


# -------------------------------------------------------------------------------------------------------- machine


def test_this_machine_is_found(tmp_path):
    machine = Machine.here(str(tmp_path / "not/there/yet"))
    assert machine.writable and machine.memory > 0 and machine.cores > 0 and str(tmp_path) in machine.disks
    assert list(tmp_path.iterdir()) == [] and abs(machine.skew) < 60


@pytest.mark.parametrize(
    ("machine", "options", "expected"),
    [
        (MACHINE, {}, []),
        (WITH_GPUS, {"ranks": 2}, []),
        (MACHINE, {"device": "cuda"}, [("error", "GPU")]),
        (replace(MACHINE, driver="580"), {}, [("warning", "GPU")]),
        (replace(MACHINE, driver="580"), {"device": "cuda"}, [("error", "GPU")]),
        (replace(MACHINE, driver="580", cuda="13.0"), {}, [("error", "GPU")]),
        (WITH_GPUS, {"ranks": 3}, [("error", "ranks")]),
        (WITH_GPUS, {"ranks": 3, "device": "cpu"}, []),
        (replace(WITH_GPUS, nccl=False), {"ranks": 2}, [("error", "NCCL")]),
        (replace(WITH_GPUS, gpus=[replace(H100, capability=(7, 5))]), {}, [("note", "precision")]),
        (MACHINE, {"ranks": 4, "workers": 2}, [("warning", "cores")]),
        (replace(MACHINE, threads=4), {"ranks": 4}, [("warning", "cores")]),
        (replace(MACHINE, cores=1), {"ranks": 2}, [("warning", "cores")]),
        (replace(MACHINE, open_files=1024), {}, [("warning", "open files")]),
        (replace(MACHINE, open_files=256), {}, [("error", "open files")]),
        (replace(MACHINE, memory=GIB), {}, [("warning", "memory")]),
        (replace(MACHINE, address_space=4 * GIB), {}, [("warning", "memory")]),
        (replace(MACHINE, shared_memory=2**26), {}, [("note", "shared memory")]),
        (replace(MACHINE, shared_memory=2**26), {"workers": 2}, [("warning", "shared memory")]),
        (replace(MACHINE, disks={"/here": GIB // 4, "/tmp": GIB}), {}, [("error", "disk"), ("warning", "disk")]),
        (replace(MACHINE, writable=False), {}, [("error", "disk")]),
        (replace(MACHINE, now=100.0), {}, [("error", "clock")]),
        (replace(MACHINE, skew=-30.0), {}, [("warning", "clock")]),
        (replace(MACHINE, has_address=False), {}, [("warning", "host name")]),
    ],
)
def test_what_a_machine_lacks_is_found(machine, options, expected):
    findings = check_machine(machine, **{"ranks": 1, **options})
    assert bad(findings) == expected
    assert all(each.cure for each in findings if each.severity in ("warning", "error"))


# -------------------------------------------------------------------------------------------------------- dataset


def walks(users: int = 40, length: int = 12, items: int = 20) -> list[list[int]]:
    return [((np.arange(length) + user) % items).tolist() for user in range(users)]


def look(folder: Path) -> tuple[Dataset, Contents, list[Finding]]:
    dataset = Dataset.open(str(folder), damaged="skip")
    contents = Contents.read(dataset)
    return dataset, contents, check_dataset(dataset.manifest, contents, NOW)


def test_a_sound_dataset_has_no_findings(tmp_path):
    write_dataset(tmp_path, walks(), items=20)
    _, contents, findings = look(tmp_path)
    assert bad(findings) == [("note", "times")]  # it has none
    assert contents.entries == 480 and contents.lengths == {12: 40} and contents.repeats == 0


def test_the_figures_are_those_of_a_plain_count(tmp_path):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 15, rng.integers(3, 30)).tolist() for _ in range(60)]
    write_dataset(tmp_path, sequences, items=15)
    _, contents, _ = look(tmp_path)
    assert contents.repeats == sum(len(each) - len(set(each)) for each in sequences)
    assert contents.repeats_in_a_row == sum(a == b for each in sequences for a, b in zip(each, each[1:], strict=False))
    lengths = sorted(map(len, sequences))
    assert (contents.length_at(0), contents.length_at(1)) == (lengths[0], lengths[-1])
    assert contents.length_at(0.5) == lengths[29]
    assert contents.share_longer_than(10) == sum(each > 10 for each in lengths) / 60
    counts = np.bincount(sum((each[:-2] for each in sequences), []), minlength=15)
    half = np.cumsum(np.sort(counts)[::-1])
    assert contents.items_of_half() == int(np.searchsorted(half, counts.sum() / 2)) + 1
    assert contents.most_popular == counts.max()


@pytest.mark.parametrize(
    ("sequences", "items", "expected"),
    [
        ([[0, 1, 2]] * 40, 3, ("warning", "lengths")),
        ([[1, 1, 2, 2, 3, 3, 4, 4, 5, 5]] * 40, 20, ("warning", "repeats")),
        ([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * 40, 6, ("note", "repeats")),
        (walks(items=10), 40, ("warning", "items")),
        ([[0, n % 19 + 1] * 5 for n in range(60)], 20, ("warning", "skew")),
    ],
)
def test_what_is_odd_about_a_log_is_found(tmp_path, sequences, items, expected):
    write_dataset(tmp_path, sequences, items=items)
    assert expected in bad(look(tmp_path)[2])


def test_damaged_rows_and_lost_parts_are_errors(tmp_path):
    write_dataset(tmp_path, walks(), items=20)
    rewrite(tmp_path, lambda rows: rows[3]["item_ids"].__setitem__(2, 99))
    (finding,) = [each for each in look(tmp_path)[2] if each.severity == "error"]
    assert finding.subject == "rows" and "row 3" in finding.text
    (tmp_path / Dataset.open(str(tmp_path)).manifest.sequences[0].path).unlink()
    (finding,) = [each for each in look(tmp_path)[2] if each.severity == "error"]
    assert finding.subject == "rows" and "is missing" in finding.text


def test_rejected_rows_and_dropped_users_are_found(tmp_path):
    write_dataset(tmp_path, walks(), items=20)

    def change(manifest: dict[str, Any]) -> None:
        manifest["preparation"] |= {
            "rows": 1000,
            "rejected": {"no time": 30},
            "rounds": [{"users": 100, "items": 30, "interactions": 900, "users_removed": 60, "items_removed": 10}],
        }

    change_json(tmp_path / "manifest.json", change)
    found = {each.subject + each.severity: each.text for each in look(tmp_path)[2]}
    assert found["logwarning"] == "30 of 1,000 rows were rejected: 30 no time"
    assert found["k-corewarning"].startswith("60 of 100 users were dropped by --min_count (60.0%)")
    assert found["k-corenote"].startswith("10 of 30 items")


@pytest.mark.parametrize(
    ("times", "expected"),
    [((NOW - 10**6, NOW - 10), "ok"), ((NOW, NOW + 10**6), "warning"), ((0.0, NOW), "warning"), (None, "note")],
)
def test_times_that_cannot_be_are_found(tmp_path, times, expected):
    write_dataset(tmp_path, walks(), items=20)
    dataset, contents, _ = look(tmp_path)
    contents.times = None if times is None else (int(times[0]), int(times[1]))
    dataset.manifest.time_unit = 1.0
    (finding,) = [each for each in check_dataset(dataset.manifest, contents, NOW) if each.subject == "times"]
    assert finding.severity == expected


# -------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "machine", "expected"),
    [
        ({}, MACHINE, []),
        ({"batch": {"tokens": 2048}}, MACHINE, [("warning", "steps")]),
        ({"batch": {"tokens": 10}}, MACHINE, [("error", "options")]),
        ({"model": {"max_len": 4}}, MACHINE, [("note", "lengths")]),
        ({"loss": {"candidates": "sampled", "negatives": 500}}, MACHINE, [("note", "loss")]),
        ({}, replace(MACHINE, memory=GIB // 8), [("error", "memory")]),
        ({"train": {"precision": "tf32"}}, MACHINE, [("error", "precision")]),
    ],
)
def test_options_that_do_not_fit_are_found(tmp_path, options, machine, expected):
    write_dataset(tmp_path, walks(users=3000), items=20)
    config = Doctor(data=str(tmp_path))
    for group, values in options.items():
        setattr(config, group, replace(getattr(config, group), **values))
    found = bad(check_settings(config, machine, 1, Contents.read(Dataset.open(str(tmp_path), damaged="skip"))))
    assert [each for each in found if each[0] != "note" or each in expected] == expected


# ---------------------------------------------------------------------------------------------------- the program


def test_the_program_ends_with_1_only_where_a_finding_is_an_error(tmp_path, capsys):
    write_dataset(tmp_path / "data", walks(users=3000), items=20)
    assert stage("doctor", {"--data": tmp_path / "data", "--output": tmp_path}) == 0
    said = capsys.readouterr().out
    for section in ("versions", "machine", "dataset", "configuration"):
        assert f"\n{section}\n" in f"\n{said}"
    assert said.splitlines()[-1].startswith("Next:    python -m recgpt_torchrec.pretrain --data")
    assert stage("doctor", {"--data": tmp_path / "nowhere", "--output": tmp_path}) == 1
    assert "is not a dataset" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_to_do_is_below_what_was_found():
    findings = [Finding("ok", "a", "fine"), Finding("warning", "bcd", "odd", "mend it")]
    assert report({"part": findings}) == "part\n  ok       a    fine\n  warning  bcd  odd\n                -> mend it"
    assert summary(findings) == "2 things looked at: 1 warning"
