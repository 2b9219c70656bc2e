"""Options of the program report."""

from dataclasses import dataclass, field

from recgpt_torchrec.config.fields import LEADING

MOST_RUNS = 6
"""Maximum number of runs in a report: as many colours can be told apart."""


@dataclass(kw_only=True)
class Report:
    """Write one HTML file about runs: curves, every recall path beside the baselines, differences between runs, lists.

    Reads what pretrain, prompt_tune and evaluate wrote; no model is loaded. The file needs neither network nor scripts.

    Example: recgpt report runs/mine runs/tuned --output report.html --names items.csv
    """

    output: str
    """HTML file to write; its folder must exist. An earlier report is replaced, another file is not."""
    runs: list[str] = field(default_factory=list, metadata={LEADING: True})
    """Output folders of runs; they may also be given first, without an option. The first is what the others are
    compared with. At most 6."""
    evaluations: list[str] = field(default_factory=list)
    """Evaluations (JSON files of evaluate) of the runs, each of a checkpoint in one of them. Without: those in the
    folder of each run and beside it."""
    data: str | None = None
    """Dataset in which the keys of example users and items are looked up; null: that of each evaluation, where it is
    still there."""
    names: str | None = None
    """Table with readable names of items: .csv, .tsv, .jsonl or .parquet, keys in --item_column. null: a text attribute
    of the dataset (title or name, else its first), or the keys themselves."""
    item_column: str = "item_id"
    """Column of the keys in the table of --names."""
    name_column: str = "title"
    """Column of the names in the table of --names."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("--runs is empty; name one or several, as in recgpt report runs/mine --output report.html")
        if len(self.runs) > MOST_RUNS:
            raise ValueError(f"--runs names {len(self.runs)} runs; a report shows at most {MOST_RUNS}")
        if len({run.rstrip("/") for run in self.runs}) < len(self.runs):
            raise ValueError("--runs names a run twice; name each once")
