"""Trains one of RecBole's models within its minutes: for `tools/compare_recbole.py`.

Runs in RecBole's own environment (`make recbole`):

    .venv-recbole/bin/python tools/recbole_model.py JOB.json

JOB.json is a `tools.budgeted.Job`. RecBole reads the log, makes batches, the model and its loss; what is trained on and
what is held out is this project's split, and so are ranks and metrics (`tools/budgeted.py`).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import budgeted  # noqa: E402

SOFTMAX: dict[str, Any] = {"loss_type": "CE", "train_neg_sample_args": None}
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {"embedding_size": 64},
    "GRU4Rec": {"embedding_size": 64, **SOFTMAX},
    "NARM": {"embedding_size": 64, **SOFTMAX},
    "STAMP": {"embedding_size": 64, **SOFTMAX},
    "BERT4Rec": {"hidden_size": 64, **SOFTMAX},
    "SASRec": {"hidden_size": 64, **SOFTMAX},
    "S3Rec": {"hidden_size": 64, **SOFTMAX},
}
"""Options beside RecBole's own for the architecture: 64 dimensions, softmax over all items where a model has it."""
PRETRAINED = "S3Rec"
"""The model that is pre-trained, on the attribute of the items that the log has."""
PRETRAINING_SHARE = 0.5
"""Share of the minutes of pre-training; it has no validation that could end it."""
COMMON: dict[str, Any] = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "MAX_ITEM_LIST_LENGTH": 50,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 6,
    "learning_rate": 0.001,
    "use_gpu": False,
    "save_dataset": False,
    "state": "ERROR",
}
PARTS = {"training": 0, "validation": 1, "test": 2}
"""Values of the log's column `part`; another one: neither trained on nor a target."""
USERS = 256
"""Scored at once."""


def main() -> None:
    """Train, measure, and write the result."""
    job = budgeted.Job.read(sys.argv[1])
    sys.argv = sys.argv[:1]  # RecBole reads options from it
    load = torch.load  # RecBole's files hold more than weights
    torch.load = lambda *args, **options: load(*args, **{**options, "weights_only": False})

    model = Model(job, {"train_stage": "pretrain"} if job.model == PRETRAINED else {})
    budget = budgeted.Budget(job, len(model.loaders["training"]))
    pretraining = None
    if job.model == PRETRAINED:
        pretraining = pretrain(model, budget)
        model = Model(job, {"train_stage": "finetune", "pre_model_path": pretraining.pop("file")}, model)
        budget.start("", 1.0)
    model.count_in(budget)
    result = budgeted.train(budget, model.model, model.train_epoch, model.score)
    # A check of ours, unmasked; RecBole masks the history for BPR alone, and no target in it.
    result["test_by_recbole"] = float(model.trainer._valid_epoch(model.loaders["test"])[0])
    budgeted.write_result(job, budget, model.model, result | {"options": model.settings(), "pretraining": pretraining})


def pretrain(model: "Model", budget: budgeted.Budget) -> dict[str, Any]:
    """Pre-train for its share of the minutes, or as many epochs as RecBole would; returns file, epochs and seconds."""
    budget.start("pre-training, ", PRETRAINING_SHARE)
    model.count_in(budget)
    try:
        for epoch in range(model.config["pretrain_epochs"]):
            model.train_epoch(epoch)
    except budgeted.TimeUp:
        pass
    file = f"{budget.job.scratch}/pretrained.pth"
    model.trainer.save_pretrained_model(0, file)
    return {"file": file, "epochs": budget.epochs, "seconds": budget.seconds}


class Model:
    """A model of RecBole with its data and trainer. Example: `Model(job, {}).train_epoch(0)`."""

    def __init__(self, job: budgeted.Job, options: dict[str, Any], same_data: "Model | None" = None) -> None:
        """`same_data`: a model whose data is taken, instead of reading it."""
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import ModelType, get_model, get_trainer, init_seed

        folder = Path(job.log)
        self.job, columns = job, {"inter": ["user_id", "item_id", "timestamp", "part"]}
        if job.model == PRETRAINED:
            attribute = (folder / f"{folder.name}.item").read_text().partition("\n")[0].split("\t")[1].split(":")[0]
            columns["item"] = ["item_id", attribute]
            options = {**options, "item_attribute": attribute}
        own = {"load_col": columns, "data_path": str(folder.parent), "dataset": folder.name, "seed": job.seed}
        own |= {"checkpoint_dir": f"{job.scratch}/checkpoints"}
        own |= MODELS[job.model] | job.options | options
        self.config = config = Config(model=job.model, config_dict={**COMMON, **own})
        sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        config["eval_batch_size"] = USERS if sequential else USERS * (job.items + 1)
        init_seed(config["seed"], config["reproducibility"])
        if same_data is None:
            self.dataset = dataset = create_dataset(config)
            dataset.leave_one_out = lambda group_by, leave_one_mode: split_by_part(dataset)
            self.loaders = dict(zip(PARTS, data_preparation(config, dataset), strict=True))
        else:
            self.dataset, self.loaders = same_data.dataset, same_data.loaders
        self.model = get_model(config["model"])(config, self.loaders["training"].dataset).to(config["device"])
        self.trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, self.model)
        self.train_epoch: Callable[[int], object] = lambda epoch: self.trainer._train_epoch(
            self.loaders["training"], epoch
        )

    def count_in(self, budget: budgeted.Budget) -> None:
        """Count every batch of this model in a budget, which may end the training before any."""
        calculate_loss = self.model.calculate_loss

        def counted(interaction: Any) -> Any:
            budget.tick(len(interaction))
            return calculate_loss(interaction)

        self.model.calculate_loss = counted

    @torch.no_grad()
    def score(self, split: str) -> budgeted.Scored:
        """Score all items for the users of a split, in batches."""
        ids = self.dataset.field2token_id[self.dataset.iid_field]
        columns = np.array([ids.get(str(item), -1) for item in range(self.job.items)])
        self.model.eval()
        for interaction, *_ in self.loaders[split]:
            scores = self.model.full_sort_predict(interaction).view(-1, self.dataset.item_num)[:, columns]
            scores[:, columns < 0] = -torch.inf  # items of the catalogue that the log lacks
            users = self.dataset.id2token(self.dataset.uid_field, interaction[self.dataset.uid_field].numpy())
            yield np.array([int(user) for user in users]), scores

    def settings(self) -> dict[str, Any]:
        """Every option of the model, and of its training."""
        import recbole
        import yaml

        file = Path(recbole.__file__).parent / f"properties/model/{self.job.model}.yaml"
        left_out = ("pre_model_path", "train_stage", "save_step")
        names = [name for name in yaml.safe_load(file.read_text()) if name not in left_out]
        common = ("learning_rate", "train_batch_size", "MAX_ITEM_LIST_LENGTH")
        negatives = self.config["train_neg_sample_args"]["distribution"]
        return {name: self.config[name] for name in (*names, *common)} | {"negatives": negatives}


def split_by_part(dataset: Any) -> list[Any]:
    """Training, validation and test of a dataset whose rows are targets with a column `part`."""
    part = dataset.inter_feat["part"]
    return [dataset.copy(dataset.inter_feat[part == value]) for value in PARTS.values()]


if __name__ == "__main__":
    main()
