"""What the manifest of an export says of its encoder: the program, its arguments, and the tables beside it.

The files lie in the export's folder, in `encoder/`. As the index, the encoder is no part of the export's fingerprint.
"""

from dataclasses import dataclass, field

from recgpt_torchrec.storage.parts import Part
from recgpt_torchrec.storage.typed import SHOWN, check_counts, check_finite

ENCODER_FOLDER = "encoder"
"""Name of the folder below the export's."""
ENCODER_KINDS = ("full", "step")
DTYPES = ("int64", "float32")


@dataclass(kw_only=True)
class Argument:
    """An argument of the program, or what it returns."""

    name: str
    dtype: str
    shape: list[str]
    """Sizes; a word, `batch` or `length`, is one that may differ from call to call."""


@dataclass(kw_only=True)
class TablePart(Part):
    """A NumPy file (.npy) of vectors [rows, dim] float32, of the users or items from the id `first` on."""

    entity: str
    """`item` (vectors at the input of the model; `items/` has those that score) or `user`."""
    first: int


@dataclass(kw_only=True)
class EncoderManifest:
    """A program of the model: histories in, interest vectors out."""

    kind: str
    """full: ids in, all interests out. step: vectors in, one interest out."""
    interests: int
    """Number of vectors per history that the program makes; with step those that its caller is to make."""
    max_len: int
    """Number of newest entries that are read."""
    dim: int
    segments: int = 0
    """Number of segment ids that it tells apart; 0: it reads none."""
    events: list[str] = field(default_factory=list)
    """Words of the event types that it reads; the n-th has the id n + 1."""
    history_events: list[str] = field(default_factory=list)
    """The event types that histories hold; empty: all. The program leaves out the others; before the steps between
    interests, the caller of a step program does."""
    time_unit: float = 1.0
    """Seconds of a unit of times, where it reads them."""
    torch: str = ""
    """Version of torch that made the program."""
    inputs: list[Argument] = field(default_factory=list)
    """Given by name."""
    outputs: list[Argument] = field(default_factory=list)
    programs: list[Part] = field(default_factory=list)
    """encoder.pt2 (`torch.export`), and encoder.onnx if it was asked for."""
    tables: list[TablePart] = field(default_factory=list)
    """Vectors that are not inside the program, by rising id."""

    @property
    def files(self) -> list[Part]:
        """All of its files."""
        return [*self.programs, *self.tables]

    @property
    def paths(self) -> list[str]:
        """Of its files, relative to the export's folder."""
        return [file.path for file in self.files]

    @property
    def bytes(self) -> int:
        """Total size of its files."""
        return sum(file.bytes for file in self.files)

    def program(self, ending: str) -> Part | None:
        """The program in a format, by the ending of its file, `.pt2` or `.onnx`."""
        return next((file for file in self.programs if file.path.endswith(ending)), None)

    def check(self, dim: int, items: int) -> None:
        """Check what the manifest of an export promises.

        Args:
            dim: length of the export's vectors.
            items: number of its items.

        Raises:
            ValueError: names what is impossible.
        """
        if self.kind not in ENCODER_KINDS:
            raise ValueError(f"encoder.kind is {self.kind[:SHOWN]!r}, it must be one of {', '.join(ENCODER_KINDS)}")
        check_counts({f"encoder.{name}": getattr(self, name) for name in ("interests", "max_len", "dim", "segments")})
        check_finite({"encoder.time_unit": self.time_unit})
        if self.dim != dim or not self.interests or not self.max_len:
            raise ValueError(f"its encoder makes {self.interests:,} vectors of {self.dim:,} numbers")
        for each in (*self.inputs, *self.outputs):
            if each.dtype not in DTYPES:
                raise ValueError(f"encoder.{each.name[:SHOWN]} has the type {each.dtype[:SHOWN]!r}")
        if not {*self.history_events} <= {*self.events}:
            raise ValueError("encoder.history_events has an event type that it does not read")
        if self.program(".pt2") is None:
            raise ValueError("its encoder has no program")
        ends = {"item": 0, "user": 0}
        for file in self.files:
            file.check()
            if isinstance(file, TablePart):
                if ends.get(file.entity) != file.first:
                    raise ValueError(f"{file.path} begins with {file.entity[:SHOWN]} {file.first}")
                ends[file.entity] += file.rows
        if ends["item"] not in (0, items) or (self.kind == "step" and not ends["item"]):
            raise ValueError(f"its encoder has the vectors of {ends['item']:,} items, but the export {items:,} items")
