"""Ragged: rows of integers that are not equally long, in two flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of ids, for example each query's relevant documents.

    Attributes:
        values: int64 (M,), the rows one after another.
        offsets: int64 (N + 1,): row i is ``values[offsets[i]:offsets[i + 1]]``.

    >>> Ragged.from_lists([[3, 5], [], [7]])[0]
    array([3, 5])
    """

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def from_lists(cls, rows: Ragged | Sequence[Any] | NDArray[Any], name: str = "Ragged.from_lists(rows)") -> Ragged:
        """Flatten a list of lists (tuples, arrays, one bare int for a row of one); a Ragged is given back as it is.

        Args:
            rows: N rows of integers.
            name: what the rows are, for the error: ``"mine_hard_negatives(positives)"``.

        Raises:
            TypeError: a row that holds anything but integers.
        """
        if isinstance(rows, Ragged):
            return rows
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise TypeError(f"{name}: a list of lists of integers is needed, not {type(rows).__name__}.")
        if isinstance(rows, np.ndarray) and rows.dtype.kind in "iu" and rows.ndim in (1, 2):
            width = 1 if rows.ndim == 1 else rows.shape[1]
            return cls(rows.astype(np.int64).ravel(), np.arange(len(rows) + 1, dtype=np.int64) * width)
        parts = [_row(row, number, name) for number, row in enumerate(rows)]
        lengths = np.fromiter((len(part) for part in parts), dtype=np.int64, count=len(parts))
        values = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return cls(values, np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        if not 0 <= row < len(self):
            raise IndexError(f"Ragged: row {row} of {len(self)}.")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (N,)."""
        return np.diff(self.offsets)

    def row_numbers(self) -> NDArray[np.int64]:
        """The row of each value: int64 (M,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """The rows at ``rows`` (B,), in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(self.offsets[:-1][rows], lengths) + inside], offsets)

    def padded(self, fill: int = -1) -> NDArray[np.int64]:
        """All rows, filled up to the longest: int64 (N, P), P >= 1."""
        lengths = self.lengths
        out = np.full((len(self), max(1, int(lengths.max(initial=0)))), fill, dtype=np.int64)
        out[np.arange(out.shape[1]) < lengths[:, None]] = self.values
        return out


def _row(row: Any, number: int, name: str) -> NDArray[np.int64]:
    values = np.atleast_1d(np.asarray(sorted(row) if isinstance(row, (set, frozenset)) else row))
    if values.size == 0:
        return np.empty(0, dtype=np.int64)
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise TypeError(f"{name}: row {number} must hold integers, not {values.dtype}{values.shape}: {row!r:.60}.")
    return values.astype(np.int64, copy=False)
