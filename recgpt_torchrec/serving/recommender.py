"""Recommendations for requests: a checkpoint in this process, answering histories of raw keys."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from recgpt_torchrec.catalogue.catalogue import Catalogue
from recgpt_torchrec.catalogue.vectors import HeldVectors
from recgpt_torchrec.checkpoints.folder import find_checkpoint
from recgpt_torchrec.checkpoints.settings import CheckpointSettings
from recgpt_torchrec.checkpoints.trained import load_unsharded
from recgpt_torchrec.config.device import Device
from recgpt_torchrec.config.inputs.neighbours import RecallNeighbours
from recgpt_torchrec.config.retrieval import INTERESTS
from recgpt_torchrec.data.dataset import Dataset
from recgpt_torchrec.data.ragged import Float32, Int64, Ragged
from recgpt_torchrec.distributed.devices import choose_device
from recgpt_torchrec.distributed.processes import silence_libraries
from recgpt_torchrec.errors import InputError
from recgpt_torchrec.retrieval.interests import extend_interests
from recgpt_torchrec.retrieval.merging import Merged, MergeRule
from recgpt_torchrec.retrieval.neighbours import CANDIDATES as RAISED
from recgpt_torchrec.retrieval.neighbours import NeighbourRecall
from recgpt_torchrec.retrieval.search.restricted import RestrictedSearch
from recgpt_torchrec.retrieval.search.retriever import ExactSearch, Retriever, Search
from recgpt_torchrec.serving.encoding import RequestEncoder
from recgpt_torchrec.serving.histories import Read, RequestReader
from recgpt_torchrec.serving.keys import UNKNOWN, Key, KeyTable
from recgpt_torchrec.serving.merging import check_whole, choose_rule, merge_interests
from recgpt_torchrec.serving.names import ItemNames
from recgpt_torchrec.serving.popular import Popular
from recgpt_torchrec.serving.prompts import RequestPrompts
from recgpt_torchrec.serving.requests import History, Time, is_one_history, make_requests
from recgpt_torchrec.storage.buffers import fill_in_memory

TOKENS = 2**14
"""Number of slots that are encoded at once."""
CANDIDATES = 2**22
"""Maximum number of items that are held at once, as candidates, as items that are left out, or as raised ones."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The answer to one request."""

    items: list[str]
    """Raw keys, best first; fewer than asked for only where no more items are left."""
    scores: list[float]
    """Score of each under the interest that contributed it, with what neighbours raise it by; of popular items the
    number of interactions."""
    interests: list[int]
    """That interest of each item, from 0; -1 of popular items."""
    unknown: list[Key]
    """Items of the history that the dataset does not know, which were left out."""
    user_known: bool
    """Whether the user has a vector of his own; False: the user vector was 0."""
    fallback: str | None = None
    """Why these are popular items and not the model's, in words; None: they are the model's."""


