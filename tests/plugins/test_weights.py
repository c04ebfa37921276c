"""Monte-Carlo tests allow 5 standard errors of the mean of R repetitions: a false alarm in 1.7 million comparisons."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest

from samplewise.plugins import weights as w

BEYOND_FLOAT32 = 2**24 + 1


def rng(seed=0):
    return np.random.default_rng(seed)


def assert_frequencies(hits, repetitions, probabilities, sigmas=5.0):
    """Counts of events of known probability: their standard deviation is sqrt(R p (1 - p))."""
    probabilities = np.asarray(probabilities)
    error = np.sqrt(repetitions * probabilities * (1 - probabilities))
    assert (np.abs(hits - repetitions * probabilities) <= sigmas * error + 1e-9).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1, 1, 1], 4), ([5.0, 0.0, 0.0], 1), ([1, 2], 9 / 5), ([], 0), ([0.0], 0), ([1e300, 1e300], 2)],
)
def test_effective_sample_size(values, expected):
    assert w.effective_sample_size(np.array(values, dtype=np.float64)) == pytest.approx(expected)


# --- defensive mixture ------------------------------------------------------------------------------------------------


def test_defensive_mixture_by_hand():
    np.testing.assert_allclose(w.defensive_mixture([0, 1, 3], mix=0.6), [0.4 / 3, 0.15 + 0.4 / 3, 0.45 + 0.4 / 3])
    np.testing.assert_allclose(w.defensive_mixture([0.0, 0.0]), [0.5, 0.5])
    np.testing.assert_allclose(w.defensive_mixture([1.0, 9.0], mix=0), [0.5, 0.5])


def test_defensive_mixture_bounds_the_weights():
    p = w.defensive_mixture(rng().pareto(0.5, 10_000).astype(np.float32), mix=0.9)
    assert p.dtype == np.float64
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (1 / (p.size * p)).max() <= 1 / (1 - 0.9) + 1e-9
    scores = np.array([1e308, 1e308])  # left alone, and their sum does not overflow
    np.testing.assert_allclose(w.defensive_mixture(scores), [0.5, 0.5])
    assert scores[0] == 1e308


# --- uniform subset ---------------------------------------------------------------------------------------------------


def test_subset_includes_each_id_and_each_pair_equally_often():
    n, k, repetitions = 12, 5, 6000
    generator, together = rng(1), np.zeros((n, n))
    for _ in range(repetitions):
        ids = w.subset(n, k, generator)
        together[np.ix_(ids, ids)] += 1
    assert_frequencies(together.diagonal(), repetitions, np.full(n, k / n))
    pairs = together[np.triu_indices(n, 1)]
    assert_frequencies(pairs, repetitions, np.full(pairs.size, k * (k - 1) / (n * (n - 1))))


class TiedKeys:
    """A generator whose keys take two values only, so that nearly every draw has ties at its bound."""

    def __init__(self, seed):
        self._rng = rng(seed)
        self.choice = self._rng.choice

    def integers(self, low, high, size, dtype):
        return self._rng.integers(0, 2, size).astype(dtype)


def test_subset_breaks_ties_by_lot_not_by_index():
    n, k, repetitions = 10, 4, 6000
    generator, hits = TiedKeys(2), np.zeros(n)
    for _ in range(repetitions):
        ids = w.subset(n, k, generator)
        assert ids.size == k
        hits[ids] += 1
    assert_frequencies(hits, repetitions, np.full(n, k / n))


@pytest.mark.parametrize(("n", "k"), [(7, 0), (7, 1), (7, 6), (7, 7), (1, 1), (0, 0), (100_000, 50_000)])
def test_subset_is_ascending_unique_int64(n, k):
    ids = w.subset(n, k, rng())
    assert ids.dtype == np.int64
    assert ids.size == k
    assert (np.diff(ids) > 0).all()
    assert k == 0 or (ids[0] >= 0 and ids[-1] < n)


# --- without replacement ----------------------------------------------------------------------------------------------


def test_draw_without_replacement_is_successive_sampling():
    p, k, repetitions = np.array([0.1, 0.2, 0.3, 0.4]), 2, 20_000
    expected = np.zeros((4, 4))
    for first, second in permutations(range(4), 2):
        expected[tuple(sorted((first, second)))] += p[first] * p[second] / (1 - p[first])
    generator, hits = rng(3), np.zeros((4, 4))
    for _ in range(repetitions):
        ids, _ = w.draw_without_replacement(p, k, generator)
        hits[tuple(ids)] += 1
    upper = np.triu_indices(4, 1)
    assert_frequencies(hits[upper], repetitions, expected[upper])


def relative_biases(estimates, truth):
    values = np.array(estimates) / truth - 1
    return values.mean(axis=0), values.std(axis=0) / np.sqrt(len(values))


def test_draw_without_replacement_has_unbiased_weights_where_naive_ones_are_off():
    """T16. One estimate has a relative standard deviation of about 2.5 %: 2,000 give 0.06 %, so 5 SE < 0.5 %."""
    size, k = 2000, 1000
    scores = rng(4).lognormal(0, 1.3, size)
    p = w.defensive_mixture(scores, mix=0.9)
    generator, estimates = rng(5), []
    for _ in range(2000):
        ids, a = w.draw_without_replacement(p, k, generator)
        naive = 1 / (size * p[ids])
        losses = scores[ids]
        estimates.append(((a * losses).mean(), (naive * losses).sum() / naive.sum(), naive.mean() * scores.mean()))
    (ours, self_normalised, naive), error = relative_biases(estimates, scores.mean())
    assert 5 * error[0] < 0.005
    assert abs(ours) < 0.005
    assert self_normalised < -0.08
    assert naive > 0.3  # the naive weights' mean should be 1


def test_draw_without_replacement_has_no_order_by_weight():
    """T15: in ascending ids, heavy items do not come first."""
    scores = rng(6).permutation(np.repeat([1.0, 20.0], 20_000))
    ids, _ = w.draw_without_replacement(scores, 20_000, rng(7))
    heavy = scores[ids] == 20
    first, last = heavy[:1000].mean(), heavy[-1000:].mean()
    assert abs(first - last) < 5 * np.sqrt(2 * heavy.mean() * (1 - heavy.mean()) / 1000)


def test_draw_without_replacement_never_takes_weight_zero():
    values = np.array([0.0, 1.0, 0.0, 2.0, 3.0], dtype=np.float32)
    generator = rng(8)
    for _ in range(200):
        assert set(w.draw_without_replacement(values, 2, generator)[0]) <= {1, 3, 4}
    ids, a = w.draw_without_replacement(values, 3, generator)
    assert ids.tolist() == [1, 3, 4]
    assert a.tolist() == [1, 1, 1]


def test_draw_without_replacement_of_everything_or_nothing():
    ids, a = w.draw_without_replacement([1.0, 5.0, 2.0], 3, rng())
    assert ids.tolist() == [0, 1, 2]
    assert a.tolist() == [1, 1, 1]
    ids, a = w.draw_without_replacement([1.0, 5.0], 0, rng())
    assert ids.size == a.size == 0
    assert (ids.dtype, a.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e20, 1e300])
def test_draw_without_replacement_is_free_of_scale(scale):
    values = rng(9).random(500)
    ids, a = w.draw_without_replacement(values, 100, rng(10))
    scaled_ids, scaled_a = w.draw_without_replacement(values * scale, 100, rng(10))
    np.testing.assert_array_equal(ids, scaled_ids)
    np.testing.assert_allclose(a, scaled_a, rtol=1e-5)
    assert a.mean() == pytest.approx(1, abs=1e-5)


def test_draw_without_replacement_of_weights_beyond_float32():
    values = np.array([1.0, 1.0, 1e-50, 1e-50])
    with pytest.raises(ValueError, match="37 decades"):
        w.draw_without_replacement(values, 3, rng())


# --- exact inclusion probabilities ------------------------------------------------------------------------------------

PI_CASES = [
    ([1, 1, 2], 1, [0.25, 0.25, 0.5]),
    ([10, 1, 1, 1, 1], 3, [1, 0.5, 0.5, 0.5, 0.5]),
    ([100, 10, 1, 1, 1], 3, [1, 1, 1 / 3, 1 / 3, 1 / 3]),
    ([2, 2, 2], 3, [1, 1, 1]),
    ([0, 3, 5], 2, [0, 1, 1]),
    ([1, 2, 3], 0, [0, 0, 0]),
    ([4, 4, 1, 1], 2, [0.8, 0.8, 0.2, 0.2]),
    ([1e308, 1e308, 1e308], 2, [2 / 3, 2 / 3, 2 / 3]),
]


@pytest.mark.parametrize(("values", "k", "expected"), PI_CASES)
def test_inclusion_probabilities_by_hand(values, k, expected):
    np.testing.assert_allclose(w.inclusion_probabilities(np.array(values, dtype=np.float64), k), expected)


def test_inclusion_probabilities_sum_to_k():
    for seed in range(20):
        values = rng(seed).pareto(0.4, 300)
        pi = w.inclusion_probabilities(values, 120)
        assert pi.sum() == pytest.approx(120)
        assert pi.max() <= 1
        free = pi < 1
        np.testing.assert_allclose(pi[free] / pi[free][0], values[free] / values[free][0])


@pytest.mark.parametrize(("values", "k", "expected"), [case for case in PI_CASES if case[1]])
def test_draw_systematic_has_exact_size_and_probabilities(values, k, expected):
    values, repetitions = np.array(values, dtype=np.float64), 4000
    generator, hits = rng(11), np.zeros(values.size)
    for _ in range(repetitions):
        ids, pi = w.draw_systematic(values, k, generator)
        assert ids.size == k
        assert (np.diff(ids) > 0).all()
        hits[ids] += 1
    np.testing.assert_allclose(pi, np.array(expected)[ids])
    assert_frequencies(hits, repetitions, expected)


def test_draw_systematic_can_include_any_pair():
    """On a fixed order neighbours would exclude each other."""
    generator, together = rng(12), np.zeros((8, 8))
    for _ in range(2000):
        ids, _ = w.draw_systematic(np.ones(8), 2, generator)
        together[np.ix_(ids, ids)] += 1
    pairs = together[np.triu_indices(8, 1)]
    assert_frequencies(pairs, 2000, np.full(28, 1 / 28))


def test_draw_systematic_is_unbiased_and_nearly_sure_items_do_not_repeat():
    values = rng(13).random(5000) + np.where(np.arange(5000) < 10, 1e4, 0)
    generator, estimates = rng(14), []
    for _ in range(400):
        ids, pi = w.draw_systematic(values, 4999, generator)
        assert np.unique(ids).size == 4999
        estimates.append((np.sqrt(ids) / pi).sum() / 5000)
    bias, error = relative_biases(estimates, np.sqrt(np.arange(5000)).mean())
    assert abs(bias) < 5 * error


class EdgeOfRange:
    """A generator whose uniform number is the largest below 1, so that sums of it round up to the next integer."""

    shuffle = staticmethod(rng().shuffle)

    def random(self):
        return np.nextafter(1, 0)


def test_systematic_draws_stay_in_range_where_sums_round_up():
    ids, _ = w.draw_systematic(np.ones(5000), 4000, EdgeOfRange())
    assert np.unique(ids).size == 4000
    ids = w.draw_with_replacement([*np.ones(5000), 0.0], 4000, EdgeOfRange())
    assert ids[-1] == 4999


def test_draw_poisson_keeps_each_on_its_own():
    pi = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    generator, repetitions = rng(15), 6000
    kept = np.zeros((repetitions, 5))
    for row in kept:
        row[w.draw_poisson(pi, generator)] = 1
    assert_frequencies(kept.sum(axis=0), repetitions, pi)
    assert_frequencies((kept[:, 1] * kept[:, 2]).sum(), repetitions, 0.05)


# --- with replacement -------------------------------------------------------------------------------------------------


def test_draw_with_replacement_one_at_a_time_passes_chi_square():
    p, repetitions = np.array([0.05, 0.1, 0.15, 0.2, 0.5]), 20_000
    generator, hits = rng(16), np.zeros(5)
    for _ in range(repetitions):
        hits[w.draw_with_replacement(p, 1, generator)] += 1
    chi_square = ((hits - repetitions * p) ** 2 / (repetitions * p)).sum()
    assert chi_square < 33.4  # 4 degrees of freedom: exceeded once in a million


def test_draw_with_replacement_comes_up_as_often_as_expected():
    values, k, repetitions = rng(17).pareto(1.0, 50), 333, 2000
    expected = k * values / values.sum()
    generator, total = rng(18), np.zeros(50)
    for _ in range(repetitions):
        times = np.bincount(w.draw_with_replacement(values, k, generator), minlength=50)
        assert (np.abs(times - expected) < 1 + 1e-9).all()
        total += times
    assert_frequencies(total - repetitions * np.floor(expected), repetitions, expected % 1)


def test_draw_with_replacement_never_takes_weight_zero():
    values = np.array([0, 0, 1, 0, 2, 0, 0], dtype=np.float32)
    generator = rng(19)
    for k in range(200):
        assert set(w.draw_with_replacement(values, k, generator)) <= {2, 4}


def test_draw_with_replacement_of_weights_whose_sum_is_beyond_float64():
    ids = w.draw_with_replacement(np.full(4, 1e308), 400, rng())
    assert np.bincount(ids).tolist() == [100] * 4


# --- large draws ------------------------------------------------------------------------------------------------------


def test_draws_beyond_two_to_the_24_reach_the_last_ids():
    """T14: torch.multinomial refuses this size, and float32 sums or keys lose its upper half."""
    size = BEYOND_FLOAT32
    last = np.zeros(size, dtype=np.float32)
    last[-10:] = 1
    tail = np.arange(size - 10, size)
    np.testing.assert_array_equal(w.draw_without_replacement(last, 10, rng())[0], tail)
    np.testing.assert_array_equal(w.draw_with_replacement(last, 10, rng()), tail)
    np.testing.assert_array_equal(w.draw_poisson(last, rng()), tail)
    np.testing.assert_array_equal(w.draw_systematic(last, 10, rng())[0], tail)


@pytest.mark.parametrize("draw", [lambda v, k, g: w.draw_without_replacement(v, k, g)[0], w.draw_with_replacement])
def test_draws_beyond_two_to_the_24_are_even_over_the_ids(draw):
    size, k = BEYOND_FLOAT32, 1_000_000
    ids = draw(np.ones(size, dtype=np.float32), k, rng(20))
    assert ids.size == k
    shares = np.bincount(ids * 16 // size, minlength=16)
    assert_frequencies(shares, k, np.full(16, 1 / 16))


def test_draw_with_replacement_sums_in_float64():
    """A float32 sum stays at 2^24 when ones are added to it."""
    values = np.ones(BEYOND_FLOAT32, dtype=np.float32)
    values[0] = BEYOND_FLOAT32 - 1
    ids = w.draw_with_replacement(values, 10_000, rng(22))
    assert np.count_nonzero(ids) == 5000


def test_draw_of_fifty_million_stays_within_thirty_bytes_a_sample():
    size = 50_000_000
    values = np.ones(size, dtype=np.float32)
    for draw in (w.subset, w.draw_without_replacement):
        tracemalloc.start()
        drawn = draw(size if draw is w.subset else values, size // 2, rng(21))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        ids = drawn if draw is w.subset else drawn[0]
        assert ids.size == size // 2
        assert (np.diff(ids) > 0).all()
        assert peak <= 30 * size


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_VALUES = [[1.0, np.nan], [1.0, np.inf], [1.0, -1.0], [[1.0, 2.0]]]


@pytest.mark.parametrize("values", BAD_VALUES)
@pytest.mark.parametrize(
    ("name", "argument", "call"),
    [
        ("effective_sample_size", "weights", w.effective_sample_size),
        ("defensive_mixture", "scores", w.defensive_mixture),
        ("draw_without_replacement", "weights", lambda v: w.draw_without_replacement(v, 1, rng())),
        ("draw_with_replacement", "weights", lambda v: w.draw_with_replacement(v, 1, rng())),
        ("inclusion_probabilities", "weights", lambda v: w.draw_systematic(v, 1, rng())),
        ("draw_poisson", "pi", lambda v: w.draw_poisson(v, rng())),
    ],
)
def test_bad_values_name_the_argument_and_the_rule(name, argument, call, values):
    with pytest.raises(ValueError, match=rf"{name}\({argument}=\.\.\.\): {argument} must"):
        call(np.array(values))


@pytest.mark.parametrize("k", [-1, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda k: w.subset(2, k, rng()),
        lambda k: w.draw_without_replacement([1.0, 2.0, 0.0], k, rng()),
        lambda k: w.draw_systematic([1.0, 2.0, 0.0], k, rng()),
    ],
)
def test_too_many_or_negative_k(call, k):
    with pytest.raises(
        ValueError, match=rf"\(k={k}\): k is the number of items to draw and must lie between 0 and .*2"
    ):
        call(k)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="must be >= 0"):
        w.draw_with_replacement([1.0], -1, rng())
    with pytest.raises(ValueError, match="at least one weight must be positive"):
        w.draw_with_replacement([0.0], 1, rng())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        w.draw_poisson([0.5, 1.5], rng())
    with pytest.raises(TypeError, match="must be an integer"):
        w.subset(5, 2.5, rng())
    with pytest.raises(TypeError, match="real numbers"):
        w.effective_sample_size(["a"])
    for mix in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"mix is the scores' share"):
            w.defensive_mixture([1.0], mix=mix)
