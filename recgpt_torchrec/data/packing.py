"""Packs sequences into a grid: short sequences share a row, and none is split between two.

The decoder runs on `[rows, row_length]` slots, of which all but a few percent hold a token (best fit, longest first),
so that hardly anything is computed for padding. Only the attention mask knows where a sequence ends.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Grid:
    """The slot of each token of a ragged list of sequences."""

    rows: int
    row_length: int
    slots: np.ndarray
    """[tokens] int64: flat grid index (row * row_length + column) of each token, in the order of the ragged list."""
    end_to_end: bool = False
    """Whether `slots` are 0, 1, 2, ..."""

    def put(self, values: np.ndarray | None, empty: int = 0) -> torch.Tensor:
        """Values per token, [tokens] of any integers (None: `empty`), in their slots: [rows, row_length] int64."""
        out = np.full(self.rows * self.row_length, empty, dtype=np.int64)
        if values is None:
            pass
        elif self.end_to_end:
            out[: values.size] = values
        else:
            out[self.slots] = values
        return torch.from_numpy(out.reshape(self.rows, self.row_length))


def lay_end_to_end(lengths: np.ndarray, longest: int, slots: int | None = None) -> Grid:
    """One row of `slots` slots (None: as many as there are tokens, at least one) that holds the sequences in order.

    Raises:
        ValueError: a sequence is longer than `longest`, or there are more tokens than slots.
    """
    _check_lengths(lengths, longest)
    tokens = int(lengths.sum())
    slots = max(tokens, 1) if slots is None else slots
    if tokens > slots:
        raise ValueError(f"{tokens} tokens do not fit a row of {slots}")
    return Grid(1, slots, np.arange(tokens), end_to_end=True)


def pack_sequences(lengths: np.ndarray, row_length: int) -> Grid:
    """Place sequences of `lengths` [sequences] int64 into rows of `row_length` slots: best fit, longest first.

    Example: `pack_sequences(np.array([3, 2, 1]), 4)` takes two rows: the lengths 3 and 1 share the first.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    _check_lengths(lengths, row_length)
    # Rows by their number of empty slots; of each its first empty slot. Best fit treats sequences of one length alike,
    # and rows of one room, so they are placed together: 4,600 sequences take 1 ms, one by one they took 4 to 8.
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r: a row has r empty slots
    rows = 0
    starts: list[int] = []  # of the sequences, longest first
    counts = np.bincount(lengths, minlength=1)
    for length in (np.flatnonzero(counts[1:])[::-1] + 1).tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                fit = room // length
            else:
                room, fit = row_length, row_length // length
                opened = -(-left // fit)
                with_room[room] = list(range(rows * row_length, (rows + opened) * row_length, row_length))
                rows += opened
                rooms |= 1 << room
            fit = min(fit, left)
            same_room = with_room[room]
            filled = same_room[: left // fit]
            del same_room[: len(filled)]
            if not same_room:
                rooms ^= 1 << room
            left -= fit * len(filled)
            starts += filled
            for _ in range(fit - 1):
                filled = [slot + length for slot in filled]
                starts += filled
            if rest := room - fit * length:
                with_room[rest] += [slot + length for slot in filled]
                rooms |= 1 << rest
    in_order = np.zeros(lengths.size, dtype=np.int64)
    # numpy sorts 16-bit integers by counting, six times as fast.
    longest_first = np.argsort(-lengths.astype(np.int16 if row_length < 2**15 else np.int64), kind="stable")
    in_order[longest_first[: len(starts)]] = starts
    tokens = np.cumsum(lengths)
    first = in_order - (tokens - lengths)
    return Grid(max(rows, 1), row_length, np.repeat(first, lengths) + np.arange(tokens[-1] if tokens.size else 0))


def _check_lengths(lengths: np.ndarray, row_length: int) -> None:
    if lengths.size and int(lengths.max()) > row_length:
        raise ValueError(f"a sequence of {int(lengths.max())} tokens does not fit a row of {row_length}")
