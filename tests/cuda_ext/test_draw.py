"""draw: its variates are exponential, its items are drawn as often as they should be, epochs are independent."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy import stats

from samplewise.cuda_ext import ops, reference
from samplewise.cuda_ext.hashing import hash64
from samplewise.loaders.seeding import derive

# A right draw fails a test with this bound once in 10^4 seeds; the seeds here are fixed.
P_VALUE = 1e-4


def drawn(weights, k, seed):
    return ops.draw(torch.tensor(weights, dtype=torch.float32), k, seed)[0].numpy()


def test_the_variates_are_exponential():
    variates = reference.exponential(hash64(np.arange(400_000, dtype=np.uint64), 5)).astype(np.float64)
    assert stats.kstest(variates, "expon").pvalue > P_VALUE
    bounds = -np.log1p(-np.array([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]))
    counts = np.diff(np.searchsorted(np.sort(variates), bounds), prepend=0, append=variates.size)
    counts[-1] = variates.size - counts[:-1].sum()
    expected = np.diff(stats.expon.cdf(bounds), prepend=0, append=1) * variates.size
    assert stats.chisquare(counts, expected).pvalue > P_VALUE


def test_the_variates_keep_their_precision_at_both_ends():
    """Against float64, from the hash's extremes to its middle: relative errors of a few roundings."""
    steps = np.uint64(1) << np.arange(64, dtype=np.uint64)
    hashes = np.unique(np.concatenate([steps, steps - np.uint64(1), ~steps, steps * np.uint64(3)]))
    got = reference.exponential(hashes).astype(np.float64)
    v = ((hashes >> np.uint64(1)) & np.uint64(2**62 - 1)).astype(np.longdouble) + np.longdouble(0.5)
    v = v / np.longdouble(2) ** 63  # 62 bits below the leading one, in (0, 1/2)
    upper = (hashes >> np.uint64(63)).astype(bool)
    exact = np.where(upper, -np.log(v), -np.log1p(-v)).astype(np.float64)
    assert (got > 0).all()
    np.testing.assert_allclose(got, exact, rtol=5 * 2.0**-24)


def test_every_subset_is_drawn_as_often_as_it_should_be():
    """Successive sampling: the probability of a subset is the sum over its orders of prod w_i / (what is left)."""
    weights, k, draws = np.array([1.0, 0.5, 0.25, 2.0, 0.1]), 2, 40_000
    expected = {}
    for subset in combinations(range(5), k):
        expected[subset] = 0.0
        for order in permutations(subset):
            left, p = weights.sum(), 1.0
            for i in order:
                p *= weights[i] / left
                left -= weights[i]
            expected[subset] += p
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        counts[tuple(drawn(weights, k, derive(0, seed, "draw")).tolist())] += 1
    assert stats.chisquare(list(counts.values()), np.array(list(expected.values())) * draws).pvalue > P_VALUE


def test_tau_gives_unbiased_weights():
    """The sum of values / inclusion probability has the values' sum as its mean, to within 4 standard errors."""
    generator = np.random.default_rng(2)
    weights = (generator.pareto(1.5, 400) + 0.05).astype(np.float32)
    values = generator.normal(3, 1, 400) + weights
    estimates = []
    for seed in range(3000):
        ids, tau = ops.draw(torch.from_numpy(weights), 150, seed)
        estimates.append((values[ids] / -np.expm1(-weights[ids].astype(np.float64) * tau)).sum())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - values.sum()) < 4 * error
    assert error < 0.005 * values.sum()  # the test can fail


@pytest.mark.parametrize("n", [1000, 300_000])
def test_equal_weights_favour_no_id(n):
    draws, blocks = (400, 50) if n == 1000 else (5, 50)
    counts = np.zeros(blocks)
    for seed in range(draws):
        counts += np.bincount(drawn(np.ones(n), n // 3, seed) * blocks // n, minlength=blocks)
    share = (n // 3) / n  # a block's count has the variance of a hypergeometric variable
    size = n / blocks
    variance = draws * size * share * (1 - share) * (n - size) / (n - 1)
    statistic = np.square(counts - draws * size * share).sum() / variance * (blocks - 1) / blocks
    assert P_VALUE < stats.chi2.sf(statistic, blocks - 1) < 1 - P_VALUE


@pytest.mark.parametrize("seeds", ["derived", "consecutive"])
def test_consecutive_epochs_are_independent(seeds):
    """The overlap of two draws of n/2 out of n is hypergeometric."""
    n, k, epochs = 20_000, 10_000, 120
    keys = [derive(4, epoch, "draw") if seeds == "derived" else epoch for epoch in range(epochs)]
    sets = [np.isin(np.arange(n), drawn(np.ones(n), k, key)) for key in keys]
    for lag in (1, 2):
        overlaps = np.array([np.count_nonzero(a & b) for a, b in zip(sets[lag:], sets, strict=False)])
        p_values = stats.hypergeom.cdf(overlaps, n, k, k)
        assert stats.kstest(p_values, "uniform").pvalue > P_VALUE


def test_ids_beyond_2_24_are_drawn_too():
    n = 2**24 + 2**20
    ids, _ = ops.draw(torch.ones(n), 100_000, 1)
    beyond = int((ids >= 2**24).sum())
    share = 2**20 / n
    assert abs(beyond - 100_000 * share) < 5 * np.sqrt(100_000 * share)
    assert (ids[1:] > ids[:-1]).all()


def test_items_without_weight_come_last():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0])
    for seed in range(50):
        ids, tau = ops.draw(weights, 2, seed)
        assert ids.tolist() == [1, 3]
        assert tau == float("inf")
