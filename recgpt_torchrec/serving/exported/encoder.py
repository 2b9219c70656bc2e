"""The encoder as a plain module: histories in, interest vectors out, on tensors that `torch.export` makes a program of.

`StepEncoder` takes looked-up vectors and makes one interest vector. `FullEncoder` holds the tables, takes ids and makes
several, with the autoregressive steps of `retrieval.interests` between them. Both run the model's own `Decoder`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recgpt_torchrec.data.inputs.spec import EVENTS, PLACES, TIMES, Inputs
from recgpt_torchrec.data.segments import INTERACTED
from recgpt_torchrec.model.attention import DenseAttention
from recgpt_torchrec.model.decoder import Decoder
from recgpt_torchrec.serving.exported.entries import (
    Columns,
    Relations,
    Request,
    Window,
    append_generated,
    compute_features,
    find_kept,
    find_newest,
    find_width,
    hide_unknown_events,
)


def names_of_columns(inputs: Inputs, prompts: bool) -> list[str]:
    """Arguments [batch, length] int64 of an encoder, beside the entries themselves."""
    read = {
        "segments": prompts,
        "times": inputs.reads(*TIMES),
        "events": inputs.reads_events,
        "places": inputs.reads(*PLACES),
    }
    return [name for name, wanted in read.items() if wanted]


def names_of_request(inputs: Inputs) -> list[str]:
    """Arguments [batch] int64 of an encoder that say what is asked."""
    read = {"request_times": bool(inputs.of_request_time), "asked_events": inputs.reads(*EVENTS)}
    return [name for name, wanted in read.items() if wanted]


class Tower(nn.Module):
    """Decoder and features: what both encoders have in common.

    Args:
        decoder: trained; a copy on the CPU is made.
        inputs: what the model reads beside ids.
        prompts: whether it reads segment ids.
    """

    def __init__(self, decoder: Decoder, inputs: Inputs, prompts: bool) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder).cpu().float().eval().requires_grad_(False)
        self.inputs, self.prompts = inputs, prompts
        self.max_len, self.dim = decoder.config.max_len, decoder.config.dim

    def columns(
        self, like: Tensor, segments: Tensor | None, times: Tensor | None, events: Tensor | None, places: Tensor | None
    ) -> Columns:
        """The columns that the model reads, from the arguments of an encoder; `like` is [batch, length] int64."""
        given = {"times": times, "events": events, "places": places}
        columns = {name: given[name] for name in names_of_columns(self.inputs, False)}
        found = {name: column for name, column in columns.items() if column is not None}
        return {"segments": torch.full_like(like, INTERACTED) if segments is None else segments, **found}

    def forward(self, items: Tensor, users: Tensor, window: Window, columns: Columns, request: Request) -> Tensor:
        """The output at the newest entry of each history, [batch, dim]; zeros without an entry.

        Args:
            items: [batch, width, dim] input vectors of the window's entries.
            users: [batch, dim].
            window: which entries these are.
            columns: of all entries, [batch, length] each.
            request: after each history.
        """
        columns = {name: column.gather(1, window.entries) for name, column in columns.items()}
        relations = Relations(columns["segments"], window.valid)
        features = compute_features(self.inputs, columns, relations, request, window.valid)
        segments = torch.where(window.valid, columns["segments"], INTERACTED)
        sequence = torch.where(window.valid, 0, -1)  # one per row; empty slots see each other alone
        hidden = self.decoder(
            items,
            users[:, None],
            relations.positions(self.max_len),
            segments,
            DenseAttention(sequence),
            features,
        )
        newest = (window.counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.dim)
        return hidden.gather(1, newest)[:, 0] * (window.counts > 0)[:, None]


class StepEncoder(nn.Module):
    """One interest vector of histories whose vectors are looked up by the caller.

    For the next interest the caller appends the input vector of its best new item, with the segment id 1, the time of
    the entry before it, the event type that is asked for and the place 0, where the model reads these. Entries of event
    types that histories do not hold are left out before that.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self,
        item_vectors: Tensor,
        lengths: Tensor,
        user_vectors: Tensor,
        segments: Tensor | None = None,
        times: Tensor | None = None,
        events: Tensor | None = None,
        places: Tensor | None = None,
        request_times: Tensor | None = None,
        asked_events: Tensor | None = None,
    ) -> Tensor:
        """Encode histories.

        Args:
            item_vectors: [batch, length, dim] float32 input vectors of the entries, oldest first and left-aligned; what
                lies behind a history's end is ignored. Of a longer history than the model reads the newest entries
                count.
            lengths: [batch] int64 number of entries; 0: the vector is zero.
            user_vectors: [batch, dim] float32; zeros for an unknown user.
            segments, times, events, places: [batch, length] int64, those that the model reads.
            request_times, asked_events: [batch] int64, likewise.

        Returns:
            [batch, dim] float32 interest vectors.
        """
        tower, room = self.tower, item_vectors.shape[1]
        like = torch.zeros_like(item_vectors[:, :, 0], dtype=torch.int64)
        columns = tower.columns(like, segments, times, events, places)
        if tower.inputs.history_events:
            kept, lengths = find_kept(columns, lengths, tower.inputs)
            columns = {name: column.gather(1, kept) for name, column in columns.items()}
            item_vectors = _gather_vectors(item_vectors, kept)
        columns = hide_unknown_events(columns, tower.inputs)
        window = find_newest(lengths, tower.max_len, find_width(lengths, tower.max_len), room)
        items = _gather_vectors(item_vectors, window.entries) * window.valid[:, :, None]
        vectors: Tensor = tower(items, user_vectors, window, columns, Request(request_times, asked_events))
        return vectors


