import random
from itertools import product

import numpy as np
import pytest
import torch

from samplewise.plugins import bit_search as bs
from samplewise.plugins.bit_search import average_bits, even_config, pareto, search_bits

BITS = (2, 3, 4)


def names(count):
    return [f"layer{i}" for i in range(count)]


def rng(seed=0):
    return np.random.default_rng(seed)


class Quadratic:
    """The loss of rounding: sum_l s_l 4^-b_l / sum_l s_l, with log-normal sensitivities s."""

    def __init__(self, count, seed=0):
        self.layers, self.s = names(count), rng(seed + 1000).lognormal(0, 1.2, count)

    def __call__(self, config):
        return float(self.of([config[name] for name in self.layers]))

    def of(self, widths):
        return self.s @ 4.0 ** -np.asarray(widths) / self.s.sum()


def flat(config):
    """A loss that says nothing."""
    return 1.0


def linear(slopes):
    """A loss that falls by a layer's slope with each of its bits: the loss and the layers."""
    by_layer = dict(zip(names(len(slopes)), slopes, strict=True))
    return lambda config: -sum(by_layer[name] * width for name, width in config.items()), list(by_layer)


def widths_of(found, layers):
    return np.array([[config[name] for name in layers] for config in found.configs])


# --- does it find good ones? ------------------------------------------------------------------------------------------

SEEDS = 16


def best_of_plain(loss, budget, count, seed):
    """The lowest loss of independent uniform widths, of which random ones go down by 1 until the budget holds."""
    draws, best = rng(seed + 2000), np.inf
    for widths in draws.choice(BITS, size=(count, loss.s.size)):
        spare = np.repeat(np.arange(widths.size), widths - BITS[0])
        np.subtract.at(widths, draws.permutation(spare)[: max(0, widths.sum() - int(budget * widths.size))], 1)
        best = min(best, loss.of(widths))
    return best


@pytest.fixture(scope="module", params=[(24, 3), (64, 2.6)], ids=str)
def runs(request):
    """For each seed a loss, with sensitivities of its own, and its search; the log losses of two other ways."""
    count, budget = request.param
    losses = [Quadratic(count, seed) for seed in range(SEEDS)]
    given = [{"evaluate": loss, "layers": loss.layers, "budget": budget, "seed": s} for s, loss in enumerate(losses)]
    one = [search_bits(**each, first=150, second=0).best_loss for each in given]
    plain = [best_of_plain(loss, budget, 150, seed) for seed, loss in enumerate(losses)]
    return losses, [search_bits(**each) for each in given], np.log(plain), np.log(one)


def t_statistic(values):
    """Student's t with 15 degrees of freedom, if the mean of the independent values is 0: t > 4.1 has p = 5e-4."""
    return np.mean(values) / np.std(values, ddof=1) * np.sqrt(SEEDS)


def test_beats_the_best_of_as_many_plain_draws_and_stage_one_alone(runs):
    """Paired differences of log losses, their mean at most 0 if the search were no better; t is 6 or so."""
    _, found, plain, one = runs
    mine = np.log([search.best_loss for search in found])
    assert t_statistic(plain - mine) > 4.1
    assert t_statistic(one - mine) > 4.1


def test_sensitive_layers_get_more_bits(runs):
    """Covariances of widths and log sensitivities, their mean 0 if the search were blind to them."""
    pairs = [(np.log(loss.s), list(found.best_config.values())) for loss, found in zip(*runs[:2], strict=True)]
    assert t_statistic([np.cov(*pair)[0, 1] for pair in pairs]) > 4.1


# --- what is drawn ----------------------------------------------------------------------------------------------------

SIZES = {name: size for name, size in zip(names(20), [1, 5, 40, 1000] * 5, strict=True)}


