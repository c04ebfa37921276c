"""One-dimensional k-means, solved by bins and an exact dynamic programme.

In one dimension the groups of an optimal k-means are intervals, so a clustering is k-1 thresholds. The values are
sorted once and cut into at most `bins` intervals: the bin with the largest bound on its own spread, count * width^2,
is halved first, so that bins are narrow where the mass is and outliers get bins of their own. On the counts and means
of the bins the dynamic programme

    cost[g][j] = min over i <= j of cost[g-1][i-1] + sse(i..j)

finds the global optimum (Lloyd's iterations, as in scikit-learn's KMeans, stop in a local one). With fewer distinct
values than bins the result is the exact optimum of the values themselves.
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BINS = 1024  # inertia within 0.01 % of the optimum for 10 groups


def kmeans_thresholds(values: npt.ArrayLike, groups: int, *, bins: int = BINS) -> FloatArray:
    """Cut values into intervals of minimal within-group sum of squares.

    Args:
        values: float32 (M,), finite, M >= 1, in any order.
        groups: number of groups wanted, >= 1.
        bins: resolution of the dynamic programme, >= groups; time grows with its square.

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
    ordered = np.sort(np.asarray(values, dtype=np.float32), axis=None)
    if ordered.size == 0:
        raise ValueError("kmeans_thresholds(values=[]): there must be at least one value")
    if not (np.isfinite(ordered[0]) and np.isfinite(ordered[-1])):  # NaN sorts last
        raise ValueError("kmeans_thresholds(values=...): values must be finite; drop the NaN (unseen) and inf first")
    starts = _bin_starts(ordered, bins)
    counts = np.diff(starts, append=ordered.size)
    means = np.add.reduceat(ordered, starts, dtype=np.float64) / counts
    return ordered[starts[_first_bins(counts, means, min(groups, starts.size))]]


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


def _bin_starts(ordered: FloatArray, bins: int) -> IntArray:
    """Positions int64 (b,), b <= bins, at which the bins of a sorted array start; equal values share a bin."""
    starts = np.zeros(1, dtype=np.int64)
    while True:
        stops = np.append(starts[1:], ordered.size)
        low, high = ordered[starts], ordered[stops - 1]
        width = high.astype(np.float64) - low
        spread = (stops - starts) * width**2
        room, worst = bins - starts.size, spread.max()
        if room == 0 or worst == 0:
            return starts
        # A half has at most a quarter of its parent's bound: take all that would outlive the worst one's halves.
        split = np.flatnonzero(spread >= worst / 4)
        if split.size > room:
            split = split[np.argsort(-spread[split], kind="stable")[:room]]
        middle = (low[split] + width[split] / 2).astype(np.float32)
        middle = np.minimum(middle, np.nextafter(high[split], np.float32(-np.inf)))  # both halves keep a value
        starts = np.sort(np.append(starts, np.searchsorted(ordered, middle, side="right")))


def _first_bins(counts: IntArray, means: Float64Array, groups: int) -> IntArray:
    """First bin of groups 1, 2, ... of the optimal cut into `groups` runs of bins: int64 (groups-1,)."""
    cost = _run_costs(counts, means)
    best = cost[:, 0]
    first = np.zeros((groups, counts.size), dtype=np.int64)
    rows = np.arange(counts.size)
    for group in range(1, groups):
        before = np.concatenate(([np.inf], best[:-1]))  # the runs that end just before bin i
        total = cost + before
        first[group] = total.argmin(axis=1)
        best = total[rows, first[group]]
    cuts = np.empty(groups - 1, dtype=np.int64)
    end = counts.size - 1
    for group in range(groups - 1, 0, -1):
        cuts[group - 1] = first[group, end]
        end = cuts[group - 1] - 1
    return cuts


def _run_costs(counts: IntArray, means: Float64Array) -> Float64Array:
    """Sum of squares of bins i..j around their common mean, at [j, i]; inf for i > j.

    The sums grow by Welford's update, which has no cancellation: a run of one bin costs exactly 0, whatever the scale.
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
