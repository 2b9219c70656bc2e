"""Packs sequences into a grid: short sequences share a row, and none is split between two.

The decoder runs on `[rows, row_length]` slots, of which all but a few percent hold a token (best fit, longest first),
so that hardly anything is computed for padding. Only the attention mask knows where a sequence ends.
"""

from dataclasses import dataclass

import numpy as np
import torch

from recgpt_torchrec.data.ragged import ragged_arange


@dataclass(frozen=True)
class Grid:
    """The slot of each token of a ragged list of sequences."""

    rows: int
    row_length: int
    slots: np.ndarray
    """[tokens] int64: flat grid index (row * row_length + column) of each token, in the order of the ragged list."""

    def put(self, values: np.ndarray, empty: int = 0) -> torch.Tensor:
        """Values per token, [tokens] of any integers, in their slots: [rows, row_length] int64."""
        out = np.full(self.rows * self.row_length, empty, dtype=np.int64)
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
    return Grid(1, slots, np.arange(tokens))


def pack_sequences(lengths: np.ndarray, row_length: int) -> Grid:
    """Place sequences of `lengths` [sequences] int64 into rows of `row_length` slots: best fit, longest first.

    Example: `pack_sequences(np.array([3, 2, 1]), 4)` takes two rows: the lengths 3 and 1 share the first.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    _check_lengths(lengths, row_length)
    # Rows by the number of empty slots: the best fit is found without scanning the rows.
    with_room: list[list[tuple[int, int]]] = [[] for _ in range(row_length + 1)]
    starts = np.zeros(lengths.size, dtype=np.int64)
    rows = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        for room in range(length, row_length + 1):
            if with_room[room]:
                row, column = with_room[room].pop()
                break
        else:
            row, column, room = rows, 0, row_length
            rows += 1
        starts[index] = row * row_length + column
        with_room[room - length].append((row, column + length))
    return Grid(max(rows, 1), row_length, np.repeat(starts, lengths) + ragged_arange(lengths))


def _check_lengths(lengths: np.ndarray, row_length: int) -> None:
    if lengths.size and int(lengths.max()) > row_length:
        raise ValueError(f"a sequence of {int(lengths.max())} tokens does not fit a row of {row_length}")
