"""The rule of `--preset auto`: statistics of a dataset in, options with reasons out. It knows of no data set's name.

The constants are chosen for logs like Amazon's Beauty, Toys and Video Games (109 to 159 thousand training targets of
10.7 to 12.1 thousand items) and MovieLens 100k (96 thousand of 1.3); what it says of larger logs is extrapolated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEASURED_TARGETS = 131_413
"""Training targets of Beauty, on which most was tried."""
DEEP_TARGETS = 2_000_000
"""Training targets from which on there are two decoder blocks."""
DENSE = 30
"""Training targets per item from which on a log is dense, of which more blocks and epochs learn more. On MovieLens 100k
validation NDCG@10 is .1194 with one block and 17 epochs, .1213 with two blocks, .1234 with 30 epochs, .1240 with both;
two blocks were no better on Beauty, and worse on Toys (configs/beauty.yaml)."""
DROPOUT = ((DENSE, 0.5), (100, 0.3), (math.inf, 0.2))
"""Dropout where there are fewer training targets per item than this: 9 to 15 in Amazon's, 72 in MovieLens 100k."""
USER_DROPOUT = 0.5
MAX_LEN, COVERED = (50, 100, 200), 0.95
"""Lengths of histories to choose from, and the share of the histories that should be no longer. If more are, whole
histories are trained, in windows: validation NDCG@10 of MovieLens 100k, three seeds, the newest 200 alone .1226,
windows .1287; one seed with 50 .1166, .1295. Not from a teacher's answers, which follow the newest items alone: 200
.1307, .1254, windows .1227, .1202; 50 .1327, windows .1242."""
THINNING = 0.3
"""Share of the histories that are thinned, and of their entries that are left out: validation NDCG@10 of Beauty .0728
and .0740, of Toys .0775 and .0787, of MovieLens 100k .1214 and .1231 with .4 of half of them and output_map."""
ALL_ITEMS = 30_000
"""Items up to which each target is scored against all of them."""
ITEMS_PER_NEGATIVE, MAX_NEGATIVES = 4, 32_768
"""Negatives of larger catalogues: one for so many items, and at most so many."""
STEP_TOKENS, STEP_TOKENS_POWER, STEP_MULTIPLE = 768, 0.5, 64
"""Tokens of a step over all ranks for a log of `MEASURED_TARGETS`, by which power of the targets they grow for a larger
one, and the number that they are a multiple of. A smaller log takes as many steps of an epoch: fewer cost quality, see
`config.defaults.STEPS`."""
FEWEST_STEP_TOKENS = 128
"""A step of fewer takes as long."""
EPOCHS, EPOCHS_POWER, MAX_EPOCHS, DENSE_EPOCHS = 16, 0.25, 24, 1.75
"""Epochs of a log of `MEASURED_TARGETS`, by which power of its targets they fall, their maximum, and how many times as
many a dense log takes."""
TUNED_EPOCHS = 0.5
"""Epochs of prompt-tuning, as a share of those of pre-training: after 24, 8 were better than 5 and 14 on Beauty."""
TUNED_RATES = ((0.02, 0.002, 0.001), (0.005, 0.0005, 0.0003))
"""Learning rates of prompt-tuning (item and output tables, users, decoder), and those on a dense log. On MovieLens 100k
validation NDCG@10 is .1271 with the first and .1317 with the second ones (K = 1), .1244 and .1246 without prompts;
pre-trained .1258. On Beauty .005 was worse, see configs/paper_tune.yaml."""
VALIDATIONS = 8
"""Number of validations of a run."""
SAMPLED = tuple(f"loss.{name}" for name in ("negatives", "negatives_by", "negatives_across_ranks", "bce_negatives"))
"""Options with which candidates are not all items."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the rule reads of a dataset."""

    users: int
    items: int
    interactions: int
    targets: float
    """Training targets: tokens of an epoch without prompts."""
    entries: int
    """Entries that are read: interactions, and prompts where there are any."""
    lengths: Mapping[str, float] = field(default_factory=dict)
    """Interactions per user: at `90%`, `99%` and so on of the users; empty: not recorded."""

    @property
    def per_item(self) -> float:
        """Training targets per item."""
        return self.targets / max(1, self.items)

    def length_at(self, share: float) -> float | None:
        """The length that a share of the histories, from .9 to .99, does not exceed; None: it is not known.

        Between the two that are recorded the share of longer histories is taken to fall as a power of the length.
        """
        if not {"90%", "99%"} <= self.lengths.keys():
            return None
        low, high = (max(1.0, self.lengths[name]) for name in ("90%", "99%"))
        return float(low * (high / low) ** math.log10(0.1 / (1 - share)))


@dataclass(frozen=True)
class Choice:
    """An option that is chosen."""

    name: str
    value: Any
    reason: str
    """In words that follow the value."""
    yields_to: tuple[str, ...] = ()
    """Other options with which it is not chosen, where they are given."""


def choose(
    statistics: Statistics, tuned: bool = False, epochs: int | None = None, max_len: int | None = None
) -> list[Choice]:
    """The options that the statistics of a dataset choose.

    Args:
        statistics: of the dataset.
        tuned: for prompt-tuning, whose model is the checkpoint's: its options are not chosen.
        epochs: those that are given, over which validations are spread; None: none are given.
        max_len: maximum length of a history that is given, by which longer ones are cut; None: none is given.
    """
    model = [] if tuned else [*_choose_model(statistics), *_choose_histories(statistics, max_len)]
    length = _choose_length(statistics, tuned, epochs)
    own = _choose_rates(statistics) if tuned else _choose_thinning()
    return [*model, *own, *_choose_loss(statistics), *_choose_steps(statistics), *length]


