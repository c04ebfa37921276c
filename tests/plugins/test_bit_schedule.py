import json
import warnings

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.stats import chisquare, kstest

from samplewise.plugins import ArmSchedule, BitSchedule
from samplewise.plugins.bit_schedule import ADAPTIVE, BALANCED, adjacent, in_proportion, tilted, triangle

RARE = 1e-4
LAYERS = [f"layers.{n}" for n in range(224)]
DRAWS = 4000
NAN = np.nan
COSTS = {"bits": [2.0, 3, 4], "two": [2.0, 8], "uneven": [1.0, 2, 3, 8], "many": list(range(1, 9)), "one": [3.0]}


def drawn(mapping, period=DRAWS, steps=DRAWS, **options):
    """Widths (steps, 224) of as many steps."""
    schedule = BitSchedule(layers=LAYERS, mapping=mapping, period=period, **options)
    return np.array(schedule.arms)[[schedule.indices(step) for step in range(steps)]]


@pytest.fixture(scope="module")
def maxent():
    return drawn("maxent")


# --- figures of METHODS.md ---


def test_uniform_averages_concentrate():
    averages = drawn("uniform").mean(1)
    sd = np.sqrt((2 / 3) / 224)  # of a mean of 224 widths in {2, 3, 4}: .0546
    assert round(sd, 3) == 0.055
    assert abs(averages.std() - sd) < 4 * sd / np.sqrt(2 * DRAWS)
    assert abs(averages.mean() - 3) < 4 * sd / np.sqrt(DRAWS)
    assert averages.min() > 2.7  # no configuration near 2 or 4 bits: 5 sd
    assert averages.max() < 3.3


def test_maxent_averages_are_uniform(maxent):
    averages = maxent.mean(1)
    assert chisquare(np.histogram(averages, np.linspace(2, 4, 9))[0]).pvalue > RARE
    assert kstest(averages, "uniform", (2, 2)).statistic < 0.02  # sd of an average given its target: below .055
    targets = [triangle(step, DRAWS, 2, 4) for step in range(DRAWS)]
    assert abs((averages - targets).mean()) < 4 * 0.055 / np.sqrt(DRAWS)


SHARES = {"maxent": (0.38, 0.24, 0.38), "adjacent": (0.25, 0.5, 0.25), "gaussian": (0.31, 0.37, 0.31)}


@pytest.mark.parametrize("mapping", BALANCED)
def test_shares_of_widths(mapping):
    period = 1000
    schedule = BitSchedule(layers=LAYERS, mapping=mapping, period=period)
    exact = np.mean([schedule.probabilities(step) for step in range(period)], axis=0)
    np.testing.assert_allclose(exact, SHARES[mapping], atol=0.006)  # METHODS.md has two digits
    widths = drawn(mapping, period, period)
    shares = [(widths == width).mean() for width in (2, 3, 4)]
    np.testing.assert_allclose(shares, exact, atol=4 * np.sqrt(0.25 / widths.size))


def test_adjacent_widths_never_meet_across():
    widths = drawn("adjacent", 400, 400)
    assert not ((widths == 2).any(1) & (widths == 4).any(1)).any()


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("mapping", BALANCED)
def test_expected_average_is_the_triangle(mapping, costs):
    period = 401
    schedule = ArmSchedule(arms=COSTS[costs], mapping=mapping, period=period)
    low, high = COSTS[costs][0], COSTS[costs][-1]
    for step in range(2 * period):
        p = schedule.probabilities(step)
        assert p.min() >= 0
        assert abs(p.sum() - 1) < 1e-12
        expected = low + (high - low) * abs(2 * (step % period) / period - 1)
        assert abs(p @ schedule.costs - expected) < 1e-9
        assert abs(schedule.target(step) - expected) < 1e-9


