"""The recall paths of a checkpoint, measured: one step, two steps (m_n), several interests.

pretrain, pretrain_two_step    a pre-trained model (the second is the paper's Variant_1)
fine_tuning                    tuned on the same histories without prompts
recgpt_1, recgpt               prompt-tuned: one step, and two steps merged m_n
..._interests_L                L interests, merged by quota or by score, at the same final length
"""

from typing import Any

import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.config import Batch, Recall
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.stream import SequenceStream, encoding_stream
from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks
from recgpt_torchrec.evaluation.ranking import Results, measure_ranks, reduce_metrics
from recgpt_torchrec.model.recgpt import unwrapped
from recgpt_torchrec.retrieval.encoding import encode
from recgpt_torchrec.retrieval.interests import predict_interests
from recgpt_torchrec.retrieval.interests import recall_items as recall_lists
from recgpt_torchrec.retrieval.merging import SEVERAL, Lists, TwoStep
from recgpt_torchrec.training.loading import Trained

GRID = 10
"""Shares of the longest list in which m is tried: 1 to 9 for a list of ten."""
PROTOCOLS = ("masked", "unmasked")


def path_names(trained: Trained) -> tuple[str, str]:
    """What the one-step and the two-step path of a model are called."""
    if trained.tuning is None:
        return "pretrain", "pretrain_two_step"
    return ("recgpt_1", "recgpt") if trained.tuning.prompts else ("fine_tuning", "fine_tuning_two_step")


class RecallPaths:
    """Measures the recall paths of one model on a dataset.

    Example: `users, results, chosen = RecallPaths(trained, dataset, Batch(), device).measure("test", (5, 10),
    Recall())`
    """

    def __init__(self, trained: Trained, dataset: Dataset, batch: Batch, device: torch.device) -> None:
        self.trained, self.dataset, self.batch, self.device = trained, dataset, batch, device
        scoring = unwrapped(trained.model).scoring_table
        self.catalogue = Catalogue.gather(scoring, dataset.manifest.items, device)

    def measure(
        self, split: SplitName, ks: tuple[int, ...], recall: Recall
    ) -> tuple[int, dict[str, Results], dict[str, Any]]:
        """HR and NDCG of every path (collective).

        Args:
            split: `validation` or `test`.
            ks: list lengths.
            recall: m of the two-step list (0: chosen on validation), and the number of interests.

        Returns:
            users: how many were ranked.
            results: {path: {"masked": {"HR@5": ...}, "unmasked": {...}}}.
            chosen: m, n and how they were chosen.
        """
        one, two = path_names(self.trained)
        longest = max(ks)
        results: dict[str, Results] = {}
        batches = encode(self.trained.model, self._stream(split), self.device)
        users, results[one] = measure_ranks(batches, self.catalogue, ks)
        chosen: dict[str, Any] = {"m": recall.m, "n": longest - recall.m, "because": "as it was asked for"}
        if not recall.m:
            tried = sorted({max(1, round(longest * share / GRID)) for share in range(1, GRID)})
            grid = self._lists("validation", ks, tried, 1, ("masked",))
            value = {m: figures["masked"][f"NDCG@{longest}"] for m, figures in grid.items()}
            m = max(value, key=lambda m: (value[m], int(m)))
            chosen = {
                "m": int(m),
                "n": longest - int(m),
                "because": f"best of m = {', '.join(map(str, tried))} on validation",
            }
            chosen["validation"] = {f"{m}_{longest - int(m)}": figure for m, figure in value.items()}
        lists = self._lists(split, ks, [chosen["m"]], recall.interests)
        results[two] = lists.pop(str(chosen["m"]))
        for name, figures in lists.items():
            results[f"{one}_{name}"] = figures
        return users, results, chosen

    def _stream(self, split: SplitName, grows: int = 0) -> SequenceStream:
        return encoding_stream(self.dataset, split, self.trained.config, self.batch, self.trained.prompts, grows)

    @torch.no_grad()
    def _lists(
        self, split: SplitName, ks: tuple[int, ...], ms: list[int], count: int, protocols: tuple[str, ...] = PROTOCOLS
    ) -> dict[str, Results]:
        """Figures of the merged lists, by m of the two-step list and by the way `count` interests are merged."""
        longest = max(ks)
        metrics: dict[str, dict[str, RankingMetrics]] = {}
        stream = self._stream(split, grows=max(1, count - 1))
        maker = stream.maker
        for histories, first in encode(self.trained.model, stream, self.device):
            vectors = predict_interests(self.trained.model, maker, histories, first, self.catalogue, max(2, count))
            if not len(first):
                continue
            assert histories.held_out is not None and histories.seen is not None
            targets = torch.from_numpy(histories.held_out)
            for how in protocols:
                lists = recall_lists(vectors, self.catalogue, longest, histories.seen if how == "masked" else None)
                two, several = (Lists(*(part[:, :i] for part in lists)) for i in (2, count))
                found = {str(m): TwoStep(m).merge(two, longest) for m in ms}
                if count > 1:
                    found |= {
                        f"interests_{count}_{name}": rule.merge(several, longest) for name, rule in SEVERAL.items()
                    }
                for name, merged in found.items():
                    counted = metrics.setdefault(name, {p: RankingMetrics(ks) for p in protocols})
                    counted[how].update(list_ranks(merged.items.cpu(), targets))
        # Over all ranks; a rank that had no user at all takes part with zeros.
        names = [str(m) for m in ms]
        names += [f"interests_{count}_{name}" for name in SEVERAL] if count > 1 else []
        for name in names:
            metrics.setdefault(name, {how: RankingMetrics(ks) for how in protocols})
        return {name: {how: reduce_metrics(metrics[name][how]).result() for how in protocols} for name in names}
