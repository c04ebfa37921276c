"""Prioritised replay: the published properties, of the pure functions and of the sampler that uses them."""

import numpy as np
import pytest
import torch
from frequencies import assert_drawn_by

from samplewise.plugins import TrajectorySampler
from samplewise.plugins.priorities import importance_weights, priorities, prioritised
from samplewise.plugins.weights import draw_with_replacement

NAN = np.nan


def rng(seed=0):
    return np.random.default_rng(seed)


def replay(lengths, **options):
    """A sampler with priorities; uniform base unless another mode is given."""
    lengths = np.asarray(lengths)
    given = {"mode": "uniform", "num_samples": 1000, "priority": "score", **options}
    return TrajectorySampler(returns=np.arange(lengths.size), lengths=lengths, **given)


def record(sampler, ids, scores, losses=None):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    losses = scores if losses is None else torch.as_tensor(losses, dtype=torch.float32)
    sampler.ledger.update(torch.as_tensor(ids), losses, scores=scores)


def direct(base, values, alpha, mix=1.0):
    """P(j), one item after the other, in Python's numbers."""
    seen = [abs(v) + 1e-6 for v in values if not np.isnan(v)]
    p = [max(seen, default=1.0) if np.isnan(v) else abs(v) + 1e-6 for v in values]
    scores = [b * x**alpha for b, x in zip(base, p, strict=True)]
    return np.array([mix * s / sum(scores) + (1 - mix) / len(scores) for s in scores])


def planned(sampler, number=0, seed=0):
    return sampler.plan(number, rng(seed))


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, -3, 0], [2 + 1e-6, 3 + 1e-6, 1e-6]),
        ([NAN, -3, 1, NAN], [3 + 1e-6, 3 + 1e-6, 1 + 1e-6, 3 + 1e-6]),
        ([NAN, 0.25], [0.25 + 1e-6] * 2),  # the largest there is, also below 1
        ([NAN, NAN], [1, 1]),
    ],
)
def test_priorities_by_hand(values, expected):
    p = priorities(np.array(values, dtype=np.float32))
    assert p.dtype == np.float64
    np.testing.assert_allclose(p, expected, rtol=1e-12)


def test_what_was_seen_and_has_no_value_is_like_the_others():
    p = priorities(np.array([NAN, -3, 1, NAN], dtype=np.float32), np.array([False, True, True, True]))
    np.testing.assert_allclose(p, [3 + 1e-6, 3 + 1e-6, 1 + 1e-6, 2 + 1e-6], rtol=1e-12)


def test_an_error_that_is_never_finite_does_not_keep_coming_up():
    sampler = replay([10], num_samples=20_000)
    record(sampler, range(10), [*range(1, 10), NAN], losses=np.ones(10))
    assert_drawn_by(planned(sampler).ids, (np.append(np.arange(1, 10), 5) + 1e-6) ** 0.6)


def test_scores_that_never_came_are_told_of():
    sampler = replay([10], num_samples=100)
    planned(sampler)  # nothing was seen: no warning
    sampler.ledger.update(torch.arange(10), torch.ones(10))
    with pytest.warns(UserWarning, match=r"no 'score' was recorded with the losses.*scores=errors"):
        planned(sampler)


def test_prioritised_by_hand():
    """Square roots of 1, 4 and 9, twice the base for the last, halved by the defensive share."""
    np.testing.assert_allclose(prioritised(np.array([1.0, 1, 2]), np.array([1.0, 4, 9]), 0.5), [1 / 9, 2 / 9, 6 / 9])
    p = prioritised(np.array([1.0, 0, 2]), np.array([1.0, 4, 9]), 0.5, mix=0.5)
    np.testing.assert_allclose(p, [0.5 / 7 + 1 / 6, 1 / 6, 3 / 7 + 1 / 6])


def test_importance_weights_by_hand():
    """(N P)^-beta over the largest: N P = 0.4, 0.8, 1.6, 1.2."""
    target, drawn, ids = np.full(4, 0.25), np.array([0.1, 0.2, 0.4, 0.3]), np.array([2, 0, 2, 3])
    weights = importance_weights(target, drawn, ids, 1)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0.25, 1, 0.25, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(importance_weights(target, drawn, ids, 0.5), [0.5, 1, 0.5, 3**-0.5], rtol=1e-6)
    np.testing.assert_array_equal(importance_weights(target, drawn, ids, 0), 1)
    # the largest is that of all items, not of those drawn; what cannot be drawn does not count
    np.testing.assert_allclose(importance_weights(target, drawn, np.array([1]), 1), [0.5], rtol=1e-6)
    drawn = np.array([0, 0.2, 0.4, 0.4])
    np.testing.assert_allclose(importance_weights(target, drawn, np.array([1, 2]), 1), [1, 0.5], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 97, 1000, 1025])