@pytest.mark.parametrize("bits", [BITS, (2, 4, 8), (3, 4)])
@pytest.mark.parametrize("sizes", [None, SIZES])
@pytest.mark.parametrize("share", [0.01, 0.4, 5])
def test_all_are_within_the_budget_and_different(bits, sizes, share):
    layers, budget = names(20), bits[0] + share * (bits[-1] - bits[0])
    found = search_bits(Quadratic(20), layers=layers, budget=budget, bits=bits, sizes=sizes)
    widths = widths_of(found, layers)
    weights = np.ones(20) if sizes is None else [sizes[name] for name in layers]
    np.testing.assert_allclose(found.average, np.average(widths, axis=1, weights=weights), rtol=1e-12)
    assert found.average.max() <= budget
    assert np.isin(widths, bits).all()
    assert len(np.unique(widths, axis=0)) == len(widths)
    fitting = [width for width in bits if width <= budget]
    for i, width in enumerate([fitting[0], *fitting[:0:-1]]):  # the cheapest, then the others from the highest down
        assert (widths[i] == width).all()
    if share > 0.01:  # there one layer of 20 is more than the budget allows
        assert found.stage.tolist() == [1] * 100 + [2] * 50
    assert [list(config) for config in found.configs] == [layers] * len(widths)


@pytest.mark.parametrize("budget", [4, 2.2])
def test_averages_of_stage_one_are_uniform_up_to_the_budget(budget):
    """Kolmogorov-Smirnov: sqrt(n) D > 2.2 has p = 1e-4. 224 widths move a target by a sd of 1 / sqrt(224) at most."""
    found = [search_bits(flat, layers=names(224), budget=budget, second=0, seed=seed) for seed in range(10)]
    drawn = int(budget) - 1  # after the uniform configurations
    shares = [(one.average[drawn:] - 2) / (budget - 2) for one in found]
    for one in shares:
        assert np.histogram(one, 5, (0, 1))[0].min() > 0  # .8^97
    pooled = np.sort(np.concatenate(shares))
    distance = np.abs(pooled - (np.arange(pooled.size) + 0.5) / pooled.size).max()
    spread = np.sqrt(min(1, 2 * (budget - 2)) / 224) / (budget - 2)  # (b - 2)^2 <= 2 (b - 2), so var <= 2 (mean - 2)
    assert distance < 2.2 / np.sqrt(pooled.size) + spread / 2


def test_budgets_as_they_are_written_are_reached():
    """.3 of 10 layers is 3 of them, whatever 2.3 is in binary."""
    loss = Quadratic(10)
    for tenths in range(20, 41):
        found = search_bits(loss, layers=loss.layers, budget=tenths / 10, first=30, second=10)
        assert found.average.max() == tenths / 10


# --- shrinking --------------------------------------------------------------------------------------------------------


def shrunk(slopes, **options):
    """Widths of stage two, for a linear loss."""
    loss, layers = linear(slopes)
    found = search_bits(loss, layers=layers, **options)
    return widths_of(found, layers)[found.stage == 2]


def test_half_of_the_layers_lose_the_lowest_width_and_half_the_highest():
    widths = shrunk([9, 0.1, 8, 0, 10, -0.1, 4], budget=4, first=300, second=20)
    assert widths[:, [0, 2, 4]].min() == 3
    assert widths[:, [1, 3, 5]].max() == 3
    assert set(widths[:, 6]) == set(BITS)
    low, high = (3 * 3 + 3 * 2 + 2) / 7, (3 * 4 + 3 * 3 + 4) / 7  # averages of the space
    assert widths.mean() == pytest.approx((low + 3 * high) / 4, abs=0.2)


def test_the_cheapest_configuration_left_is_at_most_halfway_to_the_budget():
    """12 layers at 2.5 bits on average may cost 6 more than 24, and 3 of that are given away."""
    widths = shrunk([50, 40, 30, 20, 1, 1, 0, 0, 0, 0, 0, 0], budget=2.5, first=400, second=30)
    assert (widths.min(axis=0) > 2).nonzero()[0].tolist() == [0, 1, 2]
    assert widths.mean(axis=1).max() == 2.5


