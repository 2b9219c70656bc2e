"""Trains one of RecBole's models on a log for some minutes and writes its scores: for `tools/compare_recbole.py`.

Runs in RecBole's own environment (`make recbole`), so it imports nothing of this project:

    .venv-recbole/bin/python tools/recbole_model.py JOB.json

JOB.json: {"model", "log" (folder with log.inter), "users", "items", "minutes", "seed", "threads", "scores", "result"}.
Items and users are numbers from 0 on. Written are SCORES, [users, items] float32 for the history before each user's
last item, with NaN in the rows of users without one, and RESULT as JSON: seconds, epochs, the validation curve, and
NDCG@10 on test as RecBole measures it (which masks the history for BPR alone).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ATTENTION = {"hidden_size": 64, "inner_size": 256, "n_layers": 1, "n_heads": 2}
SOFTMAX = {"loss_type": "CE", "train_neg_sample_args": None}
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {"embedding_size": 64},
    "GRU4Rec": {"embedding_size": 64, "hidden_size": 64, "num_layers": 1, **SOFTMAX},
    "NARM": {"embedding_size": 64, "hidden_size": 64, **SOFTMAX},
    "STAMP": {"embedding_size": 64, **SOFTMAX},
    "BERT4Rec": {**ATTENTION, **SOFTMAX},
    "SASRec": {**ATTENTION, **SOFTMAX},
}
"""Options beside RecBole's defaults: 64 dimensions, one block, softmax over all items where the model has it."""
COMMON: dict[str, Any] = {
    "dataset": "log",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "MAX_ITEM_LIST_LENGTH": 50,
    "epochs": 10**6,
    "stopping_step": 10,
    "learning_rate": 0.001,
    "train_batch_size": 2048,
    "use_gpu": False,
    "show_progress": False,
    "save_dataset": False,
    "state": "ERROR",
}
USERS = 256
"""Scored at once."""


class TimeUp(Exception):
    """The minutes are over."""


def main() -> None:
    """Train, score, and write both."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    load = torch.load
    torch.load = lambda *args, **options: load(*args, **{**options, "weights_only": False})
    sys.argv = sys.argv[:1]  # RecBole reads options from it

    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import ModelType, get_model, get_trainer, init_seed

    folder = Path(job["log"])
    own = {"data_path": str(folder.parent), "checkpoint_dir": str(folder / "checkpoints"), "seed": job["seed"]}
    config = Config(model=job["model"], config_dict={**COMMON, **MODELS[job["model"]], **own, "dataset": folder.name})
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    config["eval_batch_size"] = USERS if sequential else USERS * (job["items"] + 1)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)

    began = time.perf_counter()
    curve: list[dict[str, Any]] = []
    deadline, calculate_loss = began + 60 * job["minutes"], model.calculate_loss

    def until_time_is_up(interaction: Any) -> Any:
        if time.perf_counter() > deadline:
            raise TimeUp
        return calculate_loss(interaction)

    model.calculate_loss = until_time_is_up
    best: dict[str, Any] = {"value": -1.0, "state": None}

    def keep_best(epoch: int, value: float) -> None:
        curve.append({"epoch": epoch + 1, "seconds": time.perf_counter() - began, "NDCG@10": float(value)})
        if value > best["value"]:
            best.update(value=float(value), state={name: each.clone() for name, each in model.state_dict().items()})

    stopped = "early"
    try:
        trainer.fit(train, valid, saved=False, verbose=False, callback_fn=keep_best)
    except TimeUp:
        stopped = "minutes"
        seconds = time.perf_counter() - began
        keep_best(curve[-1]["epoch"] if curve else 0, trainer._valid_epoch(valid)[0])
        curve[-1]["seconds"] = seconds  # without this last validation
    model.load_state_dict(best["state"])
    write_scores(model, dataset, test, job)
    result = {
        "model": job["model"],
        "stopped": stopped,
        "train_s": curve[-1]["seconds"],
        "epochs": curve[-1]["epoch"] - (stopped == "minutes"),
        "validation": best["value"],
        "test_by_recbole": float(trainer._valid_epoch(test)[0]),
        "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": MODELS[job["model"]],
    }
    Path(job["result"]).write_text(json.dumps(result, indent=1))


@torch.no_grad()
def write_scores(model: Any, dataset: Any, test: Any, job: dict[str, Any]) -> None:
    """Write the scores of all items for every user with a test item, by this project's numbers."""
    shape = (job["users"], job["items"])
    scores = np.lib.format.open_memmap(job["scores"], mode="w+", dtype=np.float32, shape=shape)
    scores[:] = np.nan
    columns = dataset.token2id(dataset.iid_field, [str(item) for item in range(job["items"])])
    model.eval()
    for interaction, *_ in test:
        of_users = model.full_sort_predict(interaction).view(-1, dataset.item_num)
        users = dataset.id2token(dataset.uid_field, interaction[dataset.uid_field].numpy())
        scores[np.array([int(user) for user in users])] = of_users[:, columns].numpy()
    scores.flush()


if __name__ == "__main__":
    main()
