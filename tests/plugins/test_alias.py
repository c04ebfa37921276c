import numpy as np
import pytest
from frequencies import assert_drawn_by

from samplewise.plugins.alias import AliasTable

MANY = np.random.default_rng(0)
WIDE = np.finfo(np.longdouble).nmant > 52  # whether cumulative sums lose nothing of a float64
TABLES = {
    "one": [3.0],
    "two": [1.0, 3.0],
    "equal": np.full(10, 0.1),
    "below 1 by rounding, all of them": np.full(49, 1 / 49),
    "zeros": [0.0, 0.0, 1.0, 2.0, 0.0, 3.0, 0.0],
    "only one positive": [0.0, 0.0, 5.0, 0.0],
    "each light fills one heavy exactly": np.tile([0.0, 2.0], 500),
    "one huge": [*np.ones(50_000), 1e9, *np.ones(50_000)],
    "huge at the end": [*np.ones(1000), 1e15],
    "several orders": np.exp(20 * MANY.random(1000)),
    "heavy tail": MANY.pareto(0.5, 100_000),
    "a deficit that several heavies share": [0.0, 1.1, 1.2, 1.1, 1.3, 1.3],
    "a million": MANY.random(1_000_000),
    "float32": MANY.random(1000).astype(np.float32),
    "integers, one of them the mean": [1, 2, 3],
    "heavies without a surplus": [2, 2, 1, 2, 3, 2, 2],
    "beyond the range when summed": np.full(5, 1e308),
    "subnormal": [5e-324, 1e-323],
}


@pytest.mark.parametrize("weights", TABLES.values(), ids=TABLES)
def test_probabilities_are_the_weights_shares(weights):
    w = np.array(weights, dtype=np.float64)
    expected = w / w.max() / (w / w.max()).sum()
    table = AliasTable(weights)
    np.testing.assert_allclose(table.probabilities(), expected, rtol=2e-12 if WIDE else 1e-8, atol=1e-16)
    assert not table.probabilities()[w == 0].any()
    assert (table.thresholds >= 0).all()
    assert (table.thresholds <= 1).all()
    assert (w[table.aliases] > 0).all()


def test_table_by_hand():
    """Mean-1 weights 0.25, 1.5, 0.5, 1.75: items 0 and 2 lack 0.75 and 0.5, item 1 has 0.5 too much, item 3 0.75.

    Item 1 gives item 0 its 0.75, so that it lacks 0.25, which are item 3's.
    """
    table = AliasTable([1, 6, 2, 7])
    np.testing.assert_array_equal(table.thresholds, [0.25, 0.75, 0.5, 1])
    np.testing.assert_array_equal(table.aliases, [1, 3, 3, 3])


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [0, 7, 0, 1, 1, 1], np.arange(300) % 7, np.full(9, 0.1)], ids=str)
def test_draws_pass_chi_square(weights):
    weights = np.asarray(weights)
    drawn = AliasTable(weights).draw(400_000, np.random.default_rng(1))
    assert drawn.dtype == np.int64
    assert_drawn_by(drawn, weights)


def test_draws_are_independent():
    """Pairs of consecutive draws have the products of the probabilities."""
    weights = np.array([1.0, 2.0, 5.0])
    pairs = AliasTable(weights).draw(200_000, np.random.default_rng(2)).reshape(-1, 2)
    p = np.outer(weights, weights) / weights.sum() ** 2
    assert_drawn_by(pairs @ [3, 1], p.ravel())


class Edge:
    """A generator at the edges of its range."""

    def __init__(self, value):
        self.value = value

    def random(self, count):
        return np.full(count, self.value)


@pytest.mark.parametrize("size", [3, 7, 1000, 2**20 - 1, 2**20, 2**20 + 1])
def test_edges_of_the_generator_stay_inside_and_away_from_weight_zero(size):
    weights = np.ones(size)
    weights[[0, -1]] = 0
    table = AliasTable(weights)
    for value in (0.0, 1 - 2.0**-53):
        assert weights[table.draw(1, Edge(value))[0]] > 0


def test_beyond_two_to_the_24_the_upper_half_comes_up_half_of_the_time():
    """Each of 16 parts within 5 standard errors; a position in float32 would reach no odd item of the upper half."""
    size, count = 2**24 + 5, 1_000_000
    weights = np.ones(size)
    weights[::2] = 3
    drawn = AliasTable(weights).draw(count, np.random.default_rng(3))
    shares = np.bincount(drawn * 16 // size, minlength=16)
    assert (np.abs(shares - count / 16) <= 5 * np.sqrt(count / 16 * 15 / 16)).all()
    upper = drawn[drawn >= 2**24 - 2**20]
    assert abs((upper % 2).mean() - 0.25) <= 5 * np.sqrt(0.25 * 0.75 / upper.size)


def test_draws_follow_the_generator():
    table = AliasTable([1, 2, 3])
    one, same, other = (table.draw(50, np.random.default_rng(seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert table.draw(0, np.random.default_rng(4)).shape == (0,)
    assert len(table) == 3


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, "at least one weight must be positive"),
        ([0.0, 0.0], ValueError, "at least one weight must be positive"),
        ([1.0, -1.0], ValueError, "finite and >= 0, and 1 of 2 are not"),
        ([np.nan, np.inf], ValueError, "finite and >= 0, and 2 of 2 are not"),
        ([[1.0]], ValueError, r"must have shape \(N,\)"),
        (["a"], TypeError, "real numbers"),
    ],
)
def test_bad_weights(weights, error, message):
    with pytest.raises(error, match=rf"AliasTable\(weights=...\): .*{message}"):
        AliasTable(weights)
