"""Reads every kind of file with bytes changed: each case must be refused with one message, or give the right result.

    OMP_NUM_THREADS=1 python -m tools.fuzz --cases 300

Inputs are made once: raw logs, a dataset, runs, prompts, an export, lists. Each case changes one file, by random bytes
or by chosen content (`tools.mutations`), and runs the stage that reads it in a process of its own, with a limit of time
and memory. The outcomes:

    refused     status 2 and one message
    right       status 0 and the result of the unchanged file; for a raw log and a configuration, any result
    left out    status 0, and a line that says how many damaged rows were left out
    another     status 0 and another result, of content that was chosen and is valid
    wrong       status 0 and another result, although bytes were changed at random
    traceback, hang, killed, canary (a command ran), outside (a path left the folder), status N

Exits with 1 if any of the last two lines occurred. `--keep DIR` keeps the inputs of these cases.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recgpt_torchrec.storage.parts import checksum_of_footer
from tools import mutations
from tools.fuzz_inputs import DESCRIBED, OPTIONS, make_inputs
from tools.mutations import Mutation
from tools.stage_process import End, preload, run_in_process, run_stage

GOOD = ("refused", "right", "left out", "another")
SKIP = {"--stream.damaged": "skip", "--stream.damaged_limit": 9}


@dataclass(frozen=True)
class Kind:
    """A kind of file, and the stage that reads it."""

    name: str
    file: str
    """Pattern of its path; where several files match, a case changes one of them."""
    stage: str
    format: str
    """Key of `CHOSEN`."""
    options: dict[str, Any] = field(default_factory=dict)
    result: str = "new"
    """File or folder that the stage writes."""
    any_result: bool = False
    """Whether changed content is content like any other."""
    is_part: bool = False
    """Whether a manifest holds the file's size, which then is corrected in half of the cases."""