def test_two_widths_are_settled_for_a_quarter_each():
    widths = shrunk([50, 40, 5, 4, 3, 2, -20, -30], bits=(2, 4), budget=4, first=90, second=5)
    assert (widths[:, :2] == 4).all()
    assert (widths[:, 6:] == 2).all()
    assert (widths[:, 2:6].min(axis=0) < widths[:, 2:6].max(axis=0)).any()


@pytest.mark.parametrize("sizes", [None, SIZES])
def test_correlations_are_those_of_the_residuals(sizes):
    widths = rng(1).choice(BITS, size=(50, 20))
    average = np.average(widths, axis=1, weights=None if sizes is None else list(sizes.values()))
    losses = rng(2).normal(size=50) - 7 * average
    line = np.column_stack((np.ones(50), average))

    def residual(values):
        return values - line @ np.linalg.lstsq(line, values, rcond=None)[0]

    expected = [np.corrcoef(residual(column), residual(losses))[0, 1] for column in widths.T]
    for scale, shift in ((1, 0), (1e300, 0), (-1, 50)):
        got = bs._partial_correlations(widths, average, losses * scale + shift)
        np.testing.assert_allclose(got, np.sign(scale) * np.array(expected), rtol=1e-6, atol=1e-9)
    widths[:, 3] = 2
    assert np.flatnonzero(np.isnan(bs._partial_correlations(widths, average, losses))).tolist() == [3]
    for nothing in (np.full(50, 0.1), 3 - 2 * average):
        assert np.isnan(bs._partial_correlations(widths, average, nothing)).all()


@pytest.mark.parametrize("loss", [flat, lambda config: 5 - average_bits(config)])
def test_losses_that_say_nothing_of_layers_leave_the_space_as_it_was(loss):
    widths = widths_of(found := search_bits(loss, layers=names(12), budget=4), names(12))[100:]
    assert (widths.min(axis=0) == 2).all()
    assert (widths.max(axis=0) == 4).all()
    assert found.average[100:].mean() == pytest.approx(3.5, abs=5 * 0.3 / np.sqrt(50))


# --- small spaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "budget", "sizes"),
    [
        ((2,), 2, [1]),
        ((2, 4), 2, [1, 1]),
        ((2, 4), np.inf, [1, 1]),
        (BITS, 3, [1, 1, 1]),
        (BITS, 2.9, [3, 100, 7, 1]),
        ((1, 2, 3, 8), 4, [5, 1, 1]),
        (BITS, 2.01, [100, 1, 1, 1]),  # the large one never
    ],
)
def test_small_spaces_are_tried_completely(bits, budget, sizes):
    layers = names(len(sizes))
    every = {row for row in product(bits, repeat=len(sizes)) if np.dot(row, sizes) / sum(sizes) <= budget}
    table = {row: loss for loss, row in enumerate(sorted(every))}
    found = search_bits(
        lambda config: table[tuple(config.values())],
        layers=layers, budget=budget, bits=bits, sizes=dict(zip(layers, sizes, strict=True)),
    )  # fmt: skip
    assert sorted(tuple(config.values()) for config in found.configs) == sorted(every)
    assert found.best_loss == 0


@pytest.mark.parametrize(("count", "budget", "every"), [(100, 2.01, 101), (50, 2, 1), (50, 2.019, 1)])
def test_a_tight_budget_makes_a_small_space(count, budget, every):
    found = search_bits(Quadratic(count), layers=names(count), budget=budget)
    assert len({tuple(config.values()) for config in found.configs}) == len(found.configs) == every


@pytest.mark.parametrize(("first", "second"), [(1, 0), (2, 0), (1, 3), (3, 1), (5, 5)])
def test_few(first, second):
    found = search_bits(flat, layers=names(6), budget=3, first=first, second=second)
    assert found.stage.tolist() == [1] * first + [2] * second
    assert found.average[found.best] == found.average[0] == 2