def test_triangle_stays_in_range():
    assert [triangle(t, 4, 2, 4) for t in range(6)] == [4, 3, 2, 3, 4, 3]
    low, high = 58.3, 233.6  # low + (high - low) is rounded to more than high
    assert triangle(0, 10, low, high) == high
    assert ArmSchedule(arms=[low, high], period=10).draw(0) == high


# --- from a mean to probabilities ---


@pytest.mark.parametrize("mean", [2, 2.001, 2.6, 5, 7.99, 8])
def test_tilted_has_no_choice_between_two(mean):
    for spread in (np.inf, 3.0):
        np.testing.assert_allclose(tilted(np.array([2.0, 8]), mean, spread), [(8 - mean) / 6, (mean - 2) / 6])


@pytest.mark.parametrize("mean", [2.001, 2.3, 3, 3.5, 3.98])
def test_tilted_of_three_in_closed_form(mean):
    """p ~ (1, x, x^2): the mean is right where (4 - m) x^2 + (3 - m) x + (2 - m) = 0."""
    x = max(np.roots([4 - mean, 3 - mean, 2 - mean]).real)
    np.testing.assert_allclose(tilted(np.array([2.0, 3, 4]), mean), np.array([1, x, x * x]) / (1 + x + x * x))
    root = brentq(lambda t: np.exp([-1 - t, 0, t - 1]) @ [2 - mean, 3 - mean, 4 - mean], -40, 40, xtol=1e-14)
    weights = np.exp([-1 - root, 0, root - 1])  # exp(theta c - c^2), c from the middle in gaps
    np.testing.assert_allclose(tilted(np.array([2.0, 3, 4]), mean, np.sqrt(0.5)), weights / weights.sum(), rtol=1e-9)


@pytest.mark.parametrize("mean", [1.5, 2.5, 5])
def test_tilted_has_the_most_entropy(mean):
    costs = np.array([1.0, 2, 3, 8])
    found = tilted(costs, mean)
    rules = [{"type": "eq", "fun": lambda p: p.sum() - 1}, {"type": "eq", "fun": lambda p: p @ costs - mean}]
    start = adjacent(costs, mean) * 0.9 + 0.025
    best = minimize(lambda p: p @ np.log(p), start, bounds=[(1e-9, 1)] * 4, constraints=rules, options={"ftol": 1e-12})
    np.testing.assert_allclose(found, best.x, atol=2e-4)
    assert found @ np.log(found) <= best.fun + 1e-7


@pytest.mark.parametrize("spread", [np.inf, 0.7])
def test_tilted_is_exact_for_any_costs(spread):
    rng = np.random.default_rng(0)
    for count in (2, 3, 7, 25):
        for costs in (np.sort(rng.uniform(0, 9, count)), 2.0 ** np.arange(count)):
            low, high = costs[0], costs[-1]
            means = np.append(rng.uniform(low, high, 20), low + (high - low) * np.array([1e-9, 1e-4, 1 - 1e-4]))
            for mean in means:
                p = tilted(costs, mean, spread * np.diff(costs).mean())
                assert p.min() >= 0
                assert abs(p @ costs - mean) < 1e-12 * (high - low)


@pytest.mark.parametrize("mean", [1, 1.5, 2, 2.9, 5, 8])
def test_adjacent_takes_the_two_beside(mean):
    costs = np.array([1.0, 2, 3, 8])
    p = adjacent(costs, mean)
    used = np.flatnonzero(p)
    assert p @ costs == pytest.approx(mean)
    assert p.sum() == pytest.approx(1)
    assert used.size == (1 if mean in costs else 2)
    assert np.ptp(used) == used.size - 1


@pytest.mark.parametrize("function", [tilted, adjacent])
@pytest.mark.parametrize("mean", [1.9, 4.1, NAN])
def test_a_mean_out_of_range(function, mean):
    with pytest.raises(ValueError, match=rf"{function.__name__}\(mean={mean}\): must be between .* 2 and 4"):
        function(np.array([2.0, 3, 4]), mean)