LOGS = {"csv": "text", "csv.gz": "text", "tsv": "text", "inter": "text", "txt": "text", "jsonl": "json"}
LOGS |= {"parquet": "parquet"}
KINDS = [
    *(
        Kind(f"log: {ending}", f"log.{ending}", "prepare", form, {"--input": f"log.{ending}"}, any_result=True)
        for ending, form in LOGS.items()
    ),
    *(
        Kind(f"table: {ending}", f"items.{ending}", "prepare", form,
             DESCRIBED | {"--items": f"items.{ending}"}, any_result=True)
        for ending, form in {"csv": "text", "jsonl": "json", "parquet": "parquet"}.items()
    ),
    Kind("dataset: values of attributes", "described/attributes/*/*.parquet", "prepare", "parquet",
         DESCRIBED | {"--items": "items.csv", "--vocabulary": "described"}, is_part=True),
    Kind("dataset: manifest", "data/manifest.json", "evaluate", "json", result="new.json"),
    Kind("dataset: manifest, damaged rows left out", "data/manifest.json", "pretrain", "json",
         SKIP | {"--output": "new"}),
    Kind("dataset: manifest, prepared again", "prepared/manifest.json", "prepare", "json",
         {"--input": "log.csv", "--output": "prepared"}, "prepared"),
    Kind("dataset: sequences", "data/sequences/*.parquet", "evaluate", "parquet", result="new.json", is_part=True),
    Kind("dataset: sequences, damaged rows left out", "data/sequences/*.parquet", "pretrain", "parquet",
         SKIP | {"--output": "new"}, is_part=True),
    Kind("dataset: items", "data/items/*.parquet", "export", "parquet", is_part=True),
    Kind("dataset: item counts", "data/items/*.parquet", "pretrain", "parquet",
         {"--output": "new", "--loss.candidates": "in_batch", "--train.epochs": 1}, is_part=True),
    Kind("dataset: users", "data/users/*.parquet", "export", "parquet", is_part=True),
    Kind("neighbours: manifest", "neighbours/manifest.json", "pretrain", "json",
         {"--neighbours.path": "neighbours", "--output": "new"}),
    Kind("neighbours: manifest, found again", "neighbours/manifest.json", "find_neighbours", "json",
         result="neighbours"),
    Kind("neighbours: parts", "neighbours/neighbours/*.parquet", "pretrain", "parquet",
         {"--neighbours.path": "neighbours", "--output": "new"}, is_part=True),
    Kind("prompts: manifest", "prompts/manifest.json", "prompt_tune", "json"),
    Kind("prompts: sequences", "prompts/sequences/*.parquet", "prompt_tune", "parquet", is_part=True),
    Kind("run: checkpoint.json", "run/checkpoints/*/checkpoint.json", "evaluate", "json", result="new.json"),
    Kind("run: checkpoint.json, resumed", "half/checkpoints/*/checkpoint.json", "pretrain", "json",
         {"--output": "half"}, "half"),
    Kind("run: .metadata", "run/checkpoints/*/.metadata", "evaluate", "pickle", result="new.json"),
    Kind("run: .metadata, resumed", "half/checkpoints/*/.metadata", "pretrain", "pickle", {"--output": "half"}, "half"),
    Kind("run: tensors", "run/checkpoints/*/*.distcp", "evaluate", "records", result="new.json"),
    Kind("run: tensors, resumed", "half/checkpoints/*/*.distcp", "pretrain", "records", {"--output": "half"}, "half"),
    Kind("run: best.json", "run/best.json", "evaluate", "json", result="new.json"),
    Kind("run: run.json", "half/run.json", "pretrain", "json", {"--output": "half"}, "half"),
    Kind("run: history.jsonl", "half/history.jsonl", "pretrain", "json", {"--output": "half"}, "half"),
    Kind("run: damaged.jsonl", "skipped/damaged.jsonl", "pretrain", "json",
         SKIP | {"--data": "damaged", "--output": "skipped"}, "skipped"),
    Kind("export: manifest", "vectors/manifest.json", "retrieve", "json"),
    Kind("export: manifest, exported again", "vectors/manifest.json", "export", "json", {"--output": "vectors"},
         "vectors"),
    Kind("export: items", "vectors/items/*.parquet", "retrieve", "parquet", is_part=True),
    Kind("export: users", "vectors/users/*.parquet", "retrieve", "parquet", is_part=True),
    Kind("index: manifest", "indexed/manifest.json", "retrieve", "json", {"--export": "indexed"}),
    Kind("index: shards", "indexed/index/*/*.faiss", "retrieve", "records", {"--export": "indexed"}),
    Kind("delta: manifest", "delta/manifest.json", "apply", "json"),
    Kind("delta: items", "delta/items/*.parquet", "apply", "parquet", is_part=True),
    Kind("delta: users", "delta/users/*.parquet", "apply", "parquet", is_part=True),
    Kind("lists: manifest, retrieved again", "lists/manifest.json", "retrieve", "json", {"--output": "lists"}, "lists"),
    Kind("keys: list", "keys.txt", "retrieve", "text", {"--allow": "keys.txt"}, any_result=True),
    Kind("keys: lines of JSON", "keys.jsonl", "retrieve", "json", {"--users": "keys.jsonl"}, any_result=True),
    Kind("keys: table", "keys.parquet", "retrieve", "parquet",
         {"--items": "keys.parquet", "--where": "price < 9", "--fallback": "popular"}, any_result=True),
    Kind("evaluation, written again", "test.json", "evaluate", "json", {"--output": "test.json"}, "test.json"),
    Kind("evaluation, reported", "test.json", "report", "json", result="report.html", any_result=True),
    Kind("evaluation: ranks by user", "test.users.parquet", "report", "parquet", result="report.html"),
    Kind("configuration", "config.yaml", "parse", "yaml", any_result=True),
]  # fmt: skip


