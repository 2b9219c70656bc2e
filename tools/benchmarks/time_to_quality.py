"""Time to RecBole SASRec's best validation NDCG@10 within its minutes, and time of `recgpt pretrain` to the same value.

    make recbole
    python -m tools.benchmarks.time_to_quality --data runs/beauty/data --config configs/beauty.yaml --minutes 30 \\
        --output time.json

Both with one thread, one after the other, on the same validation items of all users, ranked over the whole catalogue
with the history masked, by the same code. RecBole is validated after each epoch and where its minutes are over, ours
after each --steps steps and epoch. Two times of each: `train_s` without start and validations, `wall_s` from the start
of the process with both. Our run ends where it has reached the value. --recbole takes the result of an earlier
`tools/compare_recbole.py --threads 1` on the same dataset, with the model's own options, in the place of training it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
GOAL = 50
METRIC = "NDCG@10"


def main(arguments: list[str] | None = None) -> None:
    """Run both, write the figures and print the ratio."""
    from tools import compare_recbole
    from tools.benchmarks.measuring import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset that holds items out")
    parser.add_argument("--config", required=True, help="of recgpt pretrain")
    parser.add_argument("--minutes", type=float, default=30, help="of RecBole's training (default: 30)")
    parser.add_argument("--steps", type=int, default=40, help="of ours between validations (default: 40)")
    parser.add_argument("--layers", type=int, default=2, help="blocks of RecBole's SASRec (default: 2, its own)")
    parser.add_argument("--seed", type=int, default=0, help="of both (default: 0)")
    parser.add_argument("--recbole", metavar="FILE", help="its result on these data, instead of training it now")
    parser.add_argument("--output", required=True, help="JSON file")
    options = parser.parse_args(arguments)
    before = machine()
    with tempfile.TemporaryDirectory() as scratch:
        if options.recbole:
            result = read_result(options.recbole, options)
        else:
            words = ["--data", options.data, "--output", scratch, "--minutes", str(options.minutes)]
            words += ["--models", "SASRec", "--threads", "1", "--seed", str(options.seed)]
            theirs = compare_recbole.parse(words)
            theirs.model_options["n_layers"] = options.layers
            compare_recbole.run(theirs)
            result = json.loads((Path(scratch) / "SASRec.json").read_text())
        best = result["best"]
        of_recbole = {"value": best["masked"], "epochs": best["epochs"], "train_s": best["train_s"]}
        of_recbole["wall_s"] = result["setup_s"] + best["seconds"]
        print(f"RecBole's SASRec: {METRIC} {best['masked']:.4f} after {of_recbole['train_s']:.0f} s of training")
        command = [sys.executable, "-m", "recgpt_torchrec.pretrain", "--config", options.config, "--data", options.data]
        command += ["--output", f"{scratch}/ours", "--seed", str(options.seed), "--train.validate_every", "1"]
        command += ["--train.validate_steps", str(options.steps)]
        ours = reach(best["masked"], command, Path(scratch) / "ours")
    ratios = {name: of_recbole[name] / ours[name] for name in ("train_s", "wall_s") if ours["reached"]}
    figures = {"machine": before, "load_after": os.getloadavg()[0], "options": vars(options), "recbole": of_recbole}
    figures |= {"recbole_curve": result["curve"], "ours": ours, "ratios": ratios, "goal": GOAL}
    Path(options.output).write_text(json.dumps(figures, indent=1))
    if not ours["reached"]:
        raise SystemExit(f"ours ended at {ours['value']:.4f}, below {best['masked']:.4f}")
    print(f"ours:             {METRIC} {ours['value']:.4f} after {ours['train_s']:.1f} s of training")
    print(f"ratio {ratios['train_s']:.0f} (goal {GOAL}); with start and validations {ratios['wall_s']:.0f}")


def read_result(file: str, options: argparse.Namespace) -> dict[str, Any]:
    """Read a result of `tools/compare_recbole.py`; its minutes and batches are those of the options from then on.

    Raises:
        SystemExit: it is of another model or other data, or of several threads.
    """
    from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint

    result = json.loads(Path(file).read_text())
    settings = result["settings"]
    shape = (result["model"], result["options"].get("n_layers"), settings["seed"])
    if shape != ("SASRec", options.layers, options.seed):
        raise SystemExit(
            f"--recbole {file} is of {shape[0]} with {shape[1]} layers and seed {shape[2]}; it must be of SASRec with "
            f"{options.layers} layers (--layers) and seed {options.seed} (--seed)"
        )
    if settings["threads"] != 1:
        raise SystemExit(f"--recbole {file} was trained with {settings['threads']} threads; ours has one")
    if settings["histories"] != histories_fingerprint(Dataset.open(options.data)):
        raise SystemExit(f"--recbole {file} was trained on other histories than those of --data {options.data}")
    options.minutes = settings["minutes"]
    return dict(result)


def reach(value: float, command: list[str], output: Path) -> dict[str, Any]:
    """Run a training until its validation reaches a value, and end it there.

    Args:
        value: of masked NDCG@10.
        command: of the stage pretrain.
        output: its output folder.

    Returns:
        reached; of the validation that reached the value, or of the best one: value, epoch, step; `train_s` from the
        first step on without validations, checkpoints within; `wall_s` from the start of the process.
    """
    history = output / "history.jsonl"
    since, before, trained = time.perf_counter(), math.inf, 0.0
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    points: list[dict[str, Any]] = []
    try:
        ended = False
        while not ended and not any(point["value"] >= value for point in points):
            ended = process.poll() is not None
            now = time.perf_counter()
            if (output / "tensorboard").exists():  # made when all is ready for the first step
                before = min(before, now)
            lines = history.read_text().splitlines(keepends=True) if history.exists() else []
            for line in map(json.loads, [each for each in lines if each.endswith("\n")][len(points) :]):
                trained += now - before - line["validate_s"]
                before = now
                point = {"value": line[METRIC], **{name: line[name] for name in ("epoch", "step")}}
                points.append({**point, "train_s": trained, "wall_s": now - since})
            time.sleep(0.02)
    finally:
        process.terminate()  # at the next step it saves and ends
        process.wait()
    if not points:
        raise SystemExit(f"pretrain ended with status {process.returncode} before its first validation")
    best = next((point for point in points if point["value"] >= value), max(points, key=lambda each: each["value"]))
    return {"reached": best["value"] >= value, **best}


if __name__ == "__main__":
    main()