def _choose_model(statistics: Statistics) -> list[Choice]:
    targets, per_item = statistics.targets, statistics.per_item
    deep = targets >= DEEP_TARGETS or per_item >= DENSE
    dropout = next(value for limit, value in DROPOUT if per_item < limit)
    counted = f"since there are {per_item:,.1f} training targets per item ({targets:,.0f} of {statistics.items:,})"
    everywhere = "as on logs of any size"
    size = f"{targets:,.0f} training targets, {per_item:,.1f} per item"
    return [
        Choice("model.output_map", True, everywhere),
        Choice("model.history_in", True, everywhere),
        Choice("model.history_out", True, everywhere),
        Choice("model.layers", 1 + deep, f"since there are {size}; two from {DEEP_TARGETS:,} on, or {DENSE} per item"),
        Choice("model.dropout", dropout, counted),
        Choice("model.attention_dropout", dropout, counted),
        Choice("model.user_dropout", USER_DROPOUT, everywhere),
    ]


def _choose_histories(statistics: Statistics, given: int | None) -> list[Choice]:
    length = statistics.length_at(COVERED)
    if length is None:
        return []
    longest = next((each for each in MAX_LEN if length <= each), MAX_LEN[-1])
    reason = f"since about {COVERED:.0%} of the histories have at most {length:,.0f} interactions"
    reason += f"; no longer length is chosen than {longest}" if length > longest else ""
    choices = [Choice("model.max_len", longest, reason)]
    if length > (read := given or longest):
        reason = f"since about {1 - COVERED:.0%} of the histories have more than {length:,.0f} interactions: those "
        reason += f"before the newest {read} are targets too"
        choices.append(Choice("batch.long_histories", "windows", reason, ("soft_targets",)))
    return choices


def _choose_thinning() -> list[Choice]:
    reason = "as on logs of any size"
    return [Choice(f"batch.{name}", THINNING, reason) for name in ("thinning", "thinned")]


def _choose_rates(statistics: Statistics) -> list[Choice]:
    per_item = statistics.per_item
    rates = TUNED_RATES[per_item >= DENSE]
    reason = f"since there are {per_item:,.1f} training targets per item; a dense log, from {DENSE} on, is tuned gently"
    names = ("tables.lr", "tables.user_lr", "optimizer.lr")
    return [Choice(name, value, reason) for name, value in zip(names, rates, strict=True)]


def _choose_loss(statistics: Statistics) -> list[Choice]:
    items = statistics.items
    if items <= ALL_ITEMS:
        reason = f"since {items:,} items are few: each target is scored against all of them, which costs as much as "
        return [Choice("loss.candidates", "all", f"{reason}{items:,} negatives", (*SAMPLED, "tables.shard_ranks"))]
    negatives = min(MAX_NEGATIVES, items // ITEMS_PER_NEGATIVE)
    reason = f"since {items:,} items are too many to score each target against all of them"
    share = f"one for each {items / negatives:,.0f} items"
    return [
        Choice("loss.candidates", "sampled", reason),
        Choice("loss.negatives", negatives, share),
    ]


def _choose_steps(statistics: Statistics) -> list[Choice]:
    targets = max(1.0, statistics.targets)
    size = targets / MEASURED_TARGETS
    wanted = STEP_TOKENS * (size if size < 1 else size**STEP_TOKENS_POWER)
    tokens = max(FEWEST_STEP_TOKENS, round(wanted / STEP_MULTIPLE) * STEP_MULTIPLE)
    steps = math.ceil(targets / tokens)
    tokens = math.ceil(tokens * max(1.0, statistics.entries / max(1, statistics.interactions)))  # with its prompts
    reason = f"over all ranks, about {steps:,} steps of an epoch, since the log has {targets:,.0f} training targets"
    return [Choice("batch.step_tokens", tokens, reason, ("batch.tokens", "batch.users"))]


def _choose_length(statistics: Statistics, tuned: bool, given: int | None) -> list[Choice]:
    targets = max(1.0, statistics.targets)
    wanted = min(MAX_EPOCHS, EPOCHS * (MEASURED_TARGETS / targets) ** EPOCHS_POWER) * (TUNED_EPOCHS if tuned else 1)
    longer = statistics.per_item >= DENSE and not tuned
    epochs = max(1, round(wanted * (DENSE_EPOCHS if longer else 1)))
    every = max(1, round((given or epochs) / VALIDATIONS))
    why = f"since the log has {targets:,.0f} training targets, and a larger one needs fewer epochs"
    why += f"; more, since these are {statistics.per_item:,.1f} per item" * longer
    spread = "after each epoch, since these are few"
    if every > 1:
        spread = f"for about {VALIDATIONS} validations in {given or epochs} epochs"
    return [
        Choice("train.epochs", epochs, why, ("train.steps",)),
        Choice("train.patience", 0, "since the learning rate falls until the end of the run"),
        Choice("train.validate_every", every, spread, ("train.steps",)),
    ]
