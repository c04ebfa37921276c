"""histogram: order, exact sums, and order statistics from it."""

import numpy as np
import pytest
import torch

from samplewise.cuda_ext import ops
from samplewise.cuda_ext.reference import order_keys, values_of

NAN, INF = float("nan"), float("inf")


def values_named(name, size=30_000):
    rng = np.random.default_rng(0)
    values = {
        "lognormal": rng.lognormal(0, 2, size),
        "normal": rng.normal(0, 1, size),
        "with NaN": np.where(rng.random(size) < 0.5, NAN, rng.exponential(1, size)),
        "tiny range": 1000 + rng.random(size) * 0.01,
        "constant": np.full(size, 0.7),
        "few": rng.integers(-3, 4, size),
        "zeros": np.array([0.0, -0.0] * 10),
        "denormals": rng.integers(-9, 10, size) * 1e-45,
        "extremes": np.array([-3.4e38, 3.4e38, 0.0, 1e-38, INF, -INF, NAN]),
    }
    return values[name].astype(np.float32)


NAMES = "lognormal", "normal", "with NaN", "tiny range", "constant", "few", "zeros", "denormals", "extremes"


def test_keys_keep_the_order_and_can_be_turned_back():
    values = np.array([-INF, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-38, 1.0, np.nextafter(np.float32(1), 2), 3e38, INF])
    values = values.astype(np.float32)
    keys = order_keys(values).astype(np.int64)
    assert (np.diff(keys) > 0).all()
    assert keys[8] - keys[7] == 1
    np.testing.assert_array_equal(values_of(keys), values)
    assert order_keys(np.array([-0.0], dtype=np.float32)) == order_keys(np.array([0.0], dtype=np.float32))


@pytest.mark.parametrize("bins", [512, 65_536])
@pytest.mark.parametrize("name", NAMES)
def test_counts_and_sums_are_those_of_the_values(name, bins):
    values = values_named(name)
    counted = ops.histogram(torch.from_numpy(values), bins=bins)
    finite = values[np.isfinite(values)]
    assert counted.counts.size <= bins
    assert counted.count == finite.size
    where = np.searchsorted(counted.edges, finite, side="right") - 1
    np.testing.assert_array_equal(np.bincount(where, minlength=counted.counts.size), counted.counts)
    assert (finite <= counted.ends[where]).all()
    sums = np.zeros(counted.counts.size)
    np.add.at(sums, where, finite.astype(np.float64))
    scale = np.abs(finite).astype(np.float64).sum()
    np.testing.assert_allclose(counted.counts * counted.means, sums, rtol=1e-12, atol=1e-12 * scale)
    assert counted.mean == pytest.approx(finite.astype(np.float64).mean(), rel=1e-9, abs=1e-15 * scale)


def test_bins_are_never_wider_than_a_128th_of_the_value():
    counted = ops.histogram(torch.from_numpy(values_named("extremes")))
    edges, ends = counted.edges.astype(np.float64), counted.ends.astype(np.float64)
    normal = (np.abs(edges) > 1e-37) & (np.abs(ends) > 1e-37)
    assert ((ends - edges)[normal] <= np.abs(edges[normal]) / 128 * (1 + 1e-6) + 1e-38).all()


def test_the_mean_is_the_same_for_any_order():
    values = values_named("lognormal")
    means = {ops.histogram(torch.from_numpy(np.random.default_rng(s).permutation(values))).mean for s in range(5)}
    assert len(means) == 1


def test_a_constant_is_its_own_mean():
    assert ops.histogram(torch.full((12345,), 0.1)).mean == np.float32(0.1)


@pytest.mark.parametrize("few", [0, 2**31], ids=["counted", "sorted"])
@pytest.mark.parametrize("name", NAMES)
def test_order_statistics_are_those_of_the_sorted_values(name, few, monkeypatch):
    monkeypatch.setattr(ops, "_FEW", few)
    values = values_named(name)
    ordered = np.sort(values[np.isfinite(values)])
    ranks = sorted({0, 1, ordered.size // 5, ordered.size // 2, ordered.size - 2, ordered.size - 1})
    np.testing.assert_array_equal(ops.order_statistics(torch.from_numpy(values), ranks), ordered[ranks])