class Recommender:
    """Answers requests with the model of a checkpoint, in this process and without a process group.

    It holds the model's tables and the vectors that score items, in memory or on the GPU, and the keys of all items.

    Example:
        recommender = Recommender.load("runs/mine", data="data/mine")
        recommender.recommend(["shoe", "hat"], k=10).items
    """

    def __init__(
        self,
        checkpoint: str,
        dataset: Dataset,
        device: torch.device,
        pretrained: str | None = None,
        neighbours: NeighbourRecall | None = None,
    ) -> None:
        """See `load`, which finds the checkpoint and opens the dataset and the neighbours."""
        self.checkpoint, self.dataset, self.device, self._neighbours = checkpoint, dataset, device, neighbours
        trained = load_unsharded(checkpoint, dataset, device)
        self._encoder = RequestEncoder(trained, device)
        self._catalogue = Catalogue.of_model(self._encoder.model, dataset.manifest.items, device)
        self._items = KeyTable(dataset, "item")
        prompts = RequestPrompts(dataset, pretrained, device) if trained.prompts else None
        self._reader = RequestReader(dataset, trained, checkpoint, self._items, prompts)
        self._users: KeyTable | None = None
        self._alike: Catalogue | None = None
        self._names: ItemNames | None = None
        self._popular = Popular(dataset)
        self.dim = trained.config.dim
        """Length of a vector."""
        self.repeat_bias = trained.repeat_bias
        """Added to the scores of items of the history, where these compete (`seen="weigh"`)."""
        self.max_len = trained.config.max_len
        """Maximum number of entries of a history that the model reads: the newest."""
        self.reads_attributes = bool(trained.inputs.of_entity("item"))
        """Whether the model tells items by attributes too."""

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        data: str | os.PathLike[str] | None = None,
        *,
        device: Device = "cpu",
        pretrained: str | None = None,
        neighbours: str | os.PathLike[str] | RecallNeighbours | None = None,
    ) -> "Recommender":
        """Load a model to answer requests.

        Args:
            checkpoint: output folder of a run (its best checkpoint is used), or one checkpoint folder.
            data: folder of the dataset, for a model tuned on prompts the one with prompts; None: where the model was
                trained on.
            device: `cpu`, `cuda`, or `auto`.
            pretrained: for a model tuned on generated prompts, the run that generates them; None: where it was when
                the prompts of the dataset were made.
            neighbours: folder that find_neighbours wrote, or options with it: lists are from the model and from the
                neighbours of a history's items together, as in `retrieve`; None: from the model alone.

        Raises:
            InputError: checkpoint, dataset or neighbours are missing, damaged, or do not belong together.
        """
        silence_libraries()
        found = find_checkpoint(os.fspath(checkpoint))
        dataset = Dataset.open(CheckpointSettings.read(found).data if data is None else os.fspath(data))
        if not isinstance(neighbours, RecallNeighbours):
            neighbours = RecallNeighbours(path=None if neighbours is None else os.fspath(neighbours))
        recall = NeighbourRecall.open(neighbours, dataset, fill_in_memory)
        return cls(found, dataset, choose_device(device), pretrained, recall)

    # ------------------------------------------------------------------------------------------- what is asked

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        interests: int = 1,
        users: Any = None,
        shown: Any = None,
        exclude: Any = None,
        allow: Sequence[Key] | None = None,
        deny: Sequence[Key] = (),
        times: Any = None,
        events: Any = None,
        time: Time | None = None,
        event: str | None = None,
        merge: Literal["auto", "two_step", "quota", "score"] = "auto",
        m: int = 0,
        seen: Literal["leave_out", "weigh"] = "leave_out",
    ) -> Any:
        """Recommend items after one history, or after each of a batch of them.

        The lists are those of stages `export` and `retrieve`.

        Args:
            histories: one list of raw keys, oldest first, or a `History`; or a list of such: a batch.
            k: length of the lists.
            interests: number of interest vectors per history, 1 to 32; each further one is an autoregressive step.
            users: raw key of each history's user (of a single history one key); None, or an unknown one: a stranger.
            shown: for each item of a history what was shown after it and not clicked, see `History.shown`.
            exclude: for each history items to leave out of its list.
            allow: the only items that lists may hold; None: any.
            deny: items that no list may hold.
            times, events: for each history the time and the event type of each item, where the model reads them.
            time: time of the requests, where the model reads times; None: the newest time of the dataset.
            event: event type that is asked for; None: any.
            merge: rule that merges the lists of several interests, as in `retrieve`. auto: score for one interest,
                two_step for two, quota for more.
            m: number of items of the first interest with two_step; 0: nine tenths.
            seen: leave_out: items of a history are not in its list. weigh: they compete, with `repeat_bias` added to
                their scores.

        Returns:
            A `Recommendation`; of a batch a list of them.

        Raises:
            InputError: an argument is malformed or out of range, or the model cannot read or answer it.
        """
        requests = self._requests(histories, users, shown, exclude, times, events, time, event)
        if seen not in ("leave_out", "weigh"):
            raise InputError(f"seen is {seen!r}; give leave_out or weigh")
        bias = self.repeat_bias if seen == "weigh" else None
        check_whole("k", k, 1, len(self._items))
        rule, interests = choose_rule(merge, m, k, interests)
        search, allowed = self._search(allow)
        denied = _known(self._items.ids_of(deny))
        raised = 0 if self._neighbours is None else interests * RAISED
        rows = max(1, min(len(requests), CANDIDATES // max(1, interests * k, raised, denied.size)))
        answers: list[Recommendation] = []
        for first in range(0, len(requests), rows):
            answers += self._answer(requests[first : first + rows], k, interests, rule, search, allowed, denied, bias)
        return answers[0] if is_one_history(histories) else answers

    def encode(
        self,
        histories: Any,
        *,
        interests: int = 1,
        users: Any = None,
        shown: Any = None,
        times: Any = None,
        events: Any = None,
        time: Time | None = None,
        event: str | None = None,
    ) -> Float32:
        """The interest vectors of one history, or of each of a batch: those of stage `export`.

        A score of an item is the inner product of such a vector with the item's (`vectors`). A history without a known
        item has vectors of zeros. The arguments are those of `recommend`.

        Returns:
            [histories, interests, dim] float32.
        """
        requests = self._requests(histories, users, shown, None, times, events, time, event)
        check_whole("interests", interests, 1, INTERESTS)
        read = self._reader.read(requests, self._ids_of_users(requests))
        return self._encode(read, len(requests), interests)

    def similar(self, item: Key, k: int = 10) -> Recommendation:
        """The items whose vectors have the smallest angle with that of `item`, without itself.

        The first call makes a copy of all item vectors, of length 1.

        Raises:
            InputError: the dataset does not know the item.
        """
        check_whole("k", k, 1, len(self._items))
        (number,) = self._items.ids_of([item]).tolist()
        if number == UNKNOWN:
            raise InputError(f"{self.dataset.path} has no item {item!r}; give a key as in the log")
        if self._alike is None:
            self._alike = Catalogue.of_vectors(torch.nn.functional.normalize(self._vectors()))
        query = self._alike.vectors_of(torch.tensor([number], device=self.device))
        best = self._alike.top_k(query, k, Ragged.from_lists([[number]]))
        found = Merged(best.items.cpu(), best.scores.cpu(), torch.zeros_like(best.items).cpu())
        return self._name(found, 0, [], user_known=False)

    def names(self, items: Sequence[Key]) -> tuple[str | None, list[str]]:
        """The text attribute of the dataset that names items (None: it has none), and the name of each of `items`.

        A name is empty where there is none.
        """
        if self._names is None:
            self._names = ItemNames(self.dataset)
        return self._names.column, self._names.of(self._items.ids_of(items))

    @property
    def keys(self) -> pa.Array:
        """The keys of all items, [items] large_string."""
        return self._items.keys

    def vectors(self) -> tuple[pa.Array, Float32]:
        """The keys of all items, [items] large_string, and the vectors that score them, [items, dim] float32."""
        return self._items.keys, self._vectors().cpu().numpy()

    # ------------------------------------------------------------------------------------------- how it is answered

    def _requests(
        self,
        histories: Any,
        users: Any,
        shown: Any,
        exclude: Any,
        times: Any,
        events: Any,
        time: Time | None,
        event: str | None,
    ) -> list[History]:
        per_history = {"user": users, "shown": shown, "exclude": exclude, "times": times, "events": events}
        return make_requests(histories, per_history, {"time": time, "event": event})

    def _ids_of_users(self, requests: Sequence[History]) -> Int64:
        """[requests] int64; -1: a stranger. The keys of users are read when one is first named."""
        ids = np.full(len(requests), UNKNOWN, np.int64)
        named = [number for number, request in enumerate(requests) if request.user is not None]
        if named:
            if self._users is None:
                self._users = KeyTable(self.dataset, "user")
            ids[named] = self._users.ids_of([requests[number].user for number in named])  # type: ignore[misc]
        return ids

    def _encode(self, read: Read, requests: int, interests: int) -> Float32:
        """[requests, interests, dim] float32; zeros for those without a history."""
        vectors = np.zeros((requests, interests, self.dim), np.float32)
        histories = read.histories
        at_once = max(1, TOKENS // max(1, int(histories.lengths.max(initial=1)) + interests - 1))
        with torch.inference_mode():
            for first in range(0, read.rows.size, at_once):
                stop = min(first + at_once, read.rows.size)
                part = histories.part(first, stop)
                encode = self._encoder.encode
                batch = (part, encode(part))
                found = extend_interests(encode, self._encoder.max_len, [batch], self._catalogue, interests)
                vectors[read.rows[first:stop]] = found.cpu().numpy()
        return vectors

    def _answer(
        self,
        requests: Sequence[History],
        k: int,
        interests: int,
        rule: MergeRule,
        search: Search,
        allowed: Int64 | None,
        denied: Int64,
        bias: float | None,
    ) -> list[Recommendation]:
        users = self._ids_of_users(requests)
        read = self._reader.read(requests, users)
        excluded = [_known(self._items.ids_of(request.exclude)) for request in requests]
        answers: list[Recommendation | None] = [None] * len(requests)
        if read.rows.size:
            vectors = self._encode(read, len(requests), interests)[read.rows]
            more = None
            if denied.size or any(each.size for each in excluded):
                more = Ragged.from_lists([[*excluded[row], *denied] for row in read.rows.tolist()])
            raise_scores = None if self._neighbours is None else self._neighbours.of
            retriever = Retriever(search, k, lambda found: merge_interests(found, rule, k), None, bias, raise_scores)
            lists = retriever.lists(vectors, read.histories.seen, more)
            for place, row in enumerate(read.rows.tolist()):
                answers[row] = self._name(lists, place, read.unknown[row], user_known=bool(users[row] != UNKNOWN))
        for row, answer in enumerate(answers):
            if answer is None:
                answers[row] = self._recommend_popular(requests[row], k, allowed, denied, excluded[row], read, row)
        return [answer for answer in answers if answer is not None]

    def _name(self, lists: Merged, row: int, unknown: list[Key], *, user_known: bool) -> Recommendation:
        """One row of lists, in raw keys."""
        items = lists.items[row].numpy()
        count = int((items >= 0).sum())
        return Recommendation(
            items=self._items.keys_of(items[:count]),
            scores=lists.scores[row, :count].tolist(),
            interests=lists.interests[row, :count].tolist(),
            unknown=unknown,
            user_known=user_known,
        )

    def _recommend_popular(
        self,
        request: History,
        k: int,
        allowed: Int64 | None,
        denied: Int64,
        excluded: Int64,
        read: Read,
        row: int,
    ) -> Recommendation:
        """The list of a request in whose history there is nothing that the model reads."""
        items, counts = self._popular.best(k, allowed, np.concatenate([denied, excluded]))
        why = "the history is empty" if not request.items else "none of its items is known"
        if request.items and len(read.unknown[row]) < len(request.items):
            kept = ", ".join(self._reader.inputs.history_events)
            why = f"none of its items is of the event types that the model reads ({kept})"
        return Recommendation(
            items=self._items.keys_of(items),
            scores=counts.astype(float).tolist(),
            interests=[-1] * items.size,
            unknown=read.unknown[row],
            user_known=bool(self._ids_of_users([request])[0] != UNKNOWN),
            fallback=f"popular items: {why}",
        )

    def _search(self, allow: Sequence[Key] | None) -> tuple[Search, Int64 | None]:
        """What searches the items that lists may hold, and the ids of these; None: of all."""
        if allow is None:
            return ExactSearch(self._catalogue), None
        allowed = np.unique(_known(self._items.ids_of(allow)))
        if not allowed.size:
            raise InputError(f"allow has {len(allow)} keys, and none is an item of {self.dataset.path}; give its keys")
        vectors = self._catalogue.vectors_of(torch.from_numpy(allowed).to(self.device))
        return RestrictedSearch(ExactSearch(Catalogue.of_vectors(vectors)), allowed), allowed

    def _vectors(self) -> torch.Tensor:
        """[items, dim] float32 vectors that score items."""
        if isinstance(self._catalogue.vectors, HeldVectors):
            return self._catalogue.vectors.vectors
        return torch.cat([torch.from_numpy(vectors) for _, vectors in self._catalogue.share()]).to(self.device)


def _known(ids: Int64) -> Int64:
    return ids[ids != UNKNOWN]