PROPORTIONS = [
    ([1, 2, 5], 0, [1 / 8, 2 / 8, 5 / 8]),
    ([1, 2, 5], 0.2, [0.2 / 3 + 0.1, 0.2 / 3 + 0.2, 0.2 / 3 + 0.5]),
    ([1, 2, 5], 1, [1 / 3] * 3),
    ([NAN, 1, 3], 0, [2 / 6, 1 / 6, 3 / 6]),
    ([NAN, NAN, 3], 0.3, [1 / 3] * 3),
    ([NAN] * 3, 0.3, [1 / 3] * 3),
    ([0, 0, 0], 0.3, [1 / 3] * 3),
    ([0, NAN, 0], 0, [1 / 3] * 3),
    ([-4, 1, 1], 0, [0, 0.5, 0.5]),
    ([0, 0, 7], 0.3, [0.1, 0.1, 0.8]),
]


def test_in_proportion():
    for values, uniform_share, expected in PROPORTIONS:
        np.testing.assert_allclose(in_proportion(np.array([values], float), uniform_share), [expected])
    rows = np.array([row for row, _, _ in PROPORTIONS], float)
    np.testing.assert_allclose(in_proportion(rows, 0.1).sum(1), 1)
    np.testing.assert_allclose(in_proportion(rows, 0.1)[3], in_proportion(rows[3:4], 0.1)[0])


# --- mappings that follow what was trained ---


def feed(schedule, values, steps):
    """Give each arm the same value whenever it is drawn: a loss for all slots, a score for each."""
    for step in range(schedule.step, steps):
        arms = schedule.indices(step)
        schedule.record(step, loss=float(values[arms[0]]), scores=values[arms])


@pytest.mark.parametrize("mapping", ADAPTIVE)
def test_larger_values_are_drawn_more(mapping):
    schedule = BitSchedule(layers=LAYERS[:1], mapping=mapping, uniform_share=0.2)
    assert schedule.needs_scores == (mapping == "grad_norm")
    np.testing.assert_allclose(schedule.probabilities(0), [[1 / 3] * 3])
    feed(schedule, np.array([6.0, 3, 1]), 60)
    expected = 0.2 / 3 + 0.8 * np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(schedule.probabilities(60), [expected])
    assert schedule.target(60) == pytest.approx(expected @ [2, 3, 4])
    counts = np.bincount([schedule.indices(step)[0] for step in range(60, 2060)], minlength=3)
    assert chisquare(counts, 2000 * expected).pvalue > RARE


@pytest.mark.parametrize("mapping", ADAPTIVE)
def test_no_arm_starves(mapping):
    schedule = BitSchedule(layers=LAYERS[:5], mapping=mapping, uniform_share=0.3)
    for step in range(200):
        assert schedule.probabilities(step).min() >= 0.1 - 1e-12
        feed(schedule, np.array([0.0, 0, 1000]), step + 1)
    assert (schedule.counts > 0).all()


def test_unseen_arms_come_up_without_uniform_draws():
    schedule = BitSchedule(layers=LAYERS[:20], bits=range(1, 9), mapping="grad_norm", uniform_share=0)
    feed(schedule, np.full(8, 2.0), 80)
    missed = 20 * 8 * (7 / 8) ** 80  # at equal chances: .004 arms
    assert (schedule.counts == 0).sum() <= missed + 1


def test_layers_have_proportions_of_their_own():
    schedule = BitSchedule(layers=["a", "b"], bits=[2, 4], mapping="grad_norm", uniform_share=0)
    for step in range(40):
        first, second = schedule.indices(step)
        schedule.record(step, scores={"a": [1, 3][first], "b": [3, 1][second]})
    np.testing.assert_allclose(schedule.probabilities(40), [[0.25, 0.75], [0.75, 0.25]])


