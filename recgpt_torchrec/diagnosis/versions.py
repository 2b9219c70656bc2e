"""Whether the installed packages fit each other. Imports none of them before it has looked at their versions."""

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Mapping

from recgpt_torchrec.diagnosis.finding import Finding, Severity

TOGETHER = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "torchmetrics": "1.0.3", "torchx": "0.7.0"}
"""Versions that were tried together; other pairs of torch, torchrec and fbgemm fail with undefined symbols."""
FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
"""One library under two names: for CUDA builds of torch, and for the others."""
PYTHONS = ((3, 11), (3, 13))
"""Oldest and newest version of Python that these have packages for."""
IMPORTS = ("torch", "fbgemm_gpu", "torchrec")
REINSTALL = (
    "make a new environment: make install (CPU), or pip install of this project (CUDA), in which these versions are set"
)


def installed_versions() -> dict[str, str]:
    """Version of each package of `TOGETHER` and `FBGEMM` that is installed, with its local part (`2.13.0+cpu`)."""
    found = {}
    for name in {*TOGETHER, *FBGEMM}:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_versions(installed: Mapping[str, str], python: str = platform.python_version()) -> list[Finding]:
    """Findings about versions.

    Args:
        installed: as of `installed_versions`.
        python: version of the interpreter.
    """
    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    findings = []
    if not PYTHONS[0] <= tuple(map(int, python.split(".")[:2])) <= PYTHONS[1]:
        cure = f"use Python {oldest} to {newest}"
        findings.append(Finding("error", "Python", f"{python}; the packages are made for {oldest} to {newest}", cure))
    else:
        findings.append(Finding("ok", "Python", python))
    there = [name for name in FBGEMM if name in installed]
    for name, wanted in TOGETHER.items():
        found = next((each for each in there), None) if name == "fbgemm-gpu" else name
        if found is None or found not in installed:
            findings.append(Finding("error", name, f"is not installed; {wanted} is needed", REINSTALL))
        elif (version := installed[found]).split("+")[0] != wanted:
            severity: Severity = "warning" if name == "torchx" else "error"
            text = f"{found} {version} does not belong to the others: {name} {wanted} does"
            findings.append(Finding(severity, name, text, f"pip install {found}=={wanted}, or {REINSTALL}"))
        else:
            findings.append(Finding("ok", name, f"{found} {version}"))
    findings += _check_builds(installed, there)
    return findings


def _check_builds(installed: Mapping[str, str], there: list[str]) -> list[Finding]:
    if len(there) > 1:
        cure = f"pip uninstall {' '.join(FBGEMM)}, then install the one that fits torch"
        return [Finding("error", "fbgemm-gpu", f"{' and '.join(there)} overwrite each other's files", cure)]
    build = installed.get("torch", "").partition("+")[2]
    if build == "cpu" and there == ["fbgemm-gpu"]:
        cure = f"pip uninstall fbgemm-gpu, then pip install fbgemm-gpu-cpu=={TOGETHER['fbgemm-gpu']}"
        return [Finding("error", "fbgemm-gpu", "is a CUDA build and torch a CPU build: it cannot be loaded", cure)]
    if build.startswith("cu") and there == ["fbgemm-gpu-cpu"]:
        cure = f"pip uninstall fbgemm-gpu-cpu, then pip install fbgemm-gpu=={TOGETHER['fbgemm-gpu']}"
        return [Finding("error", "fbgemm-gpu", "is a CPU build and torch a CUDA build: no table works on a GPU", cure)]
    return []


def check_imports(load: Callable[[str], object] = importlib.import_module) -> list[Finding]:
    """An error for the first package that cannot be imported; none where all can."""
    for name in IMPORTS:
        try:
            load(name)
        except Exception as error:  # undefined symbols are OSErrors, missing files ImportErrors
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            return [Finding("error", name, f"cannot be imported: {first_line}", REINSTALL)]
    return []
