"""One-dimensional k-means, solved by bins and an exact dynamic programme.

In one dimension the groups of an optimal k-means are intervals, so a clustering is k-1 thresholds. The values are
counted in cells: a cell is one distinct value, or, for many values, a bin of a histogram whose cells are counted anew,
finer, where they blur the result. Then the cells are cut into at most `bins` runs: the run with the largest bound on
its own spread, count * width^2, is halved first, so that runs are narrow where the mass is and outliers get runs of
their own. On the counts and means of the runs the dynamic programme

    cost[g][j] = min over i <= j of cost[g-1][i-1] + sse(i..j)

finds the global optimum (Lloyd's iterations, as in scikit-learn's KMeans, stop in a local one). With fewer distinct
values than bins the result is the exact optimum of the values themselves, while they are not too many to sort.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from samplewise.cuda_ext.totals import Totals

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BINS = 1024  # inertia within 0.01 % of the optimum for 10 groups
_FEW = 1 << 16  # up to here values are sorted
_BLUR = 0.001  # inertia that the cells may hide, as a share of the whole
_MOST_ZOOMS = 8


def kmeans_thresholds(
    values: npt.ArrayLike, groups: int, *, bins: int = BINS, totals: Totals | None = None
) -> FloatArray:
    """Cut values into intervals of minimal within-group sum of squares.

    Args:
        values: float32 (M,), finite, M >= 1, in any order.
        groups: number of groups wanted, >= 1.
        bins: resolution of the dynamic programme, >= groups; time grows with its square.
        totals: counts them, where the values are one rank's share of all (`ShardedLedger.totals`); M may be 0 then.

    Returns:
        float32 (g-1,), ascending, g = min(groups, distinct values): group j holds the values x with
        thresholds[j-1] <= x < thresholds[j], and every group holds at least one value.

    Raises:
        ValueError: for no values, values that are not finite, groups < 1 or bins < groups.

    >>> kmeans_thresholds([1.0, 9.0, 1.2, 8.0, 1.1], 2)
    array([8.], dtype=float32)
    """
    if groups < 1:
        raise ValueError(f"kmeans_thresholds(groups={groups}): groups is the number of groups and must be >= 1")
    if bins < groups:
        raise ValueError(f"kmeans_thresholds(bins={bins}): bins must be >= groups, which is {groups}")
    checked = np.asarray(values, dtype=np.float32).reshape(-1)
    totals = totals or Totals()
    size = totals.total(checked.size)
    if size == 0:
        raise ValueError("kmeans_thresholds(values=[]): there must be at least one value")
    if checked.size and not (np.isfinite(checked.min()) and np.isfinite(checked.max())):  # NaN if one value is
        raise ValueError("kmeans_thresholds(values=...): values must be finite; drop the NaN (unseen) and inf first")
    if size <= _FEW:
        return _cut(_distinct(totals.gather(torch.from_numpy(checked)).numpy()), groups, bins)[0]
    cells = _count(checked, totals)
    for _ in range(_MOST_ZOOMS):
        thresholds, inertia = _cut(cells, groups, bins)
        hidden = cells.spreads / 12  # of values spread evenly over their cell
        if hidden.sum() <= _BLUR * inertia:
            break
        cells = _zoom(cells, checked, totals)
    return thresholds


@dataclass(frozen=True, eq=False)
class _Cells:
    """Disjoint intervals with values, ascending: float32 low, high, int64 counts, float64 means, all (m,)."""

    low: FloatArray
    high: FloatArray
    counts: IntArray
    means: Float64Array

    @property
    def spreads(self) -> Float64Array:
        """Bound on each cell's sum of squares, count * width^2: float64 (m,)."""
        spreads: Float64Array = self.counts * (self.high.astype(np.float64) - self.low) ** 2
        spreads[self.counts == 1] = 0
        return spreads


def _distinct(values: FloatArray) -> _Cells:
    distinct, counts = np.unique(values + np.float32(0), return_counts=True)  # -0 is 0
    return _Cells(distinct, distinct, counts, distinct.astype(np.float64))


def _count(values: FloatArray, totals: Totals, low: float | None = None, high: float | None = None) -> _Cells:
    counted = totals.histogram(torch.from_numpy(values), low=low, high=high)
    full = np.flatnonzero(counted.counts)
    return _Cells(counted.edges[full], counted.ends[full], counted.counts[full], counted.means[full])


