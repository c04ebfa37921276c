import numpy as np
import pytest
import torch

from samplewise.plugins import trajectory_weights as tw

E1 = np.exp(-1)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- min-max and exponential weights ----------------------------------------------------------------------------------

MIN_MAX = [
    ([0, 5, 10], 0, [0, 0.5, 1]),
    ([-3.0, -1.0], 0, [0, 1]),
    ([7.0], 0, [0]),
    ([2, 2, 2], 0, [0, 0, 0]),
    ([0.0, 0.0], 0, [0, 0]),
    ([0.1 + 0.2, 0.3], 0, [0, 0]),  # rounding
    ([1e12, 1e12 + 1], 0, [0, 0]),
    ([1e6, 1e6 + 1], 0, [0, 1]),
    ([-1e308, 0.0, 1e308], 0, [0, 0.5, 1]),
    # the quantiles 1/4 and 3/4 of 0, 1, 2, 3, 100 are 1 and 3
    ([0, 1, 2, 3, 100], 0.25, [0, 0, 0.5, 1, 1]),
    ([0] * 18 + [1, 1], 0.25, [0] * 20),
]


@pytest.mark.parametrize(("values", "clip", "expected"), MIN_MAX)
def test_min_max_by_hand(values, clip, expected):
    for given in (values, np.array(values), torch.tensor(values, dtype=torch.float64)):
        x = tw.min_max(given, clip_quantile=clip)
        assert x.dtype == np.float64
        np.testing.assert_allclose(x, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "alpha", "clip", "expected"),
    [
        ([0, 5, 10], 0.5, 0, [E1**2, E1, 1]),
        ([10.0, -10.0], 1, 0, [1, E1]),
        ([0, 1, 2, 3, 100], 1, 0.25, [E1, E1, E1**0.5, 1, 1]),
        ([4, 4, 4], 0.1, 0, [1, 1, 1]),
        ([4], 0.1, 0, [1]),
        ([0, 1], 1e-6, 0, [0, 1]),  # the smallest weight is below the range, the largest never above it
    ],
)
def test_exponential_weights_by_hand(values, alpha, clip, expected):
    np.testing.assert_allclose(tw.exponential_weights(values, alpha, clip_quantile=clip), expected, rtol=1e-12)


def test_one_outlier_presses_all_others_together_unless_it_is_clipped():
    returns = np.append(rng().uniform(0, 100, 999), 1e6)
    pressed = tw.exponential_weights(returns, 0.1)[:-1]
    assert pressed.max() / pressed.min() < 1.01
    clipped = tw.exponential_weights(returns, 0.1, clip_quantile=0.01)
    assert clipped[:-1].max() / clipped[:-1].min() == pytest.approx(np.exp(10), rel=1e-9)
    assert clipped[-1] == clipped.max() == 1


# --- top --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returns", "top", "expected"),
    [
        ([1, 3, 2, 4], 0.5, [0, 1, 0, 1]),
        ([1, 3, 2, 4], 0.3, [0, 1, 0, 1]),  # ceil(1.2)
        ([1, 3, 2, 4], 0.25, [0, 0, 0, 1]),
        ([1, 3, 2, 4], 1e-9, [0, 0, 0, 1]),
        ([1, 3, 2, 4], 1, [1, 1, 1, 1]),
        ([5, 3, 5, 5], 0.25, [1, 0, 1, 1]),  # ties with the last of them
        ([2], 0.1, [1]),
        ([0, 0], 0.5, [1, 1]),
        (range(100), 0.07, [0] * 93 + [1] * 7),  # 0.07 * 100 is above 7 in binary
    ],
)
def test_top_by_hand(returns, top, expected):
    np.testing.assert_array_equal(tw.top_weights(returns, top), expected)


# --- value regression -------------------------------------------------------------------------------------------------


def normal_equations(features, targets, asked, ridge):
    """Penalised least squares with an intercept, written as the minimum that it is, by an augmented lstsq."""
    mean, std = features.mean(0), features.std(0)
    std = np.where(std == 0, 1, std)
    rows = np.column_stack([np.ones(len(features)), (features - mean) / std])
    penalty = np.sqrt(ridge) * np.eye(rows.shape[1])
    penalty[0] = 0
    solution = np.linalg.lstsq(np.vstack([rows, penalty]), np.append(targets, np.zeros(len(penalty))), rcond=None)[0]
    return solution[0] + ((asked - mean) / std) @ solution[1:]