@pytest.mark.parametrize("mapping", ADAPTIVE)
def test_the_same_after_a_restored_state(mapping):
    first = BitSchedule(layers=LAYERS[:9], mapping=mapping)
    feed(first, np.array([6.0, 3, 1]), 25)
    second = BitSchedule(layers=LAYERS[:9], mapping=mapping)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for schedule in (first, second):
        feed(schedule, np.array([1.0, 3, 7]), 50)
    assert first.state_dict() == second.state_dict()
    assert [first.draw(step) for step in range(50, 60)] == [second.draw(step) for step in range(50, 60)]


# --- warnings and errors ---


@pytest.mark.parametrize(
    ("period", "steps", "what"),
    [
        (1000, 999, r"BitSchedule\(period=1000\): the training has 999 .* cut short.* period of 999 or less"),
        (1000, 500, "cut short"),
        (1000, 499, "only falls from 4 to 2.00"),
        (1000, 250, "only falls from 4 to 3.00: below that nothing is trained. Take a period of 250 or less"),
        (8000, 1, "only falls .* period of 2 or less"),
    ],
)
def test_a_period_longer_than_the_training(period, steps, what):
    with pytest.warns(UserWarning, match=what):
        BitSchedule(layers=["a"], period=period).check_steps(steps)


def test_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mapping in ("uniform", *ADAPTIVE):
            BitSchedule(layers=["a"], mapping=mapping).check_steps(10)
        for mapping in BALANCED:
            BitSchedule(layers=["a"], mapping=mapping, period=10).check_steps(10)
        BitSchedule(layers=["a"], bits=[3]).check_steps(10)


BAD = [
    ({"layers": []}, ValueError, r"\(layers=\(\)\): must be a list with at least one"),
    ({"layers": "q_proj"}, ValueError, r"\(layers='q_proj'\): must be a list"),
    ({"layers": ["a", "b", "a"]}, ValueError, r"\(layers=.*none twice"),
    ({"layers": [1, 2]}, TypeError, "must be a sequence of names"),
    ({"bits": []}, ValueError, r"\(bits=\(\)\): must name at least one width"),
    ({"bits": [4, 2]}, ValueError, r"\(bits=\(4, 2\)\): .*ascending"),
    ({"bits": [2, 2]}, ValueError, r"\(bits=\(2, 2\)\): .*each once"),
    ({"bits": [0, 2]}, ValueError, r"\(bits=0\): .*in \[1, 8\]"),
    ({"bits": [2, 9]}, ValueError, r"\(bits=9\): .*in \[1, 8\]"),
    ({"bits": [2.5]}, TypeError, r"\(bits=2.5\): .*an int"),
    ({"mapping": "entropy"}, ValueError, r"\(mapping='entropy'\): mapping must be one of 'maxent', 'adjacent'"),
    ({"period": 1}, ValueError, r"\(period=1\): period is the length of a wave .* >= 2"),
    ({"period": True}, TypeError, r"\(period=True\): .*an int"),
    ({"period": 100.0}, TypeError, r"\(period=100.0\): .*an int"),
    ({"uniform_share": 1.1}, ValueError, r"\(uniform_share=1.1\): .*in \[0, 1\]"),
    ({"uniform_share": "x"}, TypeError, r"\(uniform_share='x'\): .*a number"),
    ({"seed": -1}, ValueError, r"\(seed=-1\)"),
    ({"ema": 1}, ValueError, r"\(ema=1\)"),
]


@pytest.mark.parametrize(("given", "error", "rule"), BAD)
def test_bad_inputs(given, error, rule):
    with pytest.raises(error, match=r"BitSchedule.*" + rule):
        BitSchedule(**{"layers": ["a", "b"], **given})


def test_layers_and_doc_example():
    schedule = BitSchedule(layers=["q_proj", "k_proj"], period=100)
    assert schedule.layers == ("q_proj", "k_proj")
    assert (schedule.draw(0), schedule.draw(50)) == ({"q_proj": 4, "k_proj": 4}, {"q_proj": 2, "k_proj": 2})
