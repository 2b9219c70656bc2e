"""Makes an export or a delta: what is asked for, whether it lies there already, encoding users, and writing."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.checkpoints.folder import checkpoint_fingerprint
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.checkpoints.trained import Trained
from recgpt_torchrec.config import Export
from recgpt_torchrec.config.fields import changeable_names, default_values
from recgpt_torchrec.data.dataset import Dataset, histories_fingerprint
from recgpt_torchrec.data.inputs.events import check_asked
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.inputs.spec import Inputs
from recgpt_torchrec.data.inputs.time_units import choose_request_time
from recgpt_torchrec.data.stream import encoding_stream
from recgpt_torchrec.distributed.processes import rank, world_size
from recgpt_torchrec.distributed.watchdog import report_phase
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.progress import progress_bar
from recgpt_torchrec.retrieval.encoding import collect_batches, encode
from recgpt_torchrec.retrieval.exports.chain import Chain, open_chain
from recgpt_torchrec.retrieval.exports.manifest import DeltaManifest, ExportManifest
from recgpt_torchrec.retrieval.exports.reading import open_delta, open_export
from recgpt_torchrec.retrieval.exports.writing import write_delta, write_export
from recgpt_torchrec.retrieval.interests import predict_interests
from recgpt_torchrec.storage.finished import differences, find_finished, flatten

AnyManifest = ExportManifest | DeltaManifest


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an export is asked for."""

    config: Export
    dataset: Dataset
    checkpoint: str
    """Its folder."""
    fingerprint: str
    """Of the checkpoint."""
    inputs: Inputs
    """What its model reads."""
    request: Request
    """What the vectors are made for."""
    chain: Chain | None
    """What a delta is compared with; None: an export is asked for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The options as the manifest records them, and what else identifies an export."""

    @classmethod
    def of(cls, config: Export, dataset: Dataset, checkpoint: str) -> "Asked":
        """What the options ask for (collective).

        Raises:
            InputError: the model cannot be asked for it, or it does not fit the export of `--since`.
        """
        settings = {**asdict(config), "checkpoint": checkpoint}
        del settings["index"], settings["encoder"]  # no part of what identifies an export
        inputs, request = CheckpointSettings.read(checkpoint).inputs, Request()
        if config.history == "all":
            request = Request(time=choose_request_time(config.time, inputs, checkpoint, dataset))
        elif dataset.manifest.hold_out != "last":
            settings["hold_out"] = dataset.manifest.hold_out
        settings["time"] = request.time
        if config.event is not None:
            check_asked(inputs, checkpoint, "--event", config.event)
            request = replace(request, event=inputs.id_of_event(config.event))
        fingerprint = checkpoint_fingerprint(checkpoint)
        chain = open_chain(config.since) if config.since else None
        if chain is not None:
            form = {name: getattr(config, name) for name in ("dtype", "interests", "history", "event")}
            chain.check_fits(dataset, **form, hold_out=settings.get("hold_out", "last"))
        return cls(
            config=config,
            dataset=dataset,
            checkpoint=checkpoint,
            fingerprint=fingerprint,
            inputs=inputs,
            request=request,
            chain=chain,
            settings=settings,
        )

    def find_finished(self) -> AnyManifest | None:
        """The manifest of the finished export or delta in the output folder; None if there is none yet.

        Raises:
            InputError: the folder holds something else, or a result of another checkpoint, dataset or other options.
        """
        inputs = {
            "vocabulary": self.dataset.manifest.vocabulary,
            "dataset_fingerprint": histories_fingerprint(self.dataset),
            "checkpoint_fingerprint": self.fingerprint,
        }
        if self.chain is not None:
            inputs["base"] = self.chain.state

        def compare(manifest: AnyManifest) -> list[str]:
            recorded = {name: getattr(manifest, name) for name in inputs}
            found = {**flatten(default_values(self.config)), **flatten(manifest.settings), **recorded}
            return differences(found, {**self.settings, **inputs}, changeable_names(Export))

        output = self.config.output
        if self.chain is None:
            return find_finished(output, "export", lambda path: open_export(path).manifest, compare)
        return find_finished(output, "delta", lambda path: open_delta(path).manifest, compare)

    def write(self, trained: Trained, device: torch.device) -> AnyManifest:
        """Encode all users and write their vectors and those of the items, or what changed (collective)."""
        config, dataset = self.config, self.dataset
        report_phase("encoding items and users")
        catalogue = Catalogue.of_model(unwrapped(trained.model), dataset.manifest.items, device)
        absent = dataset.manifest.preparation.get("extends", {}).get("absent_users", 0)
        shared: dict[str, Any] = {
            "items": catalogue.share(),
            "users": self._encode_users(trained, catalogue, device),
            "everyone": config.history == "all" and not absent and not self.inputs.history_events,
            "checkpoint": self.checkpoint,
            "checkpoint_fingerprint": self.fingerprint,
            "settings": self.settings,
            "repeat_bias": trained.repeat_bias,
        }
        if self.chain is None:
            form: dict[str, Any] = {"interests": config.interests, "dtype": config.dtype}
            return write_export(config.output, dataset, dim=trained.config.dim, **form, **shared)
        self.chain.check_fits(dataset, dim=trained.config.dim)
        return write_delta(config.output, dataset, chain=self.chain, tolerance=config.tolerance, **shared)

    def _encode_users(
        self, trained: Trained, catalogue: Catalogue, device: torch.device
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids [n] and vectors [n, dim], or [n, interests, dim], of this rank's users."""
        config, manifest, steps = self.config, self.dataset.manifest, self.config.interests - 1
        stream = encoding_stream(
            self.dataset,
            config.history,
            trained.config,
            config.batch,
            trained.prompts,
            grows=steps,
            item_keys=unwrapped(trained.model).item_keys,
            feedback=trained.feedback,
            inputs=trained.inputs,
            attributes=trained.attributes,
            request=self.request,
        )
        with progress_bar(manifest.users if rank() == 0 else None, "users", active=rank() == 0) as bar:
            batches = encode(trained.model, stream, device)
            for collected in collect_batches(batches, catalogue.rows_per_pass if steps else None):
                ids = np.concatenate([histories.users for histories, _ in collected])
                vectors = torch.cat([vectors for _, vectors in collected])
                if steps:
                    vectors = predict_interests(trained.model, stream.maker, collected, catalogue, config.interests)
                bar.update(min(ids.size * world_size(), manifest.users - bar.n))
                yield ids, vectors.cpu().numpy()