class FullEncoder(nn.Module):
    """All interest vectors of histories of ids; item vectors, and users' where they fit, are inside.

    Args:
        tower: of the model.
        inputs: [items, dim] float32 vectors of items at the input.
        outputs: [items, dim] float32 vectors that score them; None: the same.
        users: [users, dim] float32; None: the vector of the user is an argument.
        interests: number of vectors per history.
    """

    def __init__(
        self, tower: Tower, inputs: Tensor, outputs: Tensor | None, users: Tensor | None, interests: int
    ) -> None:
        super().__init__()
        self.tower, self.interests, self.items = tower, interests, len(inputs)
        self.inputs: Tensor | None
        self.outputs: Tensor
        self.users: Tensor | None
        # One row beyond the items: what is not to be masked is masked there.
        self.register_buffer("outputs", F.pad(inputs if outputs is None else outputs, (0, 0, 0, 1)))
        self.register_buffer("inputs", None if outputs is None else inputs)
        self.register_buffer("users", users)

    def forward(
        self,
        items: Tensor,
        lengths: Tensor,
        users: Tensor | None = None,
        user_vectors: Tensor | None = None,
        segments: Tensor | None = None,
        times: Tensor | None = None,
        events: Tensor | None = None,
        places: Tensor | None = None,
        request_times: Tensor | None = None,
        asked_events: Tensor | None = None,
    ) -> Tensor:
        """Encode histories.

        Args:
            items: [batch, length] int64 ids of the entries, oldest first and left-aligned; what lies behind a history's
                end is ignored. The newest entries are read; all interacted ones are kept from being appended.
            lengths: [batch] int64 number of entries; 0: the vectors are zero.
            users: [batch] int64 ids, -1 for an unknown user; or `user_vectors` [batch, dim] float32 in their place.
            segments, times, events, places: [batch, length] int64, those that the model reads.
            request_times, asked_events: [batch] int64, likewise.

        Returns:
            [batch, interests, dim] float32.
        """
        tower, request, room = self.tower, Request(request_times, asked_events), items.shape[1]
        if user_vectors is None:
            assert users is not None and self.users is not None, "neither ids nor vectors of users"
            user_vectors = F.embedding(users.clamp(min=0), self.users) * (users >= 0)[:, None]
        is_entry = torch.arange(room, device=items.device) < lengths[:, None]
        columns = {"items": torch.where(is_entry, items, 0), **tower.columns(items, segments, times, events, places)}
        masked = torch.where(is_entry & (columns["segments"] == INTERACTED), items, self.items)
        if tower.inputs.history_events:
            kept, lengths = find_kept(columns, lengths, tower.inputs)
            columns = {name: column.gather(1, kept) for name, column in columns.items()}
        columns, is_empty = hide_unknown_events(columns, tower.inputs), lengths == 0
        # Also masks the row beyond the items, where a history is as long as its padding.
        masked = torch.cat([masked, torch.full_like(masked[:, :1], self.items)], dim=1)
        grows = self.interests - 1
        columns = {name: F.pad(column, (0, grows)) for name, column in columns.items()}
        width = find_width(lengths, tower.max_len, grows)  # once: each size known at run time only slows the exporter
        table = self.outputs if self.inputs is None else self.inputs
        vectors: list[Tensor] = []
        while True:
            window = find_newest(lengths, tower.max_len, width, room + grows)
            ids = columns["items"].gather(1, window.entries)
            vectors.append(tower(F.embedding(ids, table), user_vectors, window, columns, request))
            if len(vectors) == self.interests:
                return torch.stack(vectors, dim=1) * (~is_empty)[:, None, None]
            scores = (vectors[-1] @ self.outputs.T).scatter(1, masked, -torch.inf)
            best = scores.argmax(1)  # the smallest id of equal scores; 0 where no new item is left
            masked = torch.cat([masked, best[:, None]], dim=1)
            columns, lengths = append_generated(columns, lengths, best, request), lengths + 1


def _gather_vectors(vectors: Tensor, index: Tensor) -> Tensor:
    """[batch, n, dim] of `vectors` [batch, length, dim] at `index` [batch, n] int64."""
    return vectors.gather(1, index[:, :, None].expand(-1, -1, vectors.shape[2]))