def test_draws_of_any_capacity_pass_chi_square(size):
    p = rng(size).random(size) ** 2
    p[rng(1).random(size) < 0.2] = 0
    p[-1] = 0.5
    assert_drawn_by(draw_with_replacement(p, 400_000, rng(2)), p)


def test_draws_are_in_random_order():
    drawn = planned(replay([1000], num_samples=10_000), seed=3).ids
    pairs = np.mean(drawn[1:] > drawn[:-1])
    assert abs(pairs - 0.4995) <= 5 * np.sqrt(1 / 12 / 10_000)  # consecutive comparisons are negatively correlated


def test_draws_sum_in_float64():
    """A float32 sum stays at 2^24 when ones are added to it: 5 standard errors."""
    drawn = draw_with_replacement(np.ones(2**24 + 2**22), 100_000, rng(4))
    assert abs(np.mean(drawn >= 2**24) - 0.2) <= 5 * np.sqrt(0.2 * 0.8 / 100_000)


def test_draws_at_the_edges_of_the_generator_stay_on_drawable_items():
    class Edge:
        def __init__(self, value):
            self.random = lambda: value

    for size in (3, 1000, 4097):
        p = np.full(size, 0.1)
        p[[0, -1]] = 0
        assert draw_with_replacement(p, 1, Edge(0.0))[0] == 1
        assert draw_with_replacement(p, 1, Edge(1 - 2.0**-53))[0] == size - 2


# --- the sampler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [3], [40, 57], [999, 1], [1025]])
def test_all_new_items_have_the_same_priority(lengths):
    sampler = replay(lengths, num_samples=300_000)
    plan = planned(sampler)
    np.testing.assert_array_equal(plan.weights, 1)
    assert_drawn_by(plan.ids, np.ones(sampler.size))


def test_new_items_are_at_the_maximal_priority_and_lose_it_when_seen():
    sampler = replay([6], num_samples=200_000, priority_alpha=1)
    record(sampler, [0, 1, 2], [1.0, 4.0, 0.0])
    assert_drawn_by(planned(sampler).ids, np.array([1, 4, 0, 4, 4, 4]) + 1e-6)
    record(sampler, [3], [0.0])
    assert np.bincount(planned(sampler).ids, minlength=6)[3] <= 1


def test_alpha_0_is_the_base_distribution_and_has_no_weights():
    for mode in ("uniform", "rw"):
        sampler = replay([5, 3, 12], num_samples=200_000, priority_alpha=0, priority_beta=1, mode=mode, alpha=2.0)
        record(sampler, np.arange(20), rng(4).lognormal(size=20) * 100)
        plan = planned(sampler)
        np.testing.assert_array_equal(plan.weights, 1)
        assert_drawn_by(plan.ids, np.repeat(sampler.probabilities, [5, 3, 12]))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", [1, 3, 97, 1000, 1025])
def test_weights_and_frequencies_are_the_published_ones(size, beta):
    """(N P(j))^-beta over its largest, P evaluated directly, with a few items unseen."""
    sampler = replay([size], num_samples=400_000, priority_beta=beta)
    values = (rng(5).normal(size=size) * 3).astype(np.float32).astype(np.float64)
    ids = np.flatnonzero(rng(6).random(size) < 0.9)
    record(sampler, ids, values[ids])
    values[np.setdiff1d(np.arange(size), ids)] = NAN
    p = direct(np.ones(size), values, 0.6)
    plan = planned(sampler)
    np.testing.assert_allclose(plan.weights, ((size * p) ** -beta / ((size * p) ** -beta).max())[plan.ids], rtol=2e-6)
    assert_drawn_by(plan.ids, p)


@pytest.mark.parametrize("unit", ["transition", "trajectory"])
@pytest.mark.parametrize("mix", [1.0, 0.7])
def test_priorities_on_top_of_trajectory_weights(unit, mix):
    lengths, q = np.array([4, 9, 2, 5]), np.array([1.0, 2, 0, 3])
    sampler = replay(lengths, num_samples=300_000, priority_beta=0.5, mode="weights", weights=q, mix=mix, unit=unit)
    base = np.repeat(q, lengths) if unit == "transition" else q
    values = rng(7).exponential(size=base.size).astype(np.float32)
    record(sampler, np.arange(base.size), values)
    p = direct(base, values.astype(np.float64), 0.6, mix)
    target = mix * base / base.sum() + (1 - mix) / base.size
    drawable = p > 0
    ratio = np.divide(target, p, where=drawable, out=np.zeros(p.size)) ** 0.5
    plan = planned(sampler)
    np.testing.assert_allclose(plan.weights, (ratio / ratio.max())[plan.ids], rtol=2e-6)
    assert drawable.all() == (mix < 1)
    assert_drawn_by(plan.ids, p)


