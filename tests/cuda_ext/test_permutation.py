"""permutation: it is one, any part of it is part of the whole, and its order is as good as random."""

import numpy as np
import pytest
import torch
from scipy import stats

from samplewise.cuda_ext import ops
from samplewise.loaders.seeding import derive

LARGE = [65_537, 100_003, 2**20, 1_000_003]
# A right permutation fails a test with this bound once in 10^4 seeds; the seeds here are fixed.
P_VALUE = 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257, 65_535, 65_536, *LARGE])
def test_permutation_is_one(n):
    values = ops.permutation(n, 42, 0, n)
    assert values.dtype == torch.int64
    assert torch.equal(values.sort().values, torch.arange(n))


@pytest.mark.parametrize("n", [1000, 65_536, *LARGE])
def test_any_chunk_and_stride_is_part_of_the_whole(n):
    whole = ops.permutation(n, 7, 0, n)
    for start, stride in [(0, 1), (n // 3, 1), (5, 2), (2, 3), (n - 1, 1), (1, 7)]:
        length = -(-(n - start) // stride)
        assert torch.equal(ops.permutation(n, 7, start, length, stride=stride), whole[start::stride])
    assert ops.permutation(n, 7, 3, 0).numel() == 0


def test_no_limit_at_2_24_and_no_list():
    n = 2**31
    some = ops.permutation(n, 5, n - 1000, 1000)
    assert some.unique().numel() == 1000
    assert 0 <= int(some.min()) < int(some.max()) < n
    assert int(some.max()) > 2**24


def test_keys_give_different_orders():
    assert not torch.equal(ops.permutation(100, 1, 0, 100), ops.permutation(100, 2, 0, 100))
    assert not torch.equal(ops.permutation(70_000, 1, 0, 100), ops.permutation(70_000, 2, 0, 100))


@pytest.mark.parametrize(("n", "keys"), [(5, 60_000), (70_000, 3_000)])
def test_every_place_is_equally_likely(n, keys):
    cells = 5
    for position in (0, 1, n - 1):
        where = [int(ops.permutation(n, derive(0, key), position, 1)) * cells // n for key in range(keys)]
        assert stats.chisquare(np.bincount(where, minlength=cells)).pvalue > P_VALUE


def test_all_orders_of_four_are_equally_likely():
    keys = 24_000
    orders = [tuple(ops.permutation(4, derive(1, key), 0, 4).tolist()) for key in range(keys)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert counts.size == 24
    assert stats.chisquare(counts).pvalue > P_VALUE


def independence(one, other, n, cells):
    """P-value of two orders of [0, n), cut into equal cells, being independent: chi-square with both margins fixed."""
    table = np.bincount(one * cells // n * cells + other * cells // n, minlength=cells**2).reshape(cells, cells)
    expected = np.outer(table.sum(1), table.sum(0)) / n
    statistic = (np.square(table - expected) / expected).sum() * (n - 1) / n
    return stats.chi2.sf(statistic, (cells - 1) ** 2)


@pytest.mark.parametrize("n", [2_000, 65_537, 200_000, 1_000_003])
@pytest.mark.parametrize("cells", [8, 32])
def test_position_and_value_and_consecutive_epochs_are_independent(n, cells):
    places, previous, p_values = np.arange(n), None, []
    for epoch in range(8):
        order = ops.permutation(n, derive(3, epoch, "order"), 0, n).numpy()
        p_values += [independence(places, order, n, cells), independence(order, np.roll(order, 1), n, cells)]
        if previous is not None:
            p_values.append(independence(previous, order, n, cells))
        previous = order
    assert min(p_values) > P_VALUE / len(p_values)
    assert stats.kstest(p_values, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize("n", [2_000, 200_000])
def test_neighbours_are_not_kept_together(n):
    """For a random permutation, |p(i+1) - p(i)| has mean (n^2 - 1) / (3 n) and lag correlation 0 +- 1/sqrt(n)."""
    values = ops.permutation(n, 11, 0, n).double()
    steps = (values[1:] - values[:-1]).abs()
    sd = n / np.sqrt(18)  # of one |difference| of two uniforms
    assert abs(float(steps.mean()) - n / 3) < 5 * sd / np.sqrt(n) * np.sqrt(2)
    for lag in (1, 2, 256, 448):
        r = np.corrcoef(values[lag:], values[:-lag])[0, 1]
        assert abs(r) < 5 / np.sqrt(n)
    r = np.corrcoef(values, np.arange(n))[0, 1]
    assert abs(r) < 5 / np.sqrt(n)
