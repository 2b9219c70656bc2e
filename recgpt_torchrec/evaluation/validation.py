"""Validation during training: ranks held-out items among the whole catalogue."""

from collections.abc import Callable

import torch
from torch import nn

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.checkpoints.repeat_bias import NAME
from recgpt_torchrec.config import Batch, Model, Train
from recgpt_torchrec.config.metric import UNMASKED, Metric
from recgpt_torchrec.data.inputs.events import request_for
from recgpt_torchrec.data.stream import SequenceStream, encoding_stream
from recgpt_torchrec.distributed.processes import log_message
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.evaluation.held_out import check_has_event, check_has_targets
from recgpt_torchrec.evaluation.ranking import measure_ranks
from recgpt_torchrec.evaluation.repeats.sample import RepeatSample
from recgpt_torchrec.evaluation.sampling import check_sample, choose_users
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.retrieval.encoding import encode

KS = (5, 10)
"""Lengths of the lists that are measured beside those of `train.metric`."""
TOLD = 0.1
"""Share of the users with an item of their own history held out from which a masked metric is worth a line."""


def validation_of(
    training: SequenceStream,
    model: Model,
    batch: Batch,
    device: torch.device,
    train: Train,
    event: str | None = None,
) -> Callable[[nn.Module], "Validation"] | None:
    """A function from a model to its `Validation`, on the histories of a training stream.

    The function is collective, and is called once the run's folder is there: a sample of users is read then, and
    damaged rows are listed in that folder.

    With `event` only users whose validation item is of this type are ranked, and it is what is asked for.

    None: the dataset has no validation part, or is a day without a validation item, so the whole run is trained.

    Raises:
        InputError: it should have one, but no user has a validation item; or `train` asks for more than it has.
    """
    reader = training.maker.reader
    dataset = reader.dataset
    if not dataset.manifest.has_validation:
        for name in ("validate_steps", "validate_users"):
            if value := getattr(train, name):
                raise InputError(
                    f"--train.{name} is {value:,}, but {dataset.path} holds nothing out for validation (--hold_out "
                    f"{dataset.manifest.hold_out}). Leave the option out, or prepare the log with --hold_out last or "
                    "time"
                )
        if event is not None:
            raise InputError(
                f"--events.validate is {event}, but {dataset.path} holds nothing out for validation; leave it out"
            )
        return None
    if dataset.manifest.day is not None and not dataset.manifest.count_targets("validation"):
        return None  # a day may have too few interactions; later ones hold some out
    check_has_targets(
        dataset,
        "validation",
        "To train on everything for a fixed number of epochs, prepare the log with --hold_out none",
    )
    check_sample("--train.validate_users", train.validate_users, dataset, "validation")
    request = request_for(dataset, reader.inputs, "--events.validate", event)
    check_has_event(dataset, "validation", reader.inputs, request, reader.set_aside)
    item_keys = training.maker.capacity.item_keys

    def of_model(built: nn.Module) -> Validation:
        sample = choose_users(
            dataset,
            "validation",
            train.validate_users,
            seed=training.maker.seed,
            set_aside=reader.set_aside,
            inputs=reader.inputs,
            request=request,
        )
        stream = encoding_stream(
            dataset,
            "validation",
            model,
            batch,
            prompts=reader.prompts,
            feedback=reader.feedback,
            set_aside=reader.set_aside,
            item_keys=item_keys,
            sample=sample,
            inputs=reader.inputs,
            attributes=training.maker.attributes,
            request=request,
        )
        return Validation(built, stream, device, Metric.parse(train.metric))

    return of_model


class Validation:
    """Callable that measures a model on the validation split (collective).

    Example: `trainer.fit(Validation(model, stream, device, Metric.parse("NDCG@10")))`
    """

    def __init__(self, model: nn.Module, stream: SequenceStream, device: torch.device, metric: Metric) -> None:
        self.model, self.stream, self.device, self.metric = model, stream, device, metric
        self._told = False

    def __call__(self) -> dict[str, float]:
        """Masked HR and NDCG at 5, 10 and the metric's k over all users with a validation item, or over the sample of
        them; the repeat bias that is fitted on them; and where the metric is unmasked, such figures with that bias."""
        self.model.eval()
        items = self.stream.dataset.manifest.items
        catalogue = Catalogue.of_model(unwrapped(self.model), items, self.device)
        repeats = RepeatSample(seed=self.stream.maker.seed)
        ks = tuple(dict.fromkeys((*KS, self.metric.k)))
        _, results = measure_ranks(encode(self.model, self.stream, self.device), catalogue, ks, repeats=repeats)
        figures, bias = results["masked"], repeats.fit(catalogue)
        self._tell(repeats.share)
        if not self.metric.masked:
            unmasked = repeats.measure(catalogue, bias, ks)
            figures |= {f"{UNMASKED}{name}": value for name, value in unmasked.items()}
        return {**figures, NAME: bias}

    def _tell(self, share: float) -> None:
        """Say once where the metric leaves out what many users take; `share` of them have had their held-out item."""
        if self.metric.masked and share >= TOLD and not self._told:
            log_message(
                f"Validation: the held-out item of {share:.0%} of the users is in their history, so masked lists lack "
                f"it. To choose the checkpoint by lists that may have it: --train.metric {UNMASKED}{self.metric.figure}"
            )
            self._told = True
