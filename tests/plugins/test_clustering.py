from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
from ranks_support import Threads
from sklearn.cluster import KMeans

from samplewise.cuda_ext.totals import TotalsOverRanks
from samplewise.plugins import clustering
from samplewise.plugins.clustering import BINS, group_labels, kmeans_thresholds


@pytest.fixture(params=["sorted", "counted"])
def way(request, monkeypatch):
    """Few values are sorted, many are counted in a histogram: here both ways for any number."""
    monkeypatch.setattr(clustering, "_FEW", 2**31 if request.param == "sorted" else 0)


def inertia(values, labels):
    values = values.astype(np.float64)
    return sum(((values[labels == g] - values[labels == g].mean()) ** 2).sum() for g in np.unique(labels))


def optimum(values, groups):
    """Inertia of the best cut of the sorted distinct values, by trying all of them."""
    distinct = np.unique(values)
    best = np.inf
    for cuts in combinations(range(1, distinct.size), min(groups, distinct.size) - 1):
        best = min(best, inertia(values, np.searchsorted(distinct[list(cuts)], values, side="right")))
    return best


def distribution(name, size=10_000):
    rng = np.random.default_rng(0)
    heavy = rng.gamma(1, 0.5, size)
    heavy[:5] = 1e6 * np.arange(1, 6)
    values = {
        "lognormal": rng.lognormal(-1, 2, size),
        "exponential": rng.exponential(1, size),
        "bimodal": np.where(rng.random(size) < 0.7, rng.normal(0.05, 0.02, size), rng.normal(3, 0.8, size)),
        "outliers 1e6 away": heavy,
        "heavy tail": rng.standard_cauchy(size),
        "tiny range": 1000 + rng.random(size) * 0.01,
        "negative": rng.normal(-3, 2, size),
        "few distinct": rng.integers(0, 30, size),
        "many zeros": np.where(rng.random(size) < 0.8, 0, rng.lognormal(0, 1, size)),
        "narrow, with outliers": np.append(1 + rng.random(size) * 0.1, [0.0, -1e30]),
        "two narrow ones": np.append(1 + rng.random(size) * 1e-4, 1e6 + rng.random(size)),
    }
    return values[name].astype(np.float32)


NAMES = [
    "lognormal",
    "exponential",
    "bimodal",
    "outliers 1e6 away",
    "heavy tail",
    "tiny range",
    "negative",
    "few distinct",
    "many zeros",
    "narrow, with outliers",
    "two narrow ones",
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("groups", [5, 10])
@pytest.mark.parametrize("name", NAMES)
def test_inertia_is_no_worse_than_scikit_learns(name, groups, way):
    values = distribution(name)
    labels = group_labels(values, kmeans_thresholds(values, groups))
    assert np.array_equal(np.unique(labels), np.arange(groups))
    assert inertia(values, labels) <= 1.001 * inertia(values, scikit_learns(name, groups))


@lru_cache
def scikit_learns(name, groups):
    values = distribution(name).astype(np.float64)[:, None]
    return KMeans(groups, n_init=10, random_state=0).fit_predict(values)


@pytest.mark.parametrize("seed", range(30))
def test_small_inputs_get_the_exact_optimum(seed):
    rng = np.random.default_rng(seed)
    values = (rng.lognormal(0, 2, 12) if seed % 2 else rng.integers(-4, 5, 12)).astype(np.float32)
    for groups in (1, 2, 3, 4):
        labels = group_labels(values, kmeans_thresholds(values, groups))
        assert inertia(values, labels) == pytest.approx(optimum(values, groups), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bins_come_near_the_optimum_of_many_more_bins(name, way):
    values = distribution(name)
    coarse, fine = (
        inertia(values, group_labels(values, kmeans_thresholds(values, 10, bins=b))) for b in (BINS, 4 * BINS)
    )
    assert coarse <= 1.0002 * fine


def test_groups_are_ordered_and_thresholds_are_their_smallest_values():
    values = np.array([5.0, 0.1, 9.0, 0.2, 5.1, 9.2], dtype=np.float32)
    thresholds = kmeans_thresholds(values, 3)
    assert thresholds.dtype == np.float32
    assert thresholds.tolist() == [5.0, 9.0]
    labels = group_labels(values, thresholds)
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("values", "groups", "expected"),
    [
        ([3.0], 4, []),
        ([2.0, 2.0, 2.0], 3, []),
        ([2.0, 1.0, 2.0], 5, [2.0]),
        ([-0.0, 0.0], 2, []),
        ([1.0, np.nextafter(np.float32(1), np.float32(2))], 2, [np.nextafter(np.float32(1), np.float32(2))]),
        ([-3e38, 3e38, 0.0], 3, [0.0, 3e38]),
        ([1e-45, 3e-45, 0.0], 3, [1e-45, 3e-45]),
    ],
)
def test_fewer_distinct_values_than_groups_and_extremes(values, groups, expected):
    np.testing.assert_array_equal(kmeans_thresholds(values, groups), np.array(expected, dtype=np.float32))


def test_an_outlier_of_any_size_does_not_blur_the_rest(way):
    values = np.append(np.repeat(np.array([0.0, 1.0, 2.0], dtype=np.float32), 1000), np.float32(1e30))
    assert np.bincount(group_labels(values, kmeans_thresholds(values, 4))).tolist() == [1000, 1000, 1000, 1]


def test_order_does_not_matter_and_the_input_is_left_alone(way):
    values = distribution("lognormal")
    shuffled = np.random.default_rng(1).permutation(values)
    before = shuffled.copy()
    np.testing.assert_array_equal(kmeans_thresholds(values, 7), kmeans_thresholds(shuffled, 7))
    np.testing.assert_array_equal(shuffled, before)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_the_values_give_the_thresholds_of_all(name, way, monkeypatch):
    values = np.append(distribution(name), np.float32(3))
    expected = kmeans_thresholds(values, 7)
    shares = [values[1::2], values[::2], values[:0]]  # one rank has none

    def thresholds(rank):
        return kmeans_thresholds(shares[rank], 7, totals=TotalsOverRanks())

    for found in Threads(monkeypatch).run(3, thresholds):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans_thresholds([1.0], 0), "groups=0"),
        (lambda: kmeans_thresholds([], 2), "at least one value"),
        (lambda: kmeans_thresholds([1.0, np.nan], 2), "finite"),
        (lambda: kmeans_thresholds([-np.inf, 1.0], 2), "finite"),
        (lambda: kmeans_thresholds([1.0], 5, bins=4), "bins=4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
