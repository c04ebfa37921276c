import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from frequencies import assert_drawn_by
from trajectories_support import FIRST, GIVEN, LENGTHS, MODES, RETURNS

from samplewise.plugins import TrajectorySampler
from samplewise.plugins import trajectory_weights as tw

some_modes = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def make(returns=RETURNS, lengths=LENGTHS, **options):
    return TrajectorySampler(**{"returns": returns, "lengths": lengths, "num_samples": 100, "mode": "rw", **options})


def formula(options):
    """The unscaled weights q of `options`, written out: float64 (7,)."""
    kind, alpha, cut = options["mode"], options.get("alpha"), options.get("clip_quantile", 0)
    if kind == "weights":
        return GIVEN
    if kind in ("uniform", "top"):
        return np.ones(7) if kind == "uniform" else (RETURNS == 10) * 1.0
    x = RETURNS
    if kind == "aw":
        x = x - tw.state_values(RETURNS, FIRST, ridge=options.get("ridge", 1), folds=options.get("folds", 5), seed=0)
    x = np.clip(x, np.quantile(x, cut), np.quantile(x, 1 - cut))
    return np.exp((x - x.min()) / (x.max() - x.min()) / alpha)


# --- the distribution -------------------------------------------------------------------------------------------------


@some_modes
@pytest.mark.parametrize("mix", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("unit", ["transition", "trajectory"])
def test_probabilities_and_draws_are_those_of_the_formula(options, mix, unit):
    sampler = make(**options, mix=mix, unit=unit, num_samples=300_000)
    counts = LENGTHS if unit == "transition" else np.ones(7, dtype=int)
    q = formula(options)
    expected = mix * q / (q * counts).sum() + (1 - mix) / counts.sum()
    np.testing.assert_allclose(sampler.probabilities, expected, rtol=1e-12)
    np.testing.assert_allclose(sampler.trajectory_weights, expected / expected.max(), rtol=1e-12)
    assert (sampler.probabilities * counts).sum() == pytest.approx(1, abs=1e-12)
    assert sampler.size == len(sampler.dataset) == counts.sum()
    plan = sampler.current_plan
    assert plan.weights is None
    assert_drawn_by(plan.ids, np.repeat(expected, counts))


def test_paper_by_hand():
    """x = 0, 0.5, 1 and alpha = 1/ln 4: q is 1, 2, 4, and Z = 1 * 4 + 2 * 2 + 4 * 3 = 20."""
    sampler = make([5, 10, 15], [4, 2, 3], alpha=1 / np.log(4))
    np.testing.assert_allclose(sampler.probabilities, [0.05, 0.1, 0.2], rtol=1e-12)
    np.testing.assert_allclose(sampler.trajectory_weights, [0.25, 0.5, 1], rtol=1e-12)
    q = np.array([1, 2, 4])
    assert sampler.statistics == pytest.approx(
        {"ess": 49 / 21, "expected_return": q @ [5, 10, 15] / 7, "mean_return": 10, "positive_variance": 25 / 3}
    )


def test_ranks_share_a_plan_of_num_samples():
    samplers = [make(num_samples=100, num_replicas=3, rank=rank) for rank in range(3)]
    assert [len(sampler) for sampler in samplers] == [34, 34, 34]
    assert {len(sampler.current_plan) for sampler in samplers} == {100}


def test_plans_differ_and_follow_the_seed():
    one, same, other = make(), make(), make(seed=1)
    first = list(one)
    assert first == list(same)
    assert first != list(other)
    one.set_epoch(1)
    assert sorted(first) != sorted(one)


def test_draws_of_a_batch_are_those_of_the_trajectory_weights():
    sampler = make()
    ids = sampler.draw(300_000, np.random.default_rng(1))
    assert ids.dtype == np.int64
    assert_drawn_by(ids, np.repeat(sampler.probabilities, LENGTHS))


def test_parts_of_the_value_regression_follow_the_seed():
    expected = tw.state_values(RETURNS, FIRST, seed=9)
    q = tw.exponential_weights(RETURNS - expected, 0.1)
    np.testing.assert_allclose(make(mode="aw", first_obs=FIRST, seed=9).trajectory_weights, q, rtol=1e-9)


def test_the_best_are_those_of_unclipped_returns():
    sampler = make([0.0] * 6 + [9.0], mode="top", clip_quantile=0.2)
    np.testing.assert_array_equal(sampler.trajectory_weights, [0] * 6 + [1])


def test_tensors_and_lists_are_taken_too():
    plain = make(first_obs=FIRST, mode="aw")
    for kind in (torch.tensor, np.ndarray.tolist):
        other = make(kind(RETURNS), kind(LENGTHS), first_obs=kind(FIRST), mode="aw")
        np.testing.assert_array_equal(other.probabilities, plain.probabilities)
        assert other.ledger.fingerprint == plain.ledger.fingerprint


def test_observing_losses_changes_nothing_but_the_ledger():
    sampler, twin = make(), make()
    assert not sampler.uses_losses
    losses = torch.rand(100, requires_grad=True)
    assert sampler.observe(torch.tensor(list(sampler)), losses).item() == losses.mean().item()
    for one in (sampler, twin):
        one.set_epoch(1)
    assert list(sampler) == list(twin)


def test_memory_is_that_of_the_trajectories_beside_the_ledger():
    """A hundred million transitions, 32 bytes each in the ledger (which stay untouched), and 1,000 trajectories."""
    tracemalloc.start()
    sampler = make(np.arange(1000.0), np.full(1000, 100_000), num_samples=256)
    ids = list(sampler)
    peak = tracemalloc.get_traced_memory()[1] - 32 * sampler.size
    tracemalloc.stop()
    assert max(ids) < 10**8
    assert peak < 2e6


def test_beyond_two_to_the_24_odd_rows_come_up_too():
    sampler = make([0.0, 1.0], [2**24, 2**20 + 1], mode="uniform")
    ids = sampler.draw(1_000_000, np.random.default_rng(2))
    upper = ids[ids >= 2**24]
    p = (2**20 + 1) / sampler.size
    assert abs(upper.size - 1e6 * p) <= 5 * np.sqrt(1e6 * p * (1 - p))
    assert abs((upper % 2).mean() - 0.5) <= 5 * np.sqrt(0.25 / upper.size)


# --- trajectories that are appended -----------------------------------------------------------------------------------


@some_modes
@pytest.mark.parametrize("unit", ["transition", "trajectory"])
def test_extend_is_as_if_all_had_been_there(options, unit):
    parts = {key: options[key] for key in ("first_obs", "weights") if key in options}
    rest = {**{key: value for key, value in options.items() if key not in parts}, "unit": unit}
    if rest.get("ridge") == 0:
        rest["ridge"] = 1e-3  # three trajectories are enough then
        rest["folds"] = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = make(RETURNS[:4], LENGTHS[:4], **rest, **{key: value[:4] for key, value in parts.items()})
    before, size = list(sampler), sampler.size
    sampler.observe(torch.tensor(before[:50]), torch.ones(50, requires_grad=True))
    sampler.extend(returns=RETURNS[4:], lengths=LENGTHS[4:], **{key: value[4:] for key, value in parts.items()})
    assert list(sampler) == before  # the current plan stays
    whole = make(**rest, **parts)
    assert sampler.size == whole.size
    assert sampler.ledger.fingerprint == whole.ledger.fingerprint
    np.testing.assert_array_equal(sampler.trajectory_weights, whole.trajectory_weights)
    assert sampler.statistics == whole.statistics
    assert not sampler.ledger.seen[size:].any()
    for one in (sampler, whole):
        one.set_epoch(1)
    assert list(sampler) == list(whole)


def test_extend_before_the_first_plan_plans_what_was_there():
    sampler = make(num_samples=5000)
    sampler.extend(returns=[1000.0], lengths=[10])
    assert max(sampler) < LENGTHS.sum()
    sampler.set_epoch(1)
    assert max(sampler) >= LENGTHS.sum()


@pytest.mark.parametrize(
    ("options", "more", "error", "message"),
    [
        (MODES["rw"], {"returns": [np.nan], "lengths": [1]}, ValueError, r"extend\(returns=...\): .* must be finite"),
        (MODES["rw"], {"returns": [1.0], "lengths": [0]}, ValueError, r"extend\(lengths=...\): .* trajectories 0 "),
        (MODES["aw"], {"returns": [1.0], "lengths": [1]}, ValueError, "needs first_obs"),
        (MODES["aw"], {"returns": [1], "lengths": [1], "first_obs": [[0]]}, ValueError, "2 features each, not 1"),
        (MODES["weights"], {"returns": [1.0], "lengths": [1]}, ValueError, "weights, .* go with mode='weights'"),
        (MODES["rw"], {"returns": [1.0], "lengths": [2**31]}, ValueError, r"grow\(size=2147483748\)"),
    ],
)
def test_extend_refuses_and_changes_nothing(options, more, error, message):
    sampler = make(**options)
    before = pickle.dumps((sampler.size, sampler.statistics, sampler.ledger.fingerprint, list(sampler)))
    with pytest.raises(error, match=message):
        sampler.extend(**more)
    assert pickle.dumps((sampler.size, sampler.statistics, sampler.ledger.fingerprint, list(sampler))) == before
    sampler.set_epoch(1)
    assert max(sampler) < LENGTHS.sum()


def test_grow_says_what_to_call():
    with pytest.raises(ValueError, match=r"TrajectorySampler.grow\(size=200\): .* call TrajectorySampler.extend"):
        make().grow(200)


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"returns": RETURNS + 1}, {"lengths": LENGTHS[::-1].copy()}, {"fingerprint": "mine"}],
    ids=["returns", "lengths", "fingerprint"],
)
def test_a_state_of_other_data_is_refused(other):
    state = make().state_dict()
    make().load_state_dict(state)
    with pytest.raises(ValueError, match="fingerprint"):
        make(**other).load_state_dict(state)