def chosen_for(kind: Kind, canary: str) -> dict[str, Mutation]:
    """The chosen content for a kind of file, by name."""

    def fixed(contents: dict[str, bytes]) -> dict[str, Mutation]:
        return {name: mutations.replace_by(content) for name, content in contents.items()}

    formats: dict[str, Callable[[], dict[str, Mutation]]] = {
        "text": lambda: mutations.TEXT,
        "json": lambda: mutations.TEXT | mutations.JSON,
        "parquet": lambda: mutations.PARQUET,
        "pickle": lambda: fixed(mutations.hostile_pickles(canary)),
        "records": lambda: mutations.RECORDS | fixed(mutations.hostile_pickles(canary)),
        "yaml": lambda: mutations.TEXT | fixed(mutations.hostile_yaml(canary)),
    }
    return formats[kind.format]()


# ------------------------------------------------------------------------------------------------------------- cases


def folders_of(kind: Kind) -> set[str]:
    """Names of the inputs that a case of this kind needs, in the folder of inputs."""
    options = OPTIONS[kind.stage] | kind.options
    words = {str(value).split("/")[0] for value in options.values()} | {kind.file.split("/")[0]}
    return words | ({"test.users.parquet"} if "test.json" in words else set())


def copy_inputs(kind: Kind, inputs: Path, folder: Path) -> None:
    """Copy what a case of this kind needs."""
    folder.mkdir(parents=True)
    for name in folders_of(kind):
        source = inputs / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copy2(source, folder / name)  # with its time, which prepare compares


def correct_manifest(path: Path, folder: Path, with_footer: bool) -> None:
    """Let the manifest promise the size and checksum that a changed part has, so that what is in it is read.

    Args:
        path: of the part.
        folder: of the case.
        with_footer: whether it promises the footer too; False: its checksum has to keep the footer from pyarrow.
    """
    root = folder / path.relative_to(folder).parts[0]
    manifest = json.loads((root / "manifest.json").read_text())
    manifest.pop("checksum", None)
    name = str(path.relative_to(root))
    for parts in [*manifest.values(), *(each["parts"] for each in manifest.get("attributes", []))]:
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and part.get("path") == name:
                data = path.read_bytes()
                part.update(bytes=len(data), checksum=f"{zlib.crc32(data):08x}")
                if with_footer:
                    part["footer"] = checksum_of_footer(data)
    (root / "manifest.json").write_text(json.dumps(manifest))


def judge(kind: Kind, end: End, expected: str, is_chosen: bool, folder: Path, canary: str) -> str:
    """The outcome of a case."""
    if os.path.exists(canary):
        os.remove(canary)
        return "canary"
    known = {folder.name, folder.with_suffix(".text").name, folder.with_suffix(".digest").name}
    if {path.name for path in folder.parent.iterdir()} - known:
        return "outside"
    if end.status is None:
        return "hang"
    if end.status < 0:
        return "killed"
    if "Traceback" in end.text:
        return "traceback"
    if end.status == 2:
        return "refused" if len(re.findall(r"^recgpt\S*: error", end.text, re.MULTILINE)) == 1 else "messages"
    if end.status:
        return f"status {end.status}"
    if kind.any_result or end.digest == expected:
        return "right"
    if re.search(r"^Damaged: \d+ rows were left out", end.text, re.MULTILINE):
        return "left out"
    return "another" if is_chosen else "wrong"


