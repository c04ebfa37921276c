"""Data that say little about which trajectories are good: what TrajectorySampler does with them, and says."""

import warnings

import numpy as np
import pytest
from frequencies import assert_drawn_by
from trajectories_support import FIRST, LENGTHS, MODES, RETURNS

from samplewise.plugins import TrajectorySampler


def make(returns=RETURNS, lengths=LENGTHS, **options):
    return TrajectorySampler(**{"returns": returns, "lengths": lengths, "num_samples": 100, "mode": "rw", **options})


@pytest.mark.parametrize(
    ("returns", "options", "what"),
    [
        ([2.0] * 7, {"mode": "rw"}, "returns are equal"),
        ([2.0] * 7, {"mode": "top"}, "returns are equal"),
        ([0.1 + 0.2, 0.3] * 3 + [0.3], {"mode": "top"}, "returns are equal"),
        ([0.1 + 0.2] * 7, {"mode": "aw", "first_obs": FIRST}, "advantages are equal"),
        (FIRST @ [1, 2] + 5, {"mode": "aw", "first_obs": FIRST, "ridge": 0, "folds": 1}, "advantages are equal"),
        ([0.0] * 6 + [9.0], {"mode": "rw", "clip_quantile": 0.2}, "returns are equal between their quantiles 0.2 and"),
    ],
)
def test_nothing_to_choose_between_is_said_and_drawn_uniformly(returns, options, what):
    with pytest.warns(UserWarning, match=f"{what}.*draws are uniform") as caught:
        sampler = make(returns, **options)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(sampler.probabilities, 1 / LENGTHS.sum(), rtol=1e-12)


@pytest.mark.parametrize("options", [*MODES.values(), {"mode": "aw", "folds": 1}], ids=str)
@pytest.mark.parametrize("unit", ["transition", "trajectory"])
def test_one_trajectory_is_drawn_uniformly_and_needs_no_warning(options, unit):
    given = {"weights": [3.0]} if options["mode"] == "weights" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = make([5.0], [9], **{**options, "first_obs": FIRST[:1], **given}, unit=unit, num_samples=9000)
    assert_drawn_by(sampler.current_plan.ids, np.ones(9 if unit == "transition" else 1))
    assert sampler.statistics["expected_return"] == 5


@pytest.mark.parametrize(
    ("count", "width", "options", "falls_back"),
    [
        (4, 3, {"ridge": 0, "folds": 1}, True),
        (5, 3, {"ridge": 0, "folds": 1}, False),
        (4, 3, {"folds": 1}, True),
        (4, 3, {}, False),  # cross-fitted with ridge
        (3, 50, {}, False),
        (5, 3, {"ridge": 0, "folds": 5}, True),  # each fit has 4
        (6, 3, {"ridge": 0, "folds": 6}, False),
        (6, 3, {"ridge": 0, "folds": 2}, True),  # each fit has 3
        (9, 3, {"ridge": 0, "folds": 2}, False),  # one has 5
    ],
)
def test_too_few_trajectories_for_their_first_states_fall_back_to_returns(count, width, options, falls_back):
    generator = np.random.default_rng(3)
    given = {"returns": generator.normal(size=count), "lengths": np.ones(count, dtype=int), "alpha": 0.5}
    first = generator.normal(size=(count, width))
    by_returns = make(**given).probabilities
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = make(**given, mode="aw", first_obs=first, **options)
    caught = [w for w in caught if "worse than their mean" not in str(w.message)]
    assert [w.filename for w in caught] == [__file__] * falls_back
    assert all(f"{count} trajectories are too few for the value of {width} features" in str(w.message) for w in caught)
    assert np.array_equal(sampler.probabilities, by_returns) == falls_back
    assert ("value_r2" in sampler.statistics) != falls_back


def test_constant_features_do_not_make_trajectories_too_few():
    generator = np.random.default_rng(7)
    first = np.column_stack([generator.normal(size=(20, 2)), np.ones((20, 60))])
    given = {"returns": generator.normal(size=20), "lengths": np.ones(20, dtype=int), "mode": "aw", "ridge": 0}
    varied = make(**given, first_obs=first[:, :2])
    np.testing.assert_allclose(make(**given, first_obs=first).probabilities, varied.probabilities, rtol=1e-9)


def test_first_observations_that_mislead_are_told_of():
    generator = np.random.default_rng(8)
    given = {"returns": generator.normal(size=30), "lengths": np.ones(30, dtype=int), "mode": "aw"}
    first = generator.normal(size=(30, 22))
    with pytest.warns(UserWarning, match=r"worse than their mean does \(value_r2 = -") as caught:
        sampler = make(**given, first_obs=first, ridge=0)
    assert caught[0].filename == __file__
    assert sampler.statistics["value_r2"] < -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(**given, first_obs=first, ridge=100)


def test_an_odd_start_does_not_take_all_draws():
    """One of 200 trajectories, of average return, starts hundreds of deviations away from the others."""
    shares, sizes = [], []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        first, returns = generator.uniform(-0.005, 0.005, (200, 11)), generator.normal(500, 50, 200)
        first[17], returns[17] = 1, 500
        sampler = make(returns, np.full(200, 10), mode="aw", first_obs=first)
        shares.append(10 * sampler.probabilities[17])
        sizes.append(sampler.statistics["ess"])
    assert max(shares) < 0.5
    assert 5 < np.median(sizes) < 100


def test_an_outlier_takes_all_unless_returns_are_clipped():
    returns = np.append(np.random.default_rng(4).uniform(0, 100, 99), 1e6)
    lengths = np.full(100, 10)
    assert make(returns, lengths).statistics["ess"] < 1.02
    clipped = make(returns, lengths, clip_quantile=0.02)
    assert clipped.statistics["ess"] > 10
    assert clipped.probabilities[-1] == clipped.probabilities.max()


def test_value_r2_says_whether_first_states_explain_returns():
    generator = np.random.default_rng(5)
    first, lengths = generator.normal(size=(500, 3)), np.full(500, 4)
    explained = make(first @ [1, 2, 3], lengths, mode="aw", first_obs=first + generator.normal(size=(500, 3)) * 0.1)
    unexplained = make(generator.normal(size=500), lengths, mode="aw", first_obs=first)
    assert explained.statistics["value_r2"] > 0.95
    assert unexplained.statistics["value_r2"] < 0.02
    assert "value_r2" not in make().statistics
