"""Histogram: counts and exact sums of values, in bins that keep their order."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from samplewise.cuda_ext.reference import order_keys, values_of


def key_of(value: float) -> int:
    """The integer that stands for a float32 value in the order of all of them, in [0, 2^32)."""
    return int(order_keys(np.array([value], dtype=np.float32))[0])


_LARGEST = key_of(float(np.finfo(np.float32).max))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Bin b holds the values whose order key lies in ``[low + b 2^shift, low + (b + 1) 2^shift)``.

    Within a bin the values are equally spaced, because a bin never crosses a power of two: the sum of the keys' offsets
    from the bin's first key, an integer, gives the sum of the values exactly.

    Attributes:
        counts: int64 (B,), values in each bin.
        offsets: int64 (B,), sums of the keys' offsets in each bin.
        low: first key.
        shift: binary logarithm of the keys a bin.
    """

    counts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    low: int
    shift: int

    @property
    def count(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the values counted, NaN where there are none: the same for any order of them."""
        filled = np.flatnonzero(self.counts)  # few of them, where the values are few
        counts = self.counts[filled]
        means = self._means(self.low + (filled << self.shift), self.offsets[filled], counts)
        return float((counts * means).sum()) / int(counts.sum()) if filled.size else nan

    def bin_of(self, rank: int) -> tuple[int, int]:
        """The bin of the value of that rank, from 0, and how many values the bins before it hold."""
        upto = np.cumsum(self.counts)
        found = int(np.searchsorted(upto, rank, side="right"))
        return found, int(upto[found] - self.counts[found])

    @property
    def edges(self) -> NDArray[np.float32]:
        """Float32 (B,), the smallest value that each bin could hold."""
        return values_of(self._first_keys)

    @property
    def ends(self) -> NDArray[np.float32]:
        """Float32 (B,), the largest value that each bin could hold."""
        return values_of(np.minimum(self._first_keys + ((1 << self.shift) - 1), _LARGEST))

    @property
    def means(self) -> NDArray[np.float64]:
        """Float64 (B,), mean value of each bin, its edge where it is empty."""
        return self._means(self._first_keys, self.offsets, self.counts)

    @staticmethod
    def _means(
        first_keys: NDArray[np.int64], offsets: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        first = values_of(first_keys).astype(np.float64)
        spacing = values_of(first_keys + 1) - first
        with np.errstate(invalid="ignore"):
            return np.where(offsets == 0, first, first + spacing * (offsets / counts))

    @property
    def _first_keys(self) -> NDArray[np.int64]:
        return self.low + (np.arange(self.counts.size) << self.shift)
