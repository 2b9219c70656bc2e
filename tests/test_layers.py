"""Imports point down the layers and never up; the layers are those of CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "recgpt_torchrec"
LAYERS = [
    {"errors", "texts"},
    {"progress", "launcher", "storage", "config"},
    {"cli", "launch", "data"},
    {"model", "distributed", "preparation"},
    {"checkpoints"},
    {"catalogue"},
    {"training"},
    {"retrieval", "prompts", "planning"},
    {"serving"},
    {"evaluation", "diagnosis"},
    {"reports"},
]
"""From the ground up; a package may import what lies below it. Above all of them are the stage programs."""
TOP = {("__main__", "cli"), ("", "api")}
"""What the command and the package itself may import beside that: the package imports it when it is used."""
LAUNCH = {"errors", "config", "texts"}
"""What jobs may know: torchx imports them to list components."""
FILES = 14
"""Maximum number of modules in a folder."""
LINES = 400
"""Maximum number of lines in a file."""


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name without the project's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("")
        found[".".join(part for part in place.parts if part != "__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """What of the project a file imports, anywhere in it: first part of each dotted name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.split(".")[1] for name in names if name.startswith("recgpt_torchrec.")}
    return {name for name in inside if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def layer(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), len(LAYERS))


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    own = module.split(".")[0]
    for name in imported(modules()[module]) - {own}:
        assert layer(name) < layer(own) or (own, name) in TOP, f"{module} imports {name}"
    if own == "launch":
        assert imported(modules()[module]) <= LAUNCH | {"launch"}


def test_every_package_has_its_layer_and_folders_and_files_stay_small():
    folders = {path.parent for path in modules().values()} - {PACKAGE}
    for folder in folders:
        assert layer(folder.relative_to(PACKAGE).parts[0]) < len(LAYERS), f"{folder} has no layer"
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= FILES, folder
    for path in modules().values():
        assert len(path.read_text().splitlines()) <= LINES, path


def test_an_import_that_points_up_is_found(tmp_path):
    wrong = tmp_path / "low.py"
    wrong.write_text("def f():\n    from recgpt_torchrec.training import trainer\n")
    assert imported(wrong) == {"training"} and layer("training") > layer("data")