@pytest.mark.parametrize("mode", ["uniform", "weights"])
def test_beta_1_makes_the_weighted_mean_unbiased(mode):
    """mean(w * loss) is, but for a factor, the mean loss under the trajectory weights: 400 plans, 5 standard errors."""
    lengths = np.array([30, 50, 20])
    weights = {"weights": [1.0, 0.3, 2.0]} if mode == "weights" else {}
    sampler = replay(lengths, num_samples=500, priority_beta=1, mode=mode, **weights)
    losses = rng(8).lognormal(0, 1.5, 100)
    record(sampler, np.arange(100), losses)
    target = np.repeat(sampler.probabilities, lengths)
    p = direct(target, losses.astype(np.float32).astype(np.float64), 0.6)
    scale = (target / p).max()  # w = target / p / scale, whose mean is 1 / scale
    estimates = []
    for number in range(400):
        plan = planned(sampler, seed=number)
        estimates.append(scale * np.mean(plan.weights * losses[plan.ids]))
    error = np.std(estimates) / np.sqrt(400)
    assert abs(np.mean(estimates) - target @ losses) <= 5 * error
    assert error < 0.01 * (target @ losses)
    assert abs(p @ losses - target @ losses) > 0.3 * (target @ losses)  # what the plain mean would estimate


@pytest.mark.parametrize("size", [97, 1000, 1025])
def test_no_drift_after_a_million_updates(size):
    """A million priorities of 16 orders of magnitude are recorded; a plan is exactly what the last ones say."""
    sampler = replay([size], num_samples=50_000, priority_beta=1)
    generator, last = rng(9), np.full(size, NAN)
    for _ in range(1000):
        ids = generator.integers(0, size, 1000)
        scores = (10 ** generator.uniform(-8, 8, 1000)).astype(np.float32)
        record(sampler, ids, scores)
        last[ids] = scores
    assert int(sampler.ledger.column("count").sum()) == 1_000_000
    p = direct(np.ones(size), last, 0.6)
    plan = planned(sampler)
    np.testing.assert_allclose(plan.weights, (p.min() / p)[plan.ids], rtol=2e-7)
    drawn = prioritised(np.ones(size), priorities(sampler.ledger.column("score").numpy()), 0.6)
    np.testing.assert_allclose(drawn, p, rtol=1e-12)
    assert_drawn_by(plan.ids, p)


@pytest.mark.parametrize("column", ["loss_last", "loss_ema", "loss_mean", "score"])
def test_each_column_is_read(column):
    sampler = replay([4], num_samples=100_000, priority=column, priority_alpha=1, ema=0.5)
    for losses, scores in (([1, 1, 1, 1], [9, 0, 9, 9]), ([3, 3, 3, 1], [-1, 0, 1, 2])):
        record(sampler, np.arange(4), scores, losses)
    values = {"loss_last": [3, 3, 3, 1], "loss_ema": [2, 2, 2, 1], "loss_mean": [2, 2, 2, 1], "score": [1, 0, 1, 2]}
    p = direct(np.ones(4), values[column], 1)
    assert_drawn_by(planned(sampler).ids, p)


def test_beta_may_change_from_plan_to_plan():
    sampler = replay([2], priority_alpha=1, priority_beta=lambda number: min(1.0, number / 4))
    record(sampler, [0, 1], [1.0, 4.0])
    for number, smallest in ((0, 1), (2, 0.5), (4, 0.25), (9, 0.25)):
        assert planned(sampler, number).weights.min() == pytest.approx(smallest, rel=1e-5)
    sampler = replay([2], priority_beta=lambda number: 2)
    with pytest.raises(ValueError, match=r"priority_beta\(3\)=2.*must be in \[0, 1\]"):
        planned(sampler, 3)


def test_training_records_errors_and_weighs_losses():
    """The sampler as a loop uses it: the weights of a plan, through observe()."""
    sampler = replay([50], num_samples=400, priority_beta=1)
    assert sampler.uses_losses
    record(sampler, np.arange(50), np.arange(50) + 1.0)
    ids = torch.tensor(list(sampler))
    losses = torch.ones(400, requires_grad=True)
    errors = torch.full((400,), 0.5)
    loss = sampler.observe(ids, losses, scores=errors)
    p = direct(np.ones(50), np.arange(50) + 1.0, 0.6)
    assert loss.item() == pytest.approx((p.min() / p)[ids].mean(), rel=1e-5)
    np.testing.assert_array_equal(sampler.ledger.column("score")[ids], 0.5)


def test_trajectories_that_are_appended_are_new():
    sampler = replay([3], num_samples=100_000, priority_alpha=1)
    record(sampler, [0, 1, 2], [1.0, 2.0, 3.0])
    sampler.extend(returns=[5], lengths=[2])
    assert_drawn_by(planned(sampler).ids, direct(np.ones(5), [1, 2, 3, NAN, NAN], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "loss"}, r"priority='loss'\): priority must be one of 'loss_last'"),
        ({"priority_alpha": 1.5}, r"priority_alpha must be in \[0, 1\]"),
        ({"priority_beta": -1}, r"priority_beta must be in \[0, 1\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        replay([3], **options)