# --- results ----------------------------------------------------------------------------------------------------------


def same(a, b):
    arrays = (np.array_equal(getattr(a, name), getattr(b, name)) for name in ("average", "losses", "stage"))
    return a.configs == b.configs and a.best == b.best and all(arrays)


def test_nothing_but_the_seed_and_the_losses_decide():
    loss = Quadratic(16)

    def careless(config):
        value = loss(config)
        config.clear()
        np.random.default_rng().random()
        return torch.tensor(value, dtype=torch.float64)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first = search_bits(loss, layers=loss.layers, budget=3, seed=1)
    assert same(first, search_bits(careless, layers=iter(loss.layers), budget=3, bits=list(BITS), seed=np.int64(1)))
    assert same(first, search_bits(loss, layers=loss.layers, budget=3, seed=1, sizes=dict.fromkeys(loss.layers, 7)))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    other = search_bits(loss, layers=loss.layers, budget=3, seed=2)
    assert sum(config in other.configs for config in first.configs) < 20
    blind = search_bits(flat, layers=loss.layers, budget=3, seed=1)
    assert blind.configs[:100] == first.configs[:100]
    assert blind.configs[100:] != first.configs[100:]


def test_result_and_progress():
    loss, done = Quadratic(16), []
    found = search_bits(loss, layers=loss.layers, budget=3, watch=done.append)
    assert done == list(range(1, 151))
    np.testing.assert_array_equal(found.losses, [loss(config) for config in found.configs])
    assert (found.average.dtype, found.losses.dtype, found.stage.dtype) == (np.float64, np.float64, np.int64)
    assert found.best_loss == found.losses.min() == loss(found.best_config)
    assert found.rejected == 0
    np.testing.assert_array_equal(found.front, pareto(found.average, found.losses))
    assert found.best in found.front
    rows = found.rows()
    assert rows[0] == {"average": 2.0, "loss": found.losses[0], "stage": 1, "on_front": True}
    assert [i for i, row in enumerate(rows) if row["on_front"]] == sorted(found.front)
    assert [list(map(type, row.values())) for row in rows] == [[float, float, int, bool]] * 150


def test_losses_that_are_not_finite_never_win():
    loss, bad = Quadratic(16), iter([np.nan, -np.inf, np.inf, 1e308, -1e300] * 30)
    found = search_bits(lambda config: next(bad), layers=loss.layers, budget=3)
    assert found.rejected == 90
    assert found.best == 4
    assert found.best_loss == -1e300
    assert np.isfinite(found.losses[found.front]).all()


# --- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_nothing_beats(seed):
    x, y = rng(seed).choice([*range(12), *range(12), np.nan, np.inf, -np.inf], size=(2, seed * 2))
    finite = [i for i in range(x.size) if np.isfinite([x[i], y[i]]).all()]

    def beaten(i):
        return any(x[j] <= x[i] and y[j] <= y[i] and ((x[j], y[j]) != (x[i], y[i]) or j < i) for j in finite)

    front = pareto(x, y)
    assert front.tolist() == sorted((i for i in finite if not beaten(i)), key=lambda i: x[i])
    assert front.dtype == np.int64


@pytest.mark.parametrize(
    ("costs", "losses", "front"),
    [
        ([], [], []),
        ([1], [np.nan], []),
        ([3, 2, 2, 4], [0.1, 0.5, 0.4, 0.2], [2, 0]),
        ([1, 1, 1], [2, 2, 2], [0]),
        ([2, 2], [5, 4], [1]),
    ],
)
def test_front_by_hand(costs, losses, front):
    assert pareto(costs, losses).tolist() == front