def cases_of(kind: Kind, count: int, seed: int, canary: str) -> Iterator[tuple[str, bool, Mutation]]:
    """`count` cases: the chosen ones first, each once, at most half of all; then random ones."""
    rng = np.random.default_rng((seed, zlib.crc32(kind.name.encode())))
    chosen = list(chosen_for(kind, canary).items())
    picked = sorted(rng.permutation(len(chosen))[: max(1, count // 2)].tolist())
    for number in picked:
        yield chosen[number][0], True, chosen[number][1]
    for _ in range(count - len(picked)):
        first = mutations.RANDOM[int(rng.integers(len(mutations.RANDOM)))]
        yield first.__name__, False, first


def fuzz(
    kinds: list[Kind], count: int, seed: int, keep: Path | None = None, report: Callable[[str], object] = print
) -> dict[str, Counter[str]]:
    """Try `count` cases of each kind; returns the outcomes by kind.

    Args:
        kinds: of files.
        count: cases of each.
        seed: of the changes.
        keep: folder for the inputs of cases that are not as they should be; None: they are deleted.
        report: called with a line of progress from time to time, and for each such case.
    """
    preload()
    outcomes = {kind.name: Counter[str]() for kind in kinds}
    results: dict[str, str] = {}
    started = told = time.monotonic()
    done, total = 0, count * len(kinds)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        root, canary = Path(temporary), f"{temporary}/canary"
        make_inputs(root / "inputs")
        for kind in kinds:
            options = OPTIONS[kind.stage] | kind.options
            unchanged = f"{kind.stage} {kind.result} {sorted(options.items())}"
            if unchanged not in results:  # several kinds are read by one command
                copy_inputs(kind, root / "inputs", root / "unchanged" / "case")
                end = run_in_process(root / "unchanged/case", lambda: run_stage(kind.stage, options), kind.result)  # noqa: B023
                if end.status != 0:
                    raise SystemExit(f"{kind.name}: the unchanged file ends with status {end.status}:\n{end.text}")
                shutil.rmtree(root / "unchanged")
                results[unchanged] = end.digest
            for number, (name, is_chosen, mutation) in enumerate(cases_of(kind, count, seed, canary)):
                rng = np.random.default_rng((seed, number, zlib.crc32(kind.name.encode()), 1))
                place = root / "cases" / "case"
                copy_inputs(kind, root / "inputs", place)
                paths = sorted(place.glob(kind.file))
                path = paths[int(rng.integers(len(paths)))]
                before = path.read_bytes()
                path.write_bytes(mutation(before, rng))
                if kind.is_part and (is_chosen or rng.random() < 0.5):
                    correct_manifest(path, place, is_chosen and name not in mutations.DAMAGED_FOOTERS)
                ended = run_in_process(place, lambda: run_stage(kind.stage, options), kind.result)  # noqa: B023
                outcome = judge(kind, ended, results[unchanged], is_chosen, place, canary)
                if path.exists() and path.read_bytes() == before and outcome == "wrong":
                    outcome = "right"
                outcomes[kind.name][outcome] += 1
                if outcome not in GOOD:
                    last = ended.text.strip().splitlines()[-1:] or [""]
                    report(f"{outcome}: {kind.name}, case {number} ({name}): {last[0][:200]}")
                    if keep is not None:
                        shutil.copytree(root / "cases", keep / f"{re.sub('[^a-z]+', '_', kind.name)}-{number}")
                shutil.rmtree(root / "cases")
                done += 1
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    rate = done / (told - started)
                    report(f"{done:,} of {total:,} cases, {rate:.1f}/s, {(total - done) / rate / 60:.0f} min left")
    return outcomes


def table(outcomes: dict[str, Counter[str]]) -> str:
    """The outcomes as text, one line per kind."""
    names = [*GOOD, *sorted({name for counts in outcomes.values() for name in counts} - {*GOOD})]
    lines = [f"{'kind of file':44}{'cases':>7}" + "".join(f"{name:>11}" for name in names)]
    for kind, counts in [*outcomes.items(), ("all", sum(outcomes.values(), Counter[str]()))]:
        lines.append(f"{kind:44}{counts.total():7,}" + "".join(f"{counts[name]:11,}" for name in names))
    return "\n".join(lines)


def main() -> int:
    """Try the cases, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="cases of each kind (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: 0)")
    parser.add_argument("--kinds", nargs="+", help="parts of the names of the kinds to try; all, if not given")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of cases that are not as they should be")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if not options.kinds or any(part in kind.name for part in options.kinds)]
    outcomes = fuzz(kinds, options.cases, options.seed, options.keep, lambda line: print(line, flush=True))
    print(table(outcomes))
    return int(bool({name for counts in outcomes.values() for name in counts} - {*GOOD}))


if __name__ == "__main__":
    sys.exit(main())