def test_fingerprints_tell_what_an_id_is():
    assert make(unit="transition").ledger.fingerprint != make(unit="trajectory").ledger.fingerprint


def test_a_fingerprint_that_is_given_wins():
    sampler = make(fingerprint="mine")
    make(RETURNS + 1, fingerprint="mine").load_state_dict(sampler.state_dict())
    sampler.extend(returns=[0.0], lengths=[1])
    assert sampler.ledger.fingerprint == "mine"


def test_a_state_from_before_the_data_grew_is_loaded_before_they_are_extended():
    original = make()
    original.observe(torch.tensor(list(original)[:30]), torch.ones(30, requires_grad=True))
    state = pickle.loads(pickle.dumps(original.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    for sampler in (original, resumed):
        sampler.extend(returns=[99.0], lengths=[12])
    assert list(resumed) == list(original)[30:]
    grown = make(np.append(RETURNS, 99), np.append(LENGTHS, 12))
    grown.load_state_dict(pickle.loads(pickle.dumps(resumed.state_dict())))
    for sampler in (original, resumed, grown):
        sampler.set_epoch(1)
    assert list(resumed) == list(original) == list(grown)


# --- bad input --------------------------------------------------------------------------------------------------------

NAMED = r"TrajectorySampler\({}=.*\): "


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"returns": [np.nan, 1, np.inf, 1, 1, 1, 1]}, ValueError, NAMED.format("returns") + ".* 2 of 7 .*0, 2.*NaN"),
        ({"returns": []}, ValueError, NAMED.format("returns") + r".*n >= 1"),
        ({"returns": RETURNS[None]}, ValueError, NAMED.format("returns") + r".*not \(1, 7\)"),
        ({"returns": ["a"] * 7}, TypeError, NAMED.format("returns") + "an array of numbers is needed, not of <U1"),
        ({"returns": np.ma.masked_equal(RETURNS, 7)}, ValueError, NAMED.format("returns") + "masks are not kept"),
        ({"lengths": [1, 0, 2, 3, 0, 1, -1]}, ValueError, NAMED.format("lengths") + ".*trajectories 1, 4, 6 have none"),
        ({"lengths": [1, 2]}, ValueError, NAMED.format("lengths") + r"lengths must be \(7,\).*not \(2,\)"),
        ({"lengths": LENGTHS / 1}, TypeError, NAMED.format("lengths") + "lengths must be integers, not float64"),
        ({"lengths": LENGTHS * 2**30}, ValueError, "the number of samples"),
        ({"mode": "aw"}, ValueError, NAMED.format("mode") + "it needs first_obs, .*mode='rw'"),
        ({"mode": "aw", "first_obs": FIRST[:3]}, ValueError, NAMED.format("first_obs") + r".*\(7, ...\)"),
        ({"mode": "aw", "first_obs": FIRST * np.nan}, ValueError, NAMED.format("first_obs") + ".*7 of 7"),
        ({"mode": "best"}, ValueError, NAMED.format("mode") + "mode must be one of 'rw', 'aw'"),
        ({"mode": "weights"}, ValueError, NAMED.format("mode") + "weights.* go with mode='weights'"),
        ({"weights": GIVEN}, ValueError, NAMED.format("mode") + "weights.* go with mode='weights'"),
        ({"mode": "weights", "weights": GIVEN[:3]}, ValueError, NAMED.format("weights") + "there are 3 for 7"),
        ({"mode": "weights", "weights": -GIVEN}, ValueError, NAMED.format("weights") + ".*finite and >= 0"),
        ({"mode": "weights", "weights": GIVEN * 0}, ValueError, NAMED.format("weights") + ".*all are 0"),
        ({"unit": "window"}, ValueError, NAMED.format("unit") + "unit must be one of 'transition', 'trajectory'"),
        ({"num_samples": 0}, ValueError, NAMED.format("num_samples") + "num_samples is the draws of a plan"),
        ({"num_samples": 2.5}, TypeError, NAMED.format("num_samples") + ".*must be an int"),
        ({"alpha": 0}, ValueError, NAMED.format("alpha") + r"alpha is the temperature and must be in \(0, inf\)"),
        ({"top": 0}, ValueError, NAMED.format("top") + r"top .* must be in \(0, 1\]"),
        ({"clip_quantile": 0.5}, ValueError, NAMED.format("clip_quantile") + r".*\[0, 0.5\)"),
        ({"ridge": -1}, ValueError, NAMED.format("ridge") + r".*\[0, inf\)"),
        ({"folds": 0}, ValueError, NAMED.format("folds") + "folds must be >= 1"),
        ({"mix": 1.1}, ValueError, NAMED.format("mix") + r".*must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