def _zoom(cells: _Cells, values: FloatArray, totals: Totals) -> _Cells:
    """Count the cells with the largest spreads anew, or the one with the largest where they lie far apart."""
    worst = int(cells.spreads.argmax())
    blurred = np.flatnonzero(cells.spreads >= cells.spreads[worst] / 16)
    first, stop = blurred[0], blurred[-1] + 1
    if stop - first > cells.low.size // 2:
        first, stop = worst, worst + 1
    finer = _count(values, totals, float(cells.low[first]), float(cells.high[stop - 1]))
    parts = [
        np.concatenate((old[:first], new, old[stop:]))
        for old, new in ((getattr(cells, name), getattr(finer, name)) for name in ("low", "high", "counts", "means"))
    ]
    return _Cells(*parts)


def group_labels(values: npt.ArrayLike, thresholds: npt.ArrayLike) -> IntArray:
    """Group of each value, 0 (smallest values) to len(thresholds).

    Args:
        values: float32 (M,).
        thresholds: float32 (g-1,) from `kmeans_thresholds`.

    Returns:
        int64 (M,).

    >>> group_labels([1.0, 9.0, 8.0], [8.0])
    array([0, 1, 1])
    """
    cuts = np.asarray(thresholds, dtype=np.float32)
    return np.searchsorted(cuts, np.asarray(values, dtype=np.float32), side="right").astype(np.int64, copy=False)


def _cut(cells: _Cells, groups: int, bins: int) -> tuple[FloatArray, float]:
    """The thresholds of the best cut of the cells, and its inertia."""
    starts = _run_starts(cells, bins)
    counts = np.add.reduceat(cells.counts, starts)
    means = np.add.reduceat(cells.means * cells.counts, starts) / counts
    first, inertia = _first_runs(counts, means, min(groups, starts.size))
    return cells.low[starts[first]], inertia


def _run_starts(cells: _Cells, bins: int) -> IntArray:
    """First cell of each of b <= bins runs of cells: int64 (b,)."""
    starts = np.zeros(1, dtype=np.int64)
    before = np.append(0, np.cumsum(cells.counts))
    while True:
        stops = np.append(starts[1:], cells.low.size)
        low = cells.low[starts].astype(np.float64)
        width = cells.high[stops - 1] - low
        spread = (before[stops] - before[starts]) * width**2
        spread[stops - starts == 1] = 0  # one cell cannot be halved
        room, worst = bins - starts.size, spread.max()
        if room == 0 or worst == 0:
            return starts
        # A half has at most a quarter of its parent's bound: take all that would outlive the worst one's halves.
        split = np.flatnonzero(spread >= worst / 4)
        if split.size > room:
            split = split[np.argsort(-spread[split], kind="stable")[:room]]
        middle = np.searchsorted(cells.low, low[split] + width[split] / 2, side="right")
        starts = np.sort(np.append(starts, np.clip(middle, starts[split] + 1, stops[split] - 1)))


def _first_runs(counts: IntArray, means: Float64Array, groups: int) -> tuple[IntArray, float]:
    """First run of groups 1, 2, ... of the optimal cut of the runs, int64 (groups-1,), and its cost."""
    cost = _run_costs(counts, means)
    best = cost[:, 0]
    first = np.zeros((groups, counts.size), dtype=np.int64)
    rows = np.arange(counts.size)
    for group in range(1, groups):
        before = np.concatenate(([np.inf], best[:-1]))  # the groups that end just before run i
        total = cost + before
        first[group] = total.argmin(axis=1)
        best = total[rows, first[group]]
    cuts = np.empty(groups - 1, dtype=np.int64)
    end = counts.size - 1
    for group in range(groups - 1, 0, -1):
        cuts[group - 1] = first[group, end]
        end = cuts[group - 1] - 1
    return cuts, float(best[-1])


def _run_costs(counts: IntArray, means: Float64Array) -> Float64Array:
    """Sum of squares of runs i..j around their common mean, at [j, i]; inf for i > j.

    The sums grow by Welford's update, which has no cancellation: a group of one run costs exactly 0, at any scale.
    """
    size = counts.size
    cost = np.full((size, size), np.inf)
    weight, mean, total = np.zeros(size), np.zeros(size), np.zeros(size)
    for j in range(size):
        delta = means[j] - mean[: j + 1]
        joint = weight[: j + 1] + counts[j]
        share = counts[j] / joint
        total[: j + 1] += delta * delta * weight[: j + 1] * share
        mean[: j + 1] += delta * share
        weight[: j + 1] = joint
        cost[j, : j + 1] = total[: j + 1]
    return cost
