"""`export --encoder.kind`: the program alone makes the vectors that the stage wrote."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recgpt_torchrec.config import Encoder
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.exports.reading import open_export
from recgpt_torchrec.retrieval.exports.vectors import vectors_of
from recgpt_torchrec.serving.exported.opening import open_encoder
from recgpt_torchrec.serving.exported.program import check_onnx
from recgpt_torchrec.serving.exported.writing import Layout
from tests.serving.conftest import INTERESTS, options
from tests.support import stage

ALONE = """
import sys, numpy as np
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("recgpt_torchrec", "torchrec", "fbgemm_gpu", "pyarrow"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    given = {name: torch.from_numpy(values) for name, values in np.load(sys.argv[2]).items()}
    one = [program(**{name: values[[row]] for name, values in given.items()}) for row in range(4)]
    np.savez(sys.argv[3], all=program(**given), one=torch.cat(one))
"""
"""Runs a program where only torch and NumPy can be imported: all histories at once, and the first four one by one."""


def exported_histories(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arguments of the program for the histories of the dataset, and the vectors that the stage made of them."""
    dataset = Dataset.open(str(folder / "prompts"))
    rows = [
        row for part in dataset.manifest.sequences for row in pq.read_table(f"{dataset.path}/{part.path}").to_pylist()
    ]
    room, arguments = max(len(row["item_ids"]) for row in rows), {}
    for name, column in (("items", "item_ids"), ("segments", "segment_ids")):
        padded = [row[column] + [0] * (room - len(row[column])) for row in rows]
        arguments[name] = np.array(padded, dtype=np.int64)
    # A whole history ends with its newest interaction.
    ends = [max(place for place, segment in enumerate(row["segment_ids"]) if segment == 0) + 1 for row in rows]
    arguments |= {"lengths": np.array(ends), "users": np.array([row["user_id"] for row in rows])}
    found = {
        user: vectors
        for batch in open_export(str(folder / "full")).users()
        for user, vectors in zip(batch["user_id"].to_pylist(), vectors_of(batch), strict=True)
    }
    return arguments, np.stack([found[user] for user in arguments["users"]])


def test_the_program_makes_the_vectors_of_the_stage_where_only_torch_is_installed(folder, tmp_path):
    encoder = open_export(str(folder / "full")).manifest.encoder
    assert encoder is not None and encoder.kind == "full" and not encoder.tables
    assert [each.name for each in encoder.inputs] == ["items", "lengths", "users", "segments"]
    arguments, expected = exported_histories(folder)
    assert arguments["lengths"].max() > 10 > 1 == arguments["lengths"].min()  # longer than the model reads, and one
    named: dict[str, Any] = dict(arguments)
    np.savez(tmp_path / "given.npz", **named)
    program = folder / "full" / encoder.paths[0]
    words = [sys.executable, "-c", ALONE, program, tmp_path / "given.npz", tmp_path / "made.npz"]
    subprocess.run(words, check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1", "PATH": ""}, timeout=300)
    made = np.load(tmp_path / "made.npz")
    np.testing.assert_allclose(made["all"], expected, atol=1e-5)
    np.testing.assert_allclose(made["one"], expected[:4], atol=1e-5)


def test_the_step_program_with_a_search_makes_them_too_and_takes_the_place_of_the_other(folder, capsys):
    shutil.copytree(folder / "full", folder / "step")
    assert stage("export", {**options(folder, "step"), "--encoder.kind": "step"}) == 0
    assert "Written" in capsys.readouterr().out
    export = open_export(str(folder / "step"))
    opened = open_encoder(export)
    assert opened.manifest.kind == "step" and opened.items is not None and opened.users is not None
    assert len(list((folder / "step" / "encoder").iterdir())) == 1
    arguments, expected = exported_histories(folder)
    arguments = {name: values[:6] for name, values in arguments.items()}
    _, vectors = export.item_vectors()
    seen = [
        set(row[:end][kinds[:end] == 0].tolist())
        for row, kinds, end in zip(arguments["items"], arguments["segments"], arguments["lengths"], strict=True)
    ]
    users, lengths = torch.from_numpy(opened.users.of(arguments["users"])), arguments["lengths"].copy()
    room = np.zeros((len(lengths), INTERESTS), np.int64)
    items, segments = (np.concatenate([arguments[name], room], 1) for name in ("items", "segments"))
    made = []
    for _ in range(INTERESTS):
        looked_up = np.stack([opened.items.of(row) for row in items])
        made.append(
            opened.run(
                {
                    "item_vectors": torch.from_numpy(looked_up),
                    "user_vectors": users,
                    "lengths": torch.from_numpy(lengths),
                    "segments": torch.from_numpy(segments),
                }
            ).numpy()
        )
        for row, scores in enumerate(made[-1] @ vectors.T):
            best = next(item for item in np.argsort(-scores, kind="stable").tolist() if item not in seen[row])
            seen[row].add(best)
            items[row, lengths[row]], segments[row, lengths[row]] = best, 1
        lengths += 1
    np.testing.assert_allclose(np.stack(made, 1), expected[:6], atol=1e-5)


def test_a_second_run_leaves_the_program_and_a_damaged_one_is_named(folder, tmp_path, capsys):
    assert stage("export", {**options(folder), "--encoder.kind": "full"}) == 0
    assert "Already there" in capsys.readouterr().out
    shutil.copytree(folder / "full", tmp_path / "copy")
    encoder = open_export(str(tmp_path / "copy")).manifest.encoder
    assert encoder is not None
    program = tmp_path / "copy" / encoder.paths[0]
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    with pytest.raises(InputError, match="its checksum"):
        open_encoder(open_export(str(tmp_path / "copy")))
    program.unlink()
    with pytest.raises(InputError, match="is missing"):
        open_encoder(open_export(str(tmp_path / "copy")))
    path = tmp_path / "copy" / "manifest.json"
    values = json.loads(path.read_text())
    values["encoder"]["kind"] = "half"
    del values["checksum"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="encoder.kind is 'half'"):
        open_export(str(tmp_path / "copy"))


def test_what_is_inside_the_program_follows_from_sizes():
    mib = 2**20 // (4 * 64)  # vectors of 64 numbers
    assert Layout.choose(Encoder(kind="auto", mib=3), mib, 2 * mib, 64, False) == Layout(True, True)
    assert Layout.choose(Encoder(kind="auto", mib=3), mib, 2 * mib, 64, True) == Layout(True, False)
    assert Layout.choose(Encoder(kind="auto", mib=1), mib, 1, 64, True) == Layout(False, False)
    assert Layout.choose(Encoder(kind="full", mib=1), mib, 1, 64, True) == Layout(True, False)
    assert Layout.choose(Encoder(kind="step", mib=3), mib, 1, 64, False) == Layout(False, False)


def test_onnx_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setattr("recgpt_torchrec.serving.exported.program.ONNX_PACKAGES", ("onnx_that_is_missing",))
    with pytest.raises(InputError, match=r"recgpt-torchrec\[onnx\]"):
        check_onnx()
