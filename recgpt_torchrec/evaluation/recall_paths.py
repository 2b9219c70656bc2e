"""Measures the recall paths of a checkpoint: one step, two steps (m_n), several interests (paper, section 4.4).

pretrain, pretrain_two_step    a pre-trained model (the paper's Variant_3 and Variant_1)
fine_tuning                    tuned on the same histories, without prompts
recgpt_1, recgpt               prompt-tuned: one step (the paper's Variant_2), and two steps merged m_n
..._interests_L                L interests, merged by quota or by score, at the same final length
..._neighbours                 one step, with the neighbours of the history's items raised (`retrieval.neighbours`)
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.checkpoints.trained import Trained
from recgpt_torchrec.config import Batch, Recall
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.inputs.request import Request
from recgpt_torchrec.data.reading.sample import UserSample
from recgpt_torchrec.data.split import SplitName
from recgpt_torchrec.data.stream import ANY, SequenceStream, encoding_stream
from recgpt_torchrec.evaluation.groups import PROTOCOLS, GroupedMetrics, Grouping
from recgpt_torchrec.evaluation.held_out import has_users
from recgpt_torchrec.evaluation.list_sample import ListSample
from recgpt_torchrec.evaluation.metrics import RankingMetrics, list_ranks, reduce_metrics
from recgpt_torchrec.evaluation.per_user.recording import UserRecorder
from recgpt_torchrec.evaluation.ranking import Results, measure_ranks, targets_of, users_of
from recgpt_torchrec.evaluation.sampling import choose_users
from recgpt_torchrec.model.tabled.base import unwrapped
from recgpt_torchrec.retrieval.encoding import collect_batches, encode
from recgpt_torchrec.retrieval.interests import predict_interests, recall_items
from recgpt_torchrec.retrieval.merging import SEVERAL, Lists, Quota, TwoStep
from recgpt_torchrec.retrieval.neighbours import NeighbourRecall
from recgpt_torchrec.retrieval.weighed import Weighed

NEIGHBOURS = "neighbours"
"""Ending of the path whose scores neighbours raise."""
RAISED_ROWS = 2**16
"""Maximum number of histories whose neighbours are raised at once: up to 200 pairs each, some 12 KB."""
GRID = 10
"""m is tried at each 1 / GRID of the longest list: 1 to 9 for a list of ten."""


def path_names(trained: Trained) -> tuple[str, str]:
    """Names of the one-step and the two-step path of a model."""
    if trained.tuning is None:
        return "pretrain", "pretrain_two_step"
    return ("recgpt_1", "recgpt") if trained.tuning.prompts else ("fine_tuning", "fine_tuning_two_step")


class RecallPaths:
    """Measures the recall paths of one model on a dataset.

    Example: `users, results, chosen = RecallPaths(trained, dataset, Batch(), device).measure("test", (5, 10),
    Recall())`
    """

    def __init__(
        self,
        trained: Trained,
        dataset: Dataset,
        batch: Batch,
        device: torch.device,
        *,
        users: int = 0,
        seed: int = 0,
        grouping: Grouping | None = None,
        request: Request = ANY,
        recorder: UserRecorder | None = None,
        lists: ListSample | None = None,
        neighbours: NeighbourRecall | None = None,
    ) -> None:
        """
        Args:
            trained: the model.
            dataset: opened.
            batch: of the histories to encode, per rank.
            device: of this rank.
            users: number of users of a split to measure on; 0: all.
            seed: of the sample of users.
            grouping: divides users into groups, for `grouped`; None: there are none.
            request: what is asked after each history, and which users are ranked.
            recorder: takes the ranks of every user by path; None: they are not kept.
            lists: takes lists of a sample of users by path; None: they are not kept.
            neighbours: raise scores in a path of their own; None: there is no such path.
        """
        self.neighbours = neighbours
        self.recorder, self.list_sample = recorder, lists
        self.trained, self.dataset, self.batch, self.device = trained, dataset, batch, device
        self.users, self.seed, self.grouping, self.request = users, seed, grouping, request
        self._samples: dict[str, UserSample | None] = {}
        self.grouped: dict[str, GroupedMetrics] = {}
        """By path: what `measure` measured by groups of users."""
        self.bias = 0.0
        """Repeat bias of unmasked scores, chosen by `measure`."""
        self.item_keys = unwrapped(trained.model).item_keys
        self.catalogue = Catalogue.of_model(unwrapped(trained.model), dataset.manifest.items, device)

    def measure(
        self, split: SplitName, ks: tuple[int, ...], recall: Recall
    ) -> tuple[int, dict[str, Results], dict[str, Any]]:
        """HR and NDCG of every path (collective).

        Args:
            split: `validation` or `test`.
            ks: list lengths.
            recall: m of the two-step list (0: choose on validation), the number of interests, and whether unmasked
                scores have the repeat bias.

        Returns:
            users: number of users ranked.
            results: {path: {"masked": {"HR@5": ...}, "unmasked": {...}}}.
            chosen: m, n and why, with the validation figures where they decided.
        """
        one, two = path_names(self.trained)
        longest = max(ks)
        self.bias = self.trained.repeat_bias if recall.repeat_bias else 0.0
        results: dict[str, Results] = {}
        batches = encode(self.trained.model, self._encoding_stream(split), self.device)
        users, results[one] = measure_ranks(
            batches,
            self.catalogue,
            ks,
            self._group(one, ks),
            None if self.recorder is None else partial(self.recorder.add_ranks, one),
            repeat_bias=self.bias,
        )
        chosen: dict[str, Any] = {"m": recall.m, "n": longest - recall.m, "because": "given by --recall.m"}
        if not recall.m and self.dataset.manifest.count_targets("validation") == 0:
            chosen = self._default_quota(longest, "no user has a validation item to choose by")
        elif not recall.m and not has_users(self.dataset, "validation", self.trained.inputs, self.request):
            chosen = self._default_quota(longest, "no user has a validation item of the event type to choose by")
        elif not recall.m:
            tried = sorted({max(1, round(longest * share / GRID)) for share in range(1, GRID)})
            grid = self._measure_lists("validation", ks, tried, 1, ("masked",))
            value = {m: figures["masked"][f"NDCG@{longest}"] for m, figures in grid.items()}
            m = max(value, key=lambda m: (value[m], int(m)))
            chosen = {
                "m": int(m),
                "n": longest - int(m),
                "because": f"best of m = {', '.join(map(str, tried))} on validation",
            }
            chosen["validation"] = {f"{m}_{longest - int(m)}": figure for m, figure in value.items()}
        m = str(chosen["m"])
        paths = {m: two} | {name: f"{one}_{name}" for name in _several(recall.interests)}
        paths |= {NEIGHBOURS: f"{one}_{NEIGHBOURS}"} if self.neighbours is not None else {}
        lists = self._measure_lists(split, ks, [chosen["m"]], recall.interests, grouped_as=paths)
        if self.list_sample is not None:
            self.list_sample.settle()
        for name, figures in lists.items():
            results[paths[name]] = figures
        return users, results, chosen

    @staticmethod
    def _default_quota(longest: int, why: str) -> dict[str, Any]:
        """m and n where nothing is there to choose them by."""
        quota = TwoStep(0).first_quota(longest)
        return {"m": quota, "n": longest - quota, "because": f"nine tenths, as {why}"}

    def _group(self, path: str, ks: tuple[int, ...]) -> GroupedMetrics | None:
        """Metrics of a path by groups of users, if users are grouped."""
        if self.grouping is not None:
            self.grouped[path] = GroupedMetrics(self.grouping, ks)
        return self.grouped.get(path)

    def sample(self, split: SplitName) -> UserSample | None:
        """The sample of a split's users to measure on; None: all (collective)."""
        if split not in self._samples:
            self._samples[split] = choose_users(
                self.dataset, split, self.users, self.seed, inputs=self.trained.inputs, request=self.request
            )
        return self._samples[split]

    def _encoding_stream(self, split: SplitName, grows: int = 0) -> SequenceStream:
        trained, keys, sample = self.trained, self.item_keys, self.sample(split)
        return encoding_stream(
            self.dataset,
            split,
            trained.config,
            self.batch,
            trained.prompts,
            grows,
            item_keys=keys,
            feedback=trained.feedback,
            sample=sample,
            inputs=trained.inputs,
            attributes=trained.attributes,
            request=self.request,
        )

    @torch.no_grad()
    def _measure_lists(
        self,
        split: SplitName,
        ks: tuple[int, ...],
        ms: list[int],
        count: int,
        protocols: tuple[str, ...] = PROTOCOLS,
        grouped_as: Mapping[str, str] | None = None,
    ) -> dict[str, Results]:
        """Metrics of two-step lists, by m, and of `count` merged interests, by rule (collective).

        `grouped_as` gives the path of each name that is also measured by groups of users.
        """
        longest = max(ks)
        grouped = {name: self._group(path, ks) for name, path in (grouped_as or {}).items()}
        metrics: dict[str, dict[str, RankingMetrics]] = {}
        stream = self._encoding_stream(split, grows=max(1, count - 1))
        maker = stream.maker
        batches = encode(self.trained.model, stream, self.device)
        rows = self.catalogue.rows_per_pass
        if rows is not None and self.neighbours is not None:
            rows = min(rows, RAISED_ROWS)
        for collected in collect_batches(batches, rows):
            vectors = predict_interests(self.trained.model, maker, collected, self.catalogue, max(2, count))
            targets, seen = targets_of([histories for histories, _ in collected])
            groups, users = None, users_of([histories for histories, _ in collected])
            of_users: dict[str, dict[str, torch.Tensor]] = {path: {} for path in (grouped_as or {}).values()}
            if self.grouping is not None and grouped:
                groups = self.grouping.find(targets.numpy(), seen.lengths)
            raised = self.neighbours.of(seen) if grouped_as and self.neighbours is not None else None
            for how in protocols:
                left_out, weighed = (seen, None) if how == "masked" else (None, Weighed(seen, self.bias))
                lists = recall_items(vectors, self.catalogue, longest, left_out, weighed)
                two, several = (Lists(*(part[:, :i] for part in lists)) for i in (2, count))
                merged = {str(m): TwoStep(m).merge(two, longest) for m in ms}
                if count > 1:
                    merged |= {
                        f"interests_{count}_{name}": rule.merge(several, longest) for name, rule in SEVERAL.items()
                    }
                if raised is not None:
                    first = vectors[:, :1]
                    of_both = recall_items(first, self.catalogue, longest, left_out, raised.beside(weighed))
                    merged[NEIGHBOURS] = Quota().merge(of_both, longest)
                for name, result in merged.items():
                    by_protocol = metrics.setdefault(name, {p: RankingMetrics(ks) for p in protocols})
                    ranks = list_ranks(result.items.cpu(), targets)
                    by_protocol[how].update(ranks)
                    if groups is not None and (by_group := grouped[name]) is not None:
                        by_group.update(groups, how, ranks)
                    if grouped_as:
                        of_users[grouped_as[name]][how] = ranks
                if grouped_as and self.list_sample is not None and how == "masked":
                    one = path_names(self.trained)[0]
                    of_lists = {
                        one: lists.items[:, 0],
                        **{grouped_as[name]: each.items for name, each in merged.items()},
                    }
                    self.list_sample.add([histories for histories, _ in collected], of_lists)
            if self.recorder is not None:
                for path, ranks_of in of_users.items():
                    self.recorder.add_ranks(path, users, ranks_of)
        # Summed over all ranks; a rank without users adds zeros.
        names = [str(m) for m in ms]
        names += _several(count)
        if grouped_as and self.neighbours is not None:
            names.append(NEIGHBOURS)
        for name in names:
            metrics.setdefault(name, {how: RankingMetrics(ks) for how in protocols})
        return {name: {how: reduce_metrics(metrics[name][how]).result() for how in protocols} for name in names}


def _several(count: int) -> list[str]:
    """Names of the lists of `count` merged interests."""
    return [f"interests_{count}_{name}" for name in SEVERAL] if count > 1 else []
