"""Stage `run`: a raw log -> lists for all users, by the stages one after the other; a second run resumes."""

import importlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from recgpt_torchrec import cli
from recgpt_torchrec.config.fields import options as options_of
from recgpt_torchrec.config.serving.run import SET_FOR_ALL, RunAll, stage_config
from recgpt_torchrec.config.stages import STAGES, module_of
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.texts.commands import holds_command, next_line, run_goes_on


def main(config: RunAll) -> None:
    """Run every stage that is asked for; each leaves alone what is there already."""
    from recgpt_torchrec import storage
    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.data.neighbours.folder import open_neighbours

    begun, done, steps = time.perf_counter(), f"{config.output}/steps.json", list(plan_steps(config))
    earlier = storage.read_json(done) or {}
    fresh = False
    for number, (name, options) in enumerate(steps, 1):
        output = options["output"]
        print(f"\n--- {number} of {len(steps)}: {name} -> {output}", flush=True)
        started = time.perf_counter()
        if name == "retrieve":  # a small catalogue is listed as a whole
            options["k"] = min(config.k, Dataset.open(options["data"]).manifest.items)
        built = stage_config(STAGES[name].config, config, name, **options)
        record, key = asdict(built), os.path.basename(output)
        if name == "evaluate" and Dataset.open(options["data"]).manifest.count_targets("test") == 0:
            print("Left out: nobody's interactions are enough to hold one out as a test item")
        else:
            existed = storage.exists(output)
            try:
                # evaluate, unlike the others, computes again what is there.
                if name == "evaluate" and built.neighbours.path is not None:  # the folder may have been made anew
                    found = open_neighbours(built.neighbours.path, Dataset.open(options["data"]))
                    record["neighbours"]["fingerprint"] = found.fingerprint
                if name == "evaluate" and not fresh and existed and earlier.get(key) == record:
                    print(f"Already there: {output}")
                else:
                    with run_goes_on() if number < len(steps) else nullcontext():
                        importlib.import_module(module_of(name)).main(built)
            except InputError as error:
                raise InputError(f"{name}: {name_options(str(error), name, STAGES[name].config)}") from None
            fresh = fresh or not existed or earlier.get(key) != record
            earlier[key] = record
            storage.make_folder(config.output)
            storage.write_json(done, earlier)
        print(f"--- {name} took {time.perf_counter() - started:.1f} s", flush=True)
    model = f"{config.output}/{'tuned' if config.second_stage else 'model'}"
    data = f"{config.output}/{'prompts' if config.second_stage else 'data'}"
    state = "Written" if fresh else "Already there"
    print(f"\n{state}: {config.output}/lists, in {time.perf_counter() - begun:.1f} s")
    print(next_line("recommend", {"checkpoint": model, "data": data, "history": example_history(data)}))


def example_history(data: str) -> str:
    """Keys of two items of a dataset, as `recommend --history` takes them."""
    import numpy as np

    from recgpt_torchrec.data.dataset import Dataset
    from recgpt_torchrec.retrieval.exports.keys import Keys

    dataset = Dataset.open(data)
    keys = Keys(dataset, "items").of(np.arange(min(2, dataset.manifest.items))).to_pylist()
    return ",".join(str(key) for key in keys if "," not in str(key)) or "ITEM_KEY"


def name_options(message: str, stage: str, config_class: type) -> str:
    """A stage's message with its options as `run` calls them: --user_column is --prepare.user_column. One that gives a
    command of its own is left as it is."""
    if holds_command(message):
        return message
    names = {option.name for option in options_of(config_class)} - {*SET_FOR_ALL}
    return re.sub(r"--([\w.]*\w)", lambda found: f"--{stage}.{found[1]}" if found[1] in names else found[0], message)


def plan_steps(config: RunAll) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each stage's name, and the options that it gets from the runner."""
    folder, device = config.output, {"device": config.device}
    data, model = f"{folder}/data", f"{folder}/model"
    yield "prepare", {"input": config.input, "output": data}
    yield "pretrain", {"data": data, "output": model, **device}
    holds_out = config.prepare.hold_out != "none"
    if holds_out:
        yield "evaluate", {"data": data, "checkpoint": model, "output": f"{folder}/test.json", **device}
    if config.second_stage:
        prompts, tuned = f"{folder}/prompts", f"{folder}/tuned"
        yield "generate_prompts", {"data": data, "checkpoint": model, "output": prompts, **device}
        yield "prompt_tune", {"data": prompts, "checkpoint": model, "output": tuned, **device}
        data, model = prompts, tuned
        if holds_out:
            yield "evaluate", {"data": data, "checkpoint": model, "output": f"{folder}/tuned_test.json", **device}
    vectors = f"{folder}/vectors"
    made = {"data": data, "checkpoint": model, "output": vectors, "interests": config.interests}
    yield "export", {**made, **device}
    yield "retrieve", {"export": vectors, "data": data, "output": f"{folder}/lists", "k": config.k}


if __name__ == "__main__":
    cli.run(RunAll, main, "recgpt_torchrec.run")
