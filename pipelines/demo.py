"""The whole job in minutes: synthetic log -> dataset -> training on two ranks -> evaluation -> vectors -> lists.

    python pipelines/demo.py --output runs/mine -- --input log.csv --user_column user --hold_out time --test_from 90%

Options after `--` are those of the stage prepare: then its log is used instead of the synthetic one, and evaluation is
left out where nothing is held out to measure on. A second run resumes: finished stages do no work again. `--fresh`
starts over.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipelines.experiment import from_root  # noqa: E402
from pipelines.steps import ROOT, Steps  # noqa: E402
from recgpt_torchrec.data.dataset import Manifest  # noqa: E402
from recgpt_torchrec.texts.commands import command  # noqa: E402

PATHS = ("--input", "--validation_input", "--test_input", "--vocabulary", "--scratch", "--config")
"""Options of prepare that take paths."""


def main() -> None:
    """Run every stage on a small log, and print a table of results and the output paths."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [options] [-- options of prepare, from --input on]"
    )
    parser.add_argument("--output", default="demo_output", help="output folder (default: demo_output)")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="delete the output folder of an earlier demo first")
    parser.add_argument("--config", default="configs/demo.yaml", help="of the training (default: configs/demo.yaml)")
    words, own = divide(sys.argv[1:])
    options = parser.parse_args(words)
    if own and not {"--input", "--config"} & {word.partition("=")[0] for word in own}:
        parser.error("options of prepare come after --, with its --input: -- --input log.csv --user_column user")
    output = options.output
    if options.fresh and (ROOT / output / "demo.json").exists():
        shutil.rmtree(ROOT / output)
    (ROOT / output).mkdir(parents=True, exist_ok=True)
    (ROOT / output / "demo.json").write_text(json.dumps({"made by": "pipelines/demo.py"}))

    steps = Steps("demo")
    log, data, run, vectors, lists = (f"{output}/{name}" for name in ("log.csv", "data", "run", "vectors", "lists"))
    if not own and not (ROOT / log).exists():
        steps.run("Log", ["python", "tools/synthetic_log.py", "--output", log, "--users", "5000", "--items", "1000"])
    of_log = paths_from_root(own) if own else ["--input", log]
    steps.run("Prepare", ["python", "-m", "recgpt_torchrec.prepare", *of_log, "--output", data])
    job = ["torchx", "run", "-s", "local_cwd", "recgpt_torchrec.pretrain", "-j", f"1x{options.ranks}", "--"]
    steps.run("Pretrain", [*job, "--config", options.config, "--data", data, "--output", run])
    stage = ["--data", data, "--checkpoint", run, "--output"]
    measured = Manifest.read(str(ROOT / data)).count_targets("test") != 0
    if measured:
        steps.run("Evaluate", ["python", "-m", "recgpt_torchrec.evaluate", *stage, f"{output}/test.json"])
    steps.run("Export", ["python", "-m", "recgpt_torchrec.export", *stage, vectors, "--interests", "2"])
    retrieve = ["--export", vectors, "--data", data, "--output", lists, "--k", "10"]
    steps.run("Retrieve", ["python", "-m", "recgpt_torchrec.retrieve", *retrieve])

    print(f"\n== Done in {steps.times()}\n")
    if measured:
        print(f"{table(json.loads((ROOT / output / 'test.json').read_text())['results'])}\n")
    print(f"dataset       {data}          one row per user, ids dense and random")
    print(f"checkpoint    {run}           curves: tensorboard --logdir {run}/tensorboard")
    print(f"evaluation    {output}/test.json" if measured else "evaluation    none: nothing is held out for test")
    print(f"vectors       {vectors}       items/*.parquet and users/*.parquet for an ANN index, two interests per user")
    print(f"lists         {lists}         ten new items for every user")
    print("\nTry next      your own log: see 'Your own data' in README.md")
    asked = {"checkpoint": run, "data": data, "history": ",".join(some_keys(ROOT / data)), "k": 5}
    print(f"              a list for a history: source .venv/bin/activate && {command('recommend', asked)}")


def some_keys(data: Path) -> list[str]:
    """Keys of two items of a dataset."""
    import pyarrow.parquet as pq

    part = sorted((data / "items").glob("*.parquet"))[0]
    return [str(key) for key in pq.read_table(part, columns=["key"])["key"][:2].to_pylist()]


def divide(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and those after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def paths_from_root(words: list[str]) -> list[str]:
    """Options of prepare whose paths are seen from the project's folder, where commands run."""
    option, result = "", []
    for word in words:
        option, is_option = (word, True) if word.startswith("--") else (option, False)
        result.append(from_root(word) if option in PATHS and not is_option and "://" not in word else word)
    return result


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Masked results of the model and of the baselines."""
    names = ["HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    lines = [f"{'test, masked':<16}" + "".join(f"{name:>10}" for name in names)]
    titles = {"pretrain": "this model", "cooccurrence": "co-occurrence", "popularity": "popularity"}
    for path, title in titles.items():
        lines.append(f"{title:<16}" + "".join(f"{results[path]['masked'][name]:>10.4f}" for name in names))
    best = max(results[path]["masked"]["NDCG@10"] for path in ("cooccurrence", "popularity"))
    lines.append(
        f"\nNDCG@10 is {results['pretrain']['masked']['NDCG@10'] / best:.1f} times that of the better baseline."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
