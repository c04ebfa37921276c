"""Totals: what is found in the values of all samples, of which each rank may hold a part only."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext import ops, ranks
from samplewise.cuda_ext.histogram import Histogram

_LARGEST = float(np.finfo(np.float32).max)


class Totals:
    """Figures of values that are all here: one shard.

    A plan that takes what it must know of all samples from here, and looks at the rows that are here for the rest, is
    right for a sharded ledger too.
    """

    def gather(self, rows: Tensor) -> Tensor:
        """All shards' rows (n_s, ...), in the order of the shards."""
        return rows

    def each(self, number: int) -> list[int]:
        """Every shard's number."""
        return [int(n) for n in self.gather(torch.tensor([number]))]

    def total(self, number: int) -> int:
        """The sum of the shards' numbers."""
        return sum(self.each(number))

    def histogram(
        self, values: Tensor, *, low: float | None = None, high: float | None = None, bins: int = 65_536
    ) -> Histogram:
        """The histogram of all values, see :func:`samplewise.cuda_ext.ops.histogram`."""
        return ops.histogram(values, low=low, high=high, bins=bins)

    def mean(self, values: Tensor) -> float:
        """The mean of all finite ones of float32 values (n,): the same to the last bit for any order and shards.

        Raises:
            ValueError: there is none.
        """
        counted = self.histogram(values, low=-_LARGEST, high=_LARGEST)  # to look for the ends would take longer
        if counted.count == 0:
            raise ValueError("mean(values=...): there is no finite value.")
        return counted.mean

    def order_statistics(self, values: Tensor, ranks: Sequence[int]) -> NDArray[np.float32]:
        """The values of the given ranks among all, see :func:`samplewise.cuda_ext.ops.order_statistics`."""
        return ops.order_statistics(values, ranks)


class TotalsOverRanks(Totals):
    """Figures of values of which each rank holds a part, in bounded memory. Collective: all ranks ask, or none.

    Counts and sums are integers, so that they are the same to the last bit as those of one array of all values.
    """

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows (n_r, ...), in rank order, on the CPU."""
        return ranks.gather_rows(rows)[0]

    def histogram(
        self, values: Tensor, *, low: float | None = None, high: float | None = None, bins: int = 65_536
    ) -> Histogram:
        """The histogram of all ranks' values: a few hundred kilobytes of each rank travel."""
        if low is None or high is None:
            own = ops.finite_range(values) or (inf, -inf)
            ends = self.gather(torch.tensor([own], dtype=torch.float64))
            smallest, largest = float(ends[:, 0].min()), float(ends[:, 1].max())
            if smallest > largest:
                raise ValueError("histogram(values=...): there is no finite value on any rank.")
            low, high = smallest if low is None else low, largest if high is None else high
        own_bins = ops.histogram(values, low=low, high=high, bins=bins)
        counted = torch.from_numpy(np.stack([own_bins.counts, own_bins.offsets]))
        counts, offsets = self.gather(counted[None]).sum(dim=0).numpy()
        return Histogram(counts, offsets, own_bins.low, own_bins.shift)

    def order_statistics(self, values: Tensor, ranks: Sequence[int]) -> NDArray[np.float32]:
        """The values of the given ranks among all ranks' values."""
        return ops.counted_order_statistics(self.histogram, values, ranks)
