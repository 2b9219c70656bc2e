"""The Python API: the stages as functions, and datasets and recommenders as objects. Thin callers of the stages.

Options are those of the command line, by their dotted names, with Python values: `options={"train.epochs": 3}`. A stage
prints its summary, as it does there, and leaves alone what is there already.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from recgpt_torchrec import cli
from recgpt_torchrec.config.stages import STAGES, module_of
from recgpt_torchrec.data.dataset import Dataset as DatasetFolder
from recgpt_torchrec.errors import InputError

Options = Mapping[str, Any]


class Dataset:
    """A prepared dataset, in its folder.

    Example:
        >>> import tempfile, pyarrow as pa, recgpt_torchrec as rg
        >>> rows = {"user_id": ["ann", "ann", "bob"], "item_id": ["hat", "shoe", "hat"], "timestamp": [1, 2, 3]}
        >>> log = pa.table(rows)
        >>> folder = tempfile.mkdtemp()
        >>> data = rg.Dataset.prepare(log, output=f"{folder}/data", min_count=1)  # doctest: +ELLIPSIS
        read        3 rows of ...
        >>> data.users, data.items, data.interactions
        (2, 2, 3)
    """

    def __init__(self, path: str) -> None:
        """Open a dataset.

        Raises:
            InputError: it is missing or damaged.
        """
        self.path = path
        self.manifest = DatasetFolder.open(path).manifest
        """What its `manifest.json` says."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Dataset":
        """Open the dataset in a folder.

        Raises:
            InputError: it is missing or damaged.
        """
        return cls(os.fspath(path))

    @classmethod
    def prepare(
        cls, log: Any, *, output: str | os.PathLike[str], options: Options | None = None, **more: Any
    ) -> "Dataset":
        """Prepare a raw log (stage `prepare`).

        Args:
            log: path of a file, folder or pattern, or a list of them; or a table: a pandas or polars data frame, or an
                Arrow table. A table is kept as a Parquet file beside the dataset, OUTPUT.log.parquet.
            output: folder of the dataset.
            options: of the stage.
            more: likewise: `min_count=1` is `options={"min_count": 1}`.

        Raises:
            InputError: the log or an option is wrong.
        """
        folder = os.fspath(output)
        _run("prepare", {"input": _paths_of(log, folder), "output": folder}, options, more)
        return cls(folder)

    @property
    def users(self) -> int:
        """Number of users."""
        return self.manifest.users

    @property
    def items(self) -> int:
        """Number of items."""
        return self.manifest.items

    @property
    def interactions(self) -> int:
        """Number of interactions."""
        return self.manifest.interactions

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"Dataset({self.path!r}: {self.users:,} users, {self.items:,} items, {self.interactions:,} interactions)"


Path = str | os.PathLike[str] | Dataset


def find_neighbours(dataset: Path, output: Path, options: Options | None = None, **more: Any) -> str:
    """Find the items that follow each item of a dataset (stage `find_neighbours`); returns the folder.

    The arguments are those of `pretrain`, which takes the folder as the option `neighbours.path`.
    """
    return _run("find_neighbours", {"data": dataset, "output": output}, options, more)


def pretrain(dataset: Path, output: Path, options: Options | None = None, **more: Any) -> str:
    """Train a model on a dataset (stage `pretrain`); returns the run's folder.

    Args:
        dataset: a `Dataset`, or its folder.
        output: folder of the run; an unfinished run in it is resumed.
        options: of the stage, such as `{"model.dim": 64, "train.epochs": 3}`.
        more: options without a dot, such as `seed=1`.

    Raises:
        InputError: the dataset or an option is wrong.
    """
    return _run("pretrain", {"data": dataset, "output": output}, options, more)


def generate_prompts(
    dataset: Path, checkpoint: Path, output: Path, options: Options | None = None, **more: Any
) -> Dataset:
    """Insert prompts between the interactions of a dataset (stage `generate_prompts`); the dataset with prompts.

    The arguments are those of `pretrain`, and the run that generates the prompts.
    """
    return Dataset(
        _run("generate_prompts", {"data": dataset, "checkpoint": checkpoint, "output": output}, options, more)
    )


def prompt_tune(dataset: Path, checkpoint: Path, output: Path, options: Options | None = None, **more: Any) -> str:
    """Tune a pre-trained model on a dataset with prompts (stage `prompt_tune`); returns the run's folder.

    The arguments are those of `pretrain`, and the run to start from.
    """
    return _run("prompt_tune", {"data": dataset, "checkpoint": checkpoint, "output": output}, options, more)


def evaluate(
    dataset: Path, checkpoint: Path, output: Path, options: Options | None = None, **more: Any
) -> dict[str, Any]:
    """Measure a model beside baselines (stage `evaluate`); what it wrote to the JSON file `output`.

    The arguments are those of `pretrain`, and the run to measure.

    Example: `rg.api.evaluate(data, run, "test.json")["results"]["pretrain"]["masked"]["HR@10"]`
    """
    from recgpt_torchrec import storage

    written = _run("evaluate", {"data": dataset, "checkpoint": checkpoint, "output": output}, options, more)
    return storage.read_json(written) or {}


def export(dataset: Path, checkpoint: Path, output: Path, options: Options | None = None, **more: Any) -> str:
    """Write the vectors of all items and users (stage `export`); returns the folder.

    The arguments are those of `pretrain`, and the run whose model encodes.
    """
    return _run("export", {"data": dataset, "checkpoint": checkpoint, "output": output}, options, more)


def retrieve(
    vectors: Path, output: Path, dataset: Path | None = None, options: Options | None = None, **more: Any
) -> str:
    """Write a list of items for each user of an export (stage `retrieve`); returns the folder.

    Args:
        vectors: folder of the export.
        output: folder of the lists.
        dataset: whose histories are left out of lists; None: nothing is left out.
        options, more: of the stage.
    """
    return _run("retrieve", {"export": vectors, "output": output, "data": dataset}, options, more)


def _run(stage: str, given: Options, options: Options | None, more: Options) -> str:
    """Run a stage in this process; returns its output, as given.

    Raises:
        InputError: an option is unknown, wrong or given twice.
    """
    values: dict[str, Any] = {}
    paths = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    for source in (paths, options or {}, more):
        for name, value in source.items():
            if name in values:
                raise InputError(f"{stage}: the option {name} is given twice, or set by another argument; give it once")
            values[name] = value
    importlib.import_module(module_of(stage)).main(cli.make_config(STAGES[stage].config, stage, values))
    return str(values["output"])


def _paths_of(log: Any, output: str) -> list[str]:
    """The paths of a log; a table is written beside `output`, unless the same is there already."""
    if isinstance(log, (str, os.PathLike)):
        return [os.fspath(log)]
    if isinstance(log, Sequence):
        return [os.fspath(path) for path in log]
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recgpt_torchrec import storage

    if hasattr(log, "__arrow_c_stream__") or isinstance(log, pa.Table):
        table = pa.table(log)
    elif hasattr(log, "columns") and hasattr(log, "itertuples"):
        table = pa.Table.from_pandas(log, preserve_index=False)
    else:
        raise InputError(f"the log is a {type(log).__name__}; give a path, a data frame or an Arrow table")
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None), sink)
    content, path = sink.getvalue().to_pybytes(), f"{output.rstrip('/')}.log.parquet"
    if not storage.exists(path) or storage.read(path) != content:  # an equal file keeps its time
        if folder := os.path.dirname(path):
            storage.make_folder(folder)
        storage.write(path, content)
    return [path]