def test_least_squares_of_the_paper_by_hand():
    """G = 1, 2, 6 over s = 0, 1, 2: the line 0.5 + 2.5 s."""
    values = tw.state_values([1, 2, 6], [0, 1, 2], ridge=0, folds=1)
    np.testing.assert_allclose(values, [0.5, 3, 5.5], rtol=1e-12)
    np.testing.assert_allclose(tw.advantages([1, 2, 6], values), [0.5, -1, 0.5], rtol=1e-12)
    assert tw.value_r2([1, 2, 6], values) == pytest.approx(1 - 1.5 / 14)


def test_ridge_by_hand():
    """Standardised s are -+1, so that w = (-1 * -2 + 1 * 2) / (2 + 2): half of the least squares' 2."""
    np.testing.assert_allclose(tw.state_values([1, 5], [3, 4], ridge=2, folds=1), [2, 4], rtol=1e-12)


@pytest.mark.parametrize("shape", [(40, 3), (8, 20), (40, 2, 3), (40,)])  # more features than trajectories too
@pytest.mark.parametrize("ridge", [1.0, 30.0])
def test_fit_on_all_is_penalised_least_squares(shape, ridge):
    s, returns = 5 + 3 * rng(1).normal(size=shape), rng(2).normal(100, 10, shape[0])
    flat = s.reshape(shape[0], -1)
    expected = normal_equations(flat, returns, flat, ridge)
    np.testing.assert_allclose(tw.state_values(returns, s, ridge=ridge, folds=1), expected, rtol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("folds", [7, 100])
def test_more_folds_than_trajectories_leave_each_out_once(ridge, folds):
    s, returns = rng(3).normal(size=(7, 2)), rng(4).normal(size=7)
    rest = [np.arange(7) != i for i in range(7)]
    fits = [normal_equations(s[keep], returns[keep], s[~keep], ridge)[0] for keep in rest]
    expected = [np.clip(fit, returns[keep].min(), returns[keep].max()) for fit, keep in zip(fits, rest, strict=True)]
    np.testing.assert_allclose(tw.state_values(returns, s, ridge=ridge, folds=folds), expected, rtol=1e-9)
    assert (expected != np.array(fits)).any() == (ridge == 0)


def test_folds_are_even_keyed_parts_that_are_valued_by_the_others():
    """What a trajectory is worth does not change with the returns of its own part, and does with those of others."""
    s, returns = rng(5).normal(size=(23, 2)), rng(6).normal(size=23)
    values = tw.state_values(returns, s, folds=5, seed=1)
    together = np.empty((23, 23), dtype=bool)
    for i in range(23):
        changed = returns.copy()
        changed[i] += 10
        together[i] = np.isclose(tw.state_values(changed, s, folds=5, seed=1), values, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(together, together.T)
    assert sorted({int(row.sum()) for row in together}) == [4, 5]
    np.testing.assert_array_equal(tw.state_values(returns, s, folds=5, seed=1), values)
    assert not np.allclose(tw.state_values(returns, s, folds=5, seed=2), values)
    assert not np.isin(np.diff(np.flatnonzero(together[0])), (1, 5)).all()  # neither in a row nor by turns


def test_features_of_any_scale_and_constant_ones_do_not_matter():
    s, returns = rng(7).normal(size=(30, 3)), rng(8).normal(size=30)
    columns = [s * [1e9, 1e-9, 1] + [5, 0, 100], np.full((30, 1), 0.1), np.zeros((30, 2)), np.full((30, 1), 1e20)]
    for ridge in (0, 1):
        plain = tw.state_values(returns, s, ridge=ridge)
        np.testing.assert_allclose(tw.state_values(returns, np.hstack(columns), ridge=ridge), plain, rtol=1e-6)


def test_a_feature_that_only_one_part_varies_in_is_passed_over_by_the_fit_on_the_others():
    s, returns = np.zeros(6), np.arange(6.0)
    s[2] = 1e6
    values = tw.state_values(returns, s, folds=6)
    assert values[2] == pytest.approx((15 - 2) / 5)


def test_one_trajectory_is_worth_its_return():
    assert tw.state_values([7.0], [[1.0, 2.0]]).tolist() == [7]


def test_cross_fitted_advantages_of_noise_stay_noise_and_fitted_ones_vanish():
    """30 returns without any connection to 29 features: least squares goes through all, held out they say nothing."""
    s, returns = rng(9).normal(size=(30, 29)), rng(10).normal(size=30)
    assert tw.value_r2(returns, tw.state_values(returns, s, ridge=0, folds=1)) == pytest.approx(1)
    assert not tw.advantages(returns, tw.state_values(returns, s, ridge=0, folds=1)).any()
    assert tw.value_r2(returns, tw.state_values(returns, s)) < 0.1


def test_r2_of_held_out_trajectories_finds_what_the_first_state_says():
    s = rng(11).normal(size=(2000, 4))
    returns = s @ [1, 2, 0, -1] + rng(12).normal(size=2000) * 3  # 6 of 15 parts of the variance
    assert tw.value_r2(returns, tw.state_values(returns, s)) == pytest.approx(0.4, abs=5 * 0.02)


@pytest.mark.parametrize(
    ("returns", "values", "r2"),
    [([1, 2, 3], [1, 2, 3], 1), ([1, 2, 3], [2, 2, 2], 0), ([1, 3], [3, 1], -3), ([2, 2], [2, 5], 0), ([1], [0], 0)],
)
def test_r2_by_hand(returns, values, r2):
    assert tw.value_r2(returns, values) == r2


def test_advantages_that_are_only_rounding_are_none():
    assert tw.advantages([1e9, 2e9], [1e9 - 0.1, 2e9 + 0.1]).tolist() == [0, 0]
    assert tw.advantages([1e9, 2e9], [1e9 - 4, 2e9]).tolist() == [4, 0]


# --- what the weights do ----------------------------------------------------------------------------------------------


def test_transition_probabilities_by_hand():
    """Z = 1 * 2 + 3 * 1 + 0 * 9 = 5."""
    np.testing.assert_allclose(tw.transition_probabilities([1, 3, 0], [2, 1, 9]), [0.2, 0.6, 0], rtol=1e-15)


@pytest.mark.parametrize("scale", [1e-300, 1, 1e305])
def test_transition_probabilities_sum_to_1(scale):
    q, lengths = rng(13).random(10_000) * scale, rng(14).integers(1, 1000, 10_000)
    assert (tw.transition_probabilities(q, lengths) * lengths).sum() == pytest.approx(1, abs=1e-12)


def test_summary_by_hand():
    figures = tw.summary([1, 3], [10, 20])
    expected = {"ess": 16 / 10, "expected_return": 17.5, "mean_return": 15, "positive_variance": 12.5}
    assert figures == pytest.approx(expected)
    assert tw.positive_variance([4, 4]) == 0
    assert tw.positive_variance([-30, 0, 0, 0, 0]) == pytest.approx(4 * 36 / 5)


def test_transitions_follow_the_behaviour_of_trajectories_drawn_by_q():
    """The return that each transition of a draw by P(i, t) brings to its trajectory's start, over the starts drawn."""
    q, lengths, returns = rng(15).random(50), rng(16).integers(1, 30, 50), rng(17).normal(size=50)
    p = tw.transition_probabilities(q, lengths)
    rewards = [np.full(t, g / t) for g, t in zip(returns, lengths, strict=True)]
    per_transition = sum(p[i] * rewards[i].sum() for i in range(50))
    assert tw.summary(q, returns)["expected_return"] == pytest.approx(per_transition / p.sum())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tw.min_max([1.0, np.nan, np.inf]), ValueError, r"and 2 of 3 are not \(trajectories 1, 2\)"),
        (lambda: tw.min_max([[1.0]]), ValueError, r"shape \(n,\), n >= 1, one a trajectory, not \(1, 1\)"),
        (lambda: tw.min_max([]), ValueError, r"n >= 1"),
        (lambda: tw.min_max(["a"]), TypeError, "an array of numbers is needed"),
        (lambda: tw.min_max([1.0], clip_quantile=0.5), ValueError, r"in \[0, 0.5\)"),
        (lambda: tw.exponential_weights([1.0], 0), ValueError, r"alpha is the temperature and must be in \(0, inf\)"),
        (lambda: tw.exponential_weights([1.0], np.inf), ValueError, r"in \(0, inf\)"),
        (lambda: tw.top_weights([1.0], 0), ValueError, r"in \(0, 1\]"),
        (lambda: tw.state_values([1.0], [0.0], ridge=-1), ValueError, r"ridge must be in \[0, inf\)"),
        (lambda: tw.state_values([1.0], [0.0], folds=0), ValueError, "folds must be >= 1"),
        (lambda: tw.state_values([1.0, 2.0], [[0.0], [np.nan]]), ValueError, r"first_obs .* 1 of 2 .*trajectories 1"),
        (lambda: tw.state_values([1.0, 2.0], [[0.0]]), ValueError, r"must be \(2, ...\)"),
        (lambda: tw.state_values([1.0], ["a"]), TypeError, r"first_obs=...\): an array of numbers is needed"),
        (lambda: tw.advantages([1.0, 2.0], [1.0]), ValueError, r"values must have shape \(2,\)"),
        (lambda: tw.value_r2([1.0, 2.0], [1.0]), ValueError, r"values must have shape \(2,\)"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