@pytest.mark.parametrize("count", [1, 2, 7, 10, 224])
@pytest.mark.parametrize("bits", [BITS, (2, 4, 8), (2, 3, 4, 6, 8)])
def test_even_config(count, bits):
    for average in np.arange(20, 41) / 10:
        config = even_config(names(count), average, bits)
        widths = np.array(list(config.values()))
        lower = max(width for width in bits if width <= average)
        upper = min((width for width in bits if width > average), default=lower)
        assert list(config) == names(count)
        assert average_bits(config) <= average
        ups = np.cumsum(widths != lower)
        assert set(widths) <= {lower, upper}
        if upper > lower:
            assert ups[-1] == int(round((average - lower) / (upper - lower) * count, 6))  # as many as fit
        np.testing.assert_array_equal(ups, np.arange(1, count + 1) * ups[-1] // count)


@pytest.mark.parametrize(
    ("average", "widths"),
    [(2, "2222"), (2.25, "2223"), (2.5, "2323"), (2.6, "2323"), (3.75, "3444"), (4, "4444")],
)
def test_even_config_by_hand(average, widths):
    assert "".join(map(str, even_config(names(4), average).values())) == widths


def test_average_bits_by_hand():
    assert average_bits({"up": 2, "down": 4}) == 3
    assert average_bits({"up": 2, "down": 4}, {"up": 30, "down": 10, "other": 5}) == 2.5
    assert average_bits({"all": np.int64(3)}, {"all": np.int64(7)}) == 3


# --- bad input --------------------------------------------------------------------------------------------------------


def bad(**changes):
    given = {"evaluate": flat, "layers": ["a", "b"], "budget": 3, **changes}
    return lambda: search_bits(given.pop("evaluate"), **given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad(evaluate=None), TypeError, r"search_bits\(evaluate=None\): evaluate must be callable"),
        (bad(budget=1.5), ValueError, "budget=1.5 is below the smallest width, 2: no configuration fits. Raise"),
        (bad(budget=5, bits=(8,)), ValueError, "budget=5 is below the smallest width, 8"),
        (bad(budget=np.nan), ValueError, "budget is the highest average of bits and must be in"),
        (bad(budget="3"), TypeError, "budget is the highest average of bits and must be a number"),
        (bad(layers=[]), ValueError, "at least one and all different; there is none"),
        (bad(layers=["a", "b", "a"]), ValueError, "all different; 'a' is there twice"),
        (bad(bits=()), ValueError, "must name at least one width, in ascending order"),
        (bad(bits=(2, 2)), ValueError, "in ascending order, each once"),
        (bad(bits=(0, 2)), ValueError, "bits is a list of widths and must be in"),
        (bad(bits=(2.5,)), TypeError, "must be an int"),
        (bad(sizes={"a": 1}), ValueError, "1 of 2 are missing, e.g. 'b'"),
        (bad(sizes={"a": 1, "b": 0}), ValueError, r"sizes\['b'\] must be >= 1"),
        (bad(sizes={"a": 1, "b": 0.5}), TypeError, r"sizes\['b'\] must be an int"),
        (bad(first=0), ValueError, "first must be >= 1"),
        (bad(second=-1), ValueError, "second must be >= 0"),
        (bad(seed=-1), ValueError, "seed must be >= 0"),
        (bad(evaluate=lambda config: np.nan), ValueError, "no finite loss for any of 6 .* everywhere, gave nan"),
        (bad(evaluate=lambda config: None, budget=2), TypeError, "NoneType"),
        (lambda: pareto([1, 2], [1]), ValueError, r"shape \(n,\), not \(2,\) and \(1,\)"),
        (lambda: average_bits({}), ValueError, "there is none"),
        (lambda: average_bits({"a": 2.5}), TypeError, r"config\['a'\] must be an int"),
        (lambda: average_bits({"a": 2}, {}), ValueError, "1 of 1 are missing, e.g. 'a'"),
        (lambda: even_config(["a"], 1.9), ValueError, r"average is an average of the widths and must be in \[2, 4\]"),
        (lambda: even_config([], 3), ValueError, "there is none"),
        (lambda: even_config(["a", "a"], 3), ValueError, "'a' is there twice"),
        (lambda: even_config(["a"], 3, ()), ValueError, "at least one width"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
