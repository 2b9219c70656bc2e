"""What a checkpoint says of the model in it: its configuration, and the vocabulary it was trained with."""

from dataclasses import asdict, dataclass

from recgpt_torchrec.checkpoints.folder import read_metadata
from recgpt_torchrec.config import Loss, Model, Tuning


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Settings that readers of a checkpoint need before they build a model."""

    model: Model
    loss: Loss
    tuning: Tuning | None
    """None: a pre-trained model."""
    table_optimizer: str
    vocabulary: str
    """Fingerprint of the vocabulary that its ids belong to."""
    data: str
    """Folder of the dataset it was trained on."""
    hold_out: str = "last"
    """What that dataset held out of training."""

    @classmethod
    def read(cls, checkpoint: str) -> "CheckpointSettings":
        """Those of a checkpoint folder.

        Raises:
            InputError: it is not a complete checkpoint.
        """
        metadata = read_metadata(checkpoint)
        config = metadata["config"]
        return cls(
            model=Model(**config["model"]),
            loss=Loss(**config["loss"]),
            tuning=Tuning(**config["tuning"]) if "tuning" in config else None,
            table_optimizer=config["tables"]["optimizer"],
            vocabulary=metadata["vocabulary"],
            data=config["data"],
            hold_out=metadata.get("hold_out", "last"),
        )

    def other_shape(self, given: Model) -> list[str]:
        """Names of the model's options in which `given` differs; dropout may, it changes no parameter."""
        saved, other = asdict(self.model), asdict(given)
        return [name for name in saved if "dropout" not in name and saved[name] != other[name]]
