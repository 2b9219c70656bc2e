"""Evaluation and export against what a user would write with torch and pyarrow alone."""

import itertools
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recgpt_torchrec.evaluation.validation import validation_of
from recgpt_torchrec.retrieval.exports.writing import write_export
from tools.benchmarks.measuring import Figures, Kind, Ratio, stopwatch
from tools.benchmarks.settings import Settings
from tools.plain_padded import LENGTH, USERS, PaddedLoop, TrainingData


def evaluate(settings: Settings) -> Kind:
    """Users per second of a validation, from Parquet to metrics, over a plain loop on a dense matrix of scores.

    Both encode every user with one block of the same width, rank a held-out item among all items, masked and unmasked,
    and sum HR and NDCG at 5 and 10. The plain loop has the histories in memory.
    """
    training = settings.training(steps=settings.pick(40, 2))
    stream = training.whole_stream
    config, device = training.config, training.trainer.device
    make_validation = validation_of(stream, config.model, stream.maker.batch, device, config.train)
    if make_validation is None:
        raise SystemExit("evaluate: nothing is held out in the dataset; leave this kind out with --only")
    validation = make_validation(training.model)
    loop = PaddedLoop(TrainingData(settings.data))

    def of_project() -> Figures:
        training.trainer.pipeline.detach()
        with stopwatch() as figures:
            validation()
        training.model.train()
        return {"users_s": training.dataset.manifest.users / figures["seconds"], **figures}

    def plain() -> Figures:
        with stopwatch() as figures:
            users = _rank_plainly(loop)
        return {"users_s": users / figures["seconds"], **figures}

    return Kind(
        {"validation": of_project, "plain loop": plain},
        {"validation over plain loop": Ratio(("validation", "users_s"), ("plain loop", "users_s"))},
    )


@torch.no_grad()
def _rank_plainly(loop: PaddedLoop) -> int:
    """Rank the last item of every history among all items, by batches of users; returns the number of users."""
    model, data = loop.model.eval(), loop.data
    vectors = model.items.weight[: data.item_count]
    sums = torch.zeros(8)
    for start in range(0, len(data.histories), USERS):
        histories = data.histories[start : start + USERS]
        rows = torch.arange(len(histories))
        inputs = np.full((len(histories), LENGTH), data.item_count)
        for row, history in enumerate(histories):
            inputs[row, : len(history) - 1] = history[:-1]
        last = torch.tensor([len(history) - 2 for history in histories])
        targets = torch.tensor([int(history[-1]) for history in histories])
        items = torch.from_numpy(inputs)
        outputs = model(items, torch.from_numpy(data.users[start : start + USERS]))[rows, last]
        scores = outputs @ vectors.t()
        wanted = scores[rows, targets][:, None]
        unmasked = (scores > wanted).sum(1) + ((scores == wanted).sum(1) - 1) / 2
        padded = torch.cat([scores, scores.new_zeros(len(rows), 1)], 1)  # a column for the padding
        scores = padded.scatter(1, items, -torch.inf)[:, :-1]
        masked = (scores > wanted).sum(1) + ((scores == wanted).sum(1) - 1).clamp(min=0) / 2
        for place, ranks in enumerate((masked, unmasked)):
            for k_place, k in enumerate((5, 10)):
                hit = ranks < k
                sums[4 * place + 2 * k_place] += hit.sum()
                sums[4 * place + 2 * k_place + 1] += (hit / torch.log2(ranks + 2)).sum()
    loop.model.train()
    return len(data.histories)


def export(settings: Settings) -> Kind:
    """Rows per second of writing an export over one `pyarrow.parquet.write_table` of the same arrays.

    The export also writes each row's raw key, checks that vectors are finite and complete, and notes checksums.
    """
    training = settings.training(steps=settings.pick(40, 2))
    dataset, dim = training.dataset, training.config.model.dim
    rng = np.random.default_rng(0)
    arrays = {
        name: (np.arange(rows), rng.standard_normal((rows, dim)).astype(np.float32))
        for name, rows in (("item", dataset.manifest.items), ("user", dataset.manifest.users))
    }
    rows = dataset.manifest.items + dataset.manifest.users
    batches = [
        (arrays["user"][0][start : start + 1024], arrays["user"][1][start : start + 1024])
        for start in range(0, dataset.manifest.users, 1024)
    ]
    numbers = itertools.count()

    def of_project() -> Figures:
        folder = settings.folder / f"export-{next(numbers)}"
        with stopwatch() as figures:
            write_export(
                str(folder),
                dataset,
                items=[arrays["item"]],
                users=iter(batches),
                dim=dim,
                interests=1,
                everyone=True,
                checkpoint="",
                checkpoint_fingerprint="",
                settings={},
            )
        shutil.rmtree(folder)
        return {"rows_s": rows / figures["seconds"], **figures}

    def plain() -> Figures:
        with stopwatch() as figures:
            for name, (ids, vectors) in arrays.items():
                column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
                pq.write_table(pa.table({f"{name}_id": ids, "vector": column}), settings.folder / f"{name}.parquet")
        return {"rows_s": rows / figures["seconds"], **figures}

    ways = {"export": of_project, "write_table": plain}
    return Kind(ways, {"export over write_table": Ratio(("export", "rows_s"), ("write_table", "rows_s"))})
