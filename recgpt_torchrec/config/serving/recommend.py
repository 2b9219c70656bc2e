"""Options of the stage recommend."""

from dataclasses import dataclass, field
from typing import Literal

from recgpt_torchrec.config.checks import at_least, split_words, within
from recgpt_torchrec.config.device import Device
from recgpt_torchrec.config.inputs.neighbours import RecallNeighbours
from recgpt_torchrec.config.retrieval import INTERESTS


@dataclass(kw_only=True)
class Recommend:
    """Recommend items after a typed history, or after each of a file of them. Users and items by their raw keys.

    Example: recgpt recommend --checkpoint runs/mine --data data/mine --history shoe,hat --k 10
    """

    checkpoint: str
    """Output folder of a run (its best checkpoint is used), or one checkpoint folder."""
    data: str | None = None
    """Folder of the dataset; of a model tuned on prompts, that with the prompts. null: where the model was trained
    on."""
    history: str | None = None
    """Keys of the items of the history, oldest first, separated by commas; a key with a comma is put in double quotes.
    Items that the dataset does not know are left out and counted. Empty: popular items are listed. null: --input is
    given."""
    user: str | None = None
    """Key of the user. null, or one that the dataset does not know: a stranger, whose user vector is 0."""
    times: str | None = None
    """Time of each item of --history, separated by commas: numbers in the log's unit or ISO date-times. Needed where
    the model reads times. null: none."""
    events: str | None = None
    """Event type of each item of --history, separated by commas, empty where it is unknown. Needed where the model
    reads event types. null: none."""
    shown: str | None = None
    """Keys of items that were shown and not clicked, for a model tuned to read them: one list for each item of
    --history, of what was shown after it, lists separated by semicolons and keys by commas, as in `;hat,glove`. Without
    a semicolon all of them came after the newest item. null: none."""
    time: str | None = None
    """Time of the request, where the model reads times. null: the newest time of the dataset."""
    event: str | None = None
    """Event type that is asked for, such as buy. null: any type."""
    k: int = 10
    """Length of the list, at most the number of items."""
    interests: int = 1
    """Number of interest vectors, 1 to 32; each further one is an autoregressive step. The paper's system uses 6."""
    merge: Literal["auto", "two_step", "quota", "score"] = "auto"
    """How the lists of several interests are merged, as in retrieve. auto: score for one interest, two_step for two,
    quota for more."""
    exclude: list[str] = field(default_factory=list)
    """Keys of items to leave out, separated by commas; those of the history are by --seen leave_out."""
    seen: Literal["leave_out", "weigh"] = "leave_out"
    """Items of the history. leave_out: they are not in the list. weigh: they compete, with the model's repeat bias
    added to their scores."""
    allow: list[str] = field(default_factory=list)
    """Keys of the only items that may be listed, separated by commas. []: any."""
    neighbours: RecallNeighbours = field(default_factory=RecallNeighbours)
    pretrained: str | None = None
    """Of a model tuned on generated prompts, the pre-training run that generates them. null: where it was when
    generate_prompts ran."""
    input: str | None = None
    """File of many histories, a JSON object per line: items (keys, oldest first), and where needed user, times, events,
    shown (a list of keys per item), exclude, time, event. null: --history is given."""
    output: str | None = None
    """With --input, file to write: a JSON object per line and history. It is whole or not there. null: standard
    output."""
    json: bool = False
    """Print the list as JSON instead of a table."""
    device: Device = "cpu"
    """Device to compute on; one history is as fast on a CPU."""

    def __post_init__(self) -> None:
        at_least("--k", self.k, 1)
        within("--interests", self.interests, 1, INTERESTS)
        self.exclude, self.allow = split_words(self.exclude), split_words(self.allow)
        if (self.history is None) == (self.input is None):
            raise ValueError(
                "give either --history KEY,KEY, which may be empty, or --input FILE with a JSON object per line"
            )
        if self.output is not None and self.input is None:
            raise ValueError(f"--output is {self.output}, but --history prints its list; give --input FILE with it")
        of_history = ("user", "times", "events", "shown", "exclude")
        for name in of_history if self.input is not None else ():
            if getattr(self, name):
                raise ValueError(f"--{name} belongs to --history; in the file of --input each history has its own")
