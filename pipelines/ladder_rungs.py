"""The choices that lead from the paper's settings to ours, in order, and the options that each of them takes."""

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.experiment import uses_neighbours
from pipelines.steps import ROOT
from recgpt_torchrec import cli, config
from recgpt_torchrec.storage.finished import flatten

ORIGINAL = "original"
NEIGHBOURS = "NEIGHBOURS"


@dataclass(frozen=True)
class Rung:
    """A choice of ours, added to those before it."""

    name: str
    meaning: str
    options: tuple[str, ...] = ()
    """Options that it takes from ours: dotted names, or groups of them."""


PRETRAIN = (
    Rung(ORIGINAL, "the paper's settings: binary cross-entropy, Adam, batches of 256 users"),
    Rung("width", "vectors of 64 instead of 256, as in the comparisons of the field", ("model.dim",)),
    Rung("loss", "softmax over all items", ("loss",)),
    Rung("history_in", "mean of the history at the input", ("model.history_in",)),
    Rung("history_out", "decaying mean of the history at the output", ("model.history_out",)),
    Rung("output_map", "linear map of the output", ("model.output_map",)),
    Rung(
        "decoder",
        "GELU, scores over sqrt(d / heads), wider feed-forward layer, norm at the input",
        ("model.activation", "model.attention_scale", "model.feed_forward", "model.norm_in"),
    ),
    Rung("dropout", "more dropout, of attention too", ("model.dropout", "model.attention_dropout")),
    Rung(
        "users",
        "user vectors start at 0, learn slowly and are dropped at random",
        ("model.user_dropout", "tables.user_lr", "tables.user_init_std"),
    ),
    Rung("thinning", "entries of histories left out at random", ("batch.thinning", "batch.thinned")),
    Rung("neighbours", "part of each target's weight on items that follow those of the history", ("neighbours",)),
    Rung("windows", "histories longer than the model reads whole, in windows", ("batch.long_histories",)),
    Rung("batch", "smaller batches, by tokens", ("batch",)),
    Rung("optimizer", "row-wise Adagrad of the tables; warm-up and cosine decay", ("tables", "optimizer")),
    Rung("length", "epochs, validation and early stopping", ("train",)),
    Rung("rest", "all other options", ("",)),
)
TUNE = (
    Rung(ORIGINAL, "the paper's settings, from the model above: loss at the last item"),
    Rung("targets", "loss at every interaction, which predicts the next", ("tuning.targets", "tuning.predict_from")),
    Rung("windows", "histories longer than the model reads whole, in windows", ("batch.long_histories",)),
    Rung("batch", "smaller batches, by tokens", ("batch",)),
    Rung("optimizer", "row-wise Adagrad of the tables; warm-up and cosine decay", ("tables", "optimizer")),
    Rung("length", "epochs and early stopping", ("train",)),
    Rung("soft_targets", "part of each target's weight on the model's own answers", ("tuning.soft_targets",)),
    Rung("rest", "all other options", ("",)),
)
STAGES: dict[str, tuple[type, tuple[Rung, ...], tuple[str, ...]]] = {
    "pretrain": (config.Pretrain, PRETRAIN, ("pretrain",)),
    "prompt_tune": (config.PromptTune, TUNE, ("recgpt_1", "recgpt")),
}
"""Of each stage its configuration, its rungs, and the paths that measure it."""


@dataclass(frozen=True)
class Step:
    """A rung on one data set: the options of ours that it adds."""

    rung: Rung
    added: dict[str, Any]


def climb(kind: type, rungs: tuple[Rung, ...], original: str, ours: str) -> list[Step]:
    """The rungs from one configuration file to another, each with what it adds; one that adds nothing is left out.

    Args:
        kind: configuration of the stage.
        rungs: in order, the original first.
        original, ours: configuration files, relative to the project.
    """
    first, last = (read_options(kind, file) for file in (original, ours))
    left = {name: value for name, value in last.items() if value != first[name]}
    steps = []
    for rung in rungs:
        added = {name: left.pop(name) for name in list(left) if takes(rung, name)}
        if added or rung.name == ORIGINAL:
            steps.append(Step(rung, added))
    return steps


def takes(rung: Rung, name: str) -> bool:
    """Whether a rung takes an option."""
    return any(not option or name == option or name.startswith(f"{option}.") for option in rung.options)


def read_options(kind: type, file: str) -> dict[str, Any]:
    """All options of a configuration file by dotted name, defaults included; the path of neighbours, where it trains
    with them, is `NEIGHBOURS`."""
    words = ["--config", str(ROOT / file), "--data", "", "--output", ""]
    words += ["--checkpoint", ""] if kind is config.PromptTune else []
    options = flatten(asdict(cli.parse(kind, "ladder", words)))
    options.pop("preset")
    return options | ({"neighbours.path": NEIGHBOURS} if uses_neighbours(file) else {})
