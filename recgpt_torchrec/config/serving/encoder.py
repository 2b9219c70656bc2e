"""Options of the encoder that export writes for serving."""

from dataclasses import dataclass
from typing import Literal

from recgpt_torchrec.config.checks import at_least


@dataclass(kw_only=True)
class Encoder:
    """The model as a program in the export, from a history to interest vectors, for a service (docs/serving.md)."""

    kind: Literal["none", "auto", "full", "step"] = "none"
    """none: no program is made, and one that the export holds stays. full: item ids in, all interest vectors out; item
    vectors are inside the program, which takes the steps between interests itself. step: vectors of the history's items
    in, one interest vector out; the caller searches the next item. auto: full if the tables of the items take at most
    `mib`, else step."""
    mib: int = 256
    """Maximum size in MiB of the tables in the program: of the items with auto; users' vectors are inside if they fit
    beside them, otherwise the vector of the user is an input. Tables outside lie beside the program, in NumPy files."""
    onnx: bool = False
    """Also write the program as ONNX; this needs the packages of the extra onnx."""

    def __post_init__(self) -> None:
        at_least("--encoder.mib", self.mib, 1)
        if self.onnx and self.kind == "none":
            raise ValueError("--encoder.onnx is true, but --encoder.kind is none; give --encoder.kind auto")
