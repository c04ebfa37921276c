"""How much is replaced, and what: the schedule and the draws, without a model or a buffer."""

import math
from itertools import pairwise

import numpy as np
import pytest
from token_support import tolerance

from samplewise.loaders.seeding import derive
from samplewise.plugins import BetaSchedule
from samplewise.plugins.self_tokens import draw_replaced, lots

SHAPES = ("linear", "exponential", "inverse_sigmoid")


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"cap": 0.5, "epochs": 3}, [0, 0.25, 0.5, 0.5]),
        ({"cap": 1.0, "epochs": 5, "shape": "linear", "steepness": 99}, [0, 0.25, 0.5, 0.75, 1]),
        ({"cap": 0.3, "epochs": 3, "shape": "constant"}, [0.3, 0.3, 0.3, 0.3]),
        # (1 - e^-1/2) / (1 - e^-1) = 0.3934693 / 0.6321206
        ({"cap": 0.5, "epochs": 3, "shape": "exponential", "steepness": 1}, [0, 0.3112297, 0.5, 0.5]),
        # s = 1 / (1 + e^2), 1 / (1 + e), 1 / 2, ...; (0.2689414 - 0.1192029) / (0.8807971 - 0.1192029) = 0.1966119
        ({"cap": 1.0, "epochs": 5, "shape": "inverse_sigmoid", "steepness": 4}, [0, 0.1966119, 0.5, 0.8033881, 1]),
        ({"cap": 0.0, "epochs": 3}, [0, 0, 0]),
        ({"cap": 0.4, "epochs": 1}, [0.4, 0.4]),
    ],
)
def test_values_of_schedules(given, values):
    schedule = BetaSchedule(**given)
    assert [schedule(epoch) for epoch in range(len(values))] == pytest.approx(values, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steepness", [1e-6, 0.5, 5.0, 50.0, 699.0])
def test_schedules_rise_from_0_to_the_cap(shape, steepness):
    schedule = BetaSchedule(0.7, epochs=9, shape=shape, steepness=steepness)
    values = [schedule(epoch) for epoch in range(12)]
    assert values[0] == 0
    assert values[8:] == [0.7] * 4
    assert all(low <= high for low, high in pairwise(values))


def test_shapes_are_different():
    early, late = ([BetaSchedule(1, epochs=9, shape=shape)(epoch) for shape in SHAPES] for epoch in (2, 6))
    assert early[1] > early[0] > early[2]  # steep at first, a straight line, slow at first
    assert late[2] > late[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_flattest_schedule_that_is_allowed_is_a_line(shape):
    schedule = BetaSchedule(0.5, epochs=3, shape=shape, steepness=1e-17)
    assert [schedule(epoch) for epoch in range(3)] == pytest.approx([0, 0.25, 0.5])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"cap": 1.1}, ValueError, r"BetaSchedule\(cap=1.1\): cap is the highest probability"),
        ({"cap": -0.1}, ValueError, "cap"),
        ({"cap": math.nan}, ValueError, "cap"),
        ({"cap": True}, TypeError, "cap"),
        ({"cap": "0.5"}, TypeError, "cap"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"epochs": 2.5}, TypeError, "epochs"),
        ({"shape": "cosine"}, ValueError, "shape must be one of 'constant', 'linear', 'exponential', 'inverse_sig"),
        ({"steepness": 0}, ValueError, "steepness"),
        ({"steepness": 700}, ValueError, "steepness"),
        ({"steepness": math.nan}, ValueError, "steepness"),
    ],
)
def test_wrong_schedules(given, error, match):
    with pytest.raises(error, match=match):
        BetaSchedule(**{"cap": 0.5, "epochs": 3, **given})


# --- lots -------------------------------------------------------------------------------------------------------------

ROWS, LONG = 4000, 24


def drawn(beta, *, rows=ROWS, length=LONG, seed=0, epoch=0, **given):
    """bool (rows, length)."""
    return draw_replaced(
        np.arange(rows), np.full(rows, length), beta=beta, seed=seed, epoch=epoch, **given
    ).reshape(rows, length)  # fmt: skip


@pytest.mark.parametrize("span", [1, 4, 7])
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9])
def test_each_place_is_replaced_with_probability_beta(beta, span):
    shares = drawn(beta, span=span).mean(0)
    assert abs(shares - beta).max() < tolerance(beta, ROWS)  # the first and the last place, too


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("span", [1, 5])
def test_the_ends_are_exact(beta, span):
    assert (drawn(beta, span=span) == bool(beta)).all()


def test_neighbours_and_rows_are_independent():
    flags = drawn(0.5)
    for left, right in (
        (flags[:, ::2], flags[:, 1::2]), (flags[::2], flags[1::2]), (flags[:, :12], flags[:, 12:]),
    ):  # fmt: skip
        assert abs((left & right).mean() - 0.25) < tolerance(0.25, left.size)


def test_lots_are_uniform():
    values = lots(np.arange(ROWS), np.full(ROWS, LONG), derive(0, 0, "self-tokens"))
    assert 0 <= values.min() < values.max() < 1
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    expected = values.size / 50
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - 49) < 5 * math.sqrt(2 * 49)  # the mean and the variance of chi-square with 49 degrees


@pytest.mark.parametrize("span", [2, 4, 7])
def test_spans_are_whole(span):
    values = lots(np.arange(ROWS), np.full(ROWS, 4 * span), 3, span=span).reshape(ROWS, -1)
    firsts = []
    for row in values:
        runs = np.diff(np.flatnonzero(np.concatenate(([True], np.diff(row) != 0, [True]))))
        assert (runs[1:-1] == span).all()
        assert runs[0] <= span
        assert runs[-1] <= span
        firsts.append(runs[0])
    shares = np.bincount(firsts, minlength=span + 1)[1:] / ROWS
    assert abs(shares - 1 / span).max() < tolerance(1 / span, ROWS)  # where a row's first span is cut


def test_what_is_replaced_at_a_beta_is_replaced_at_any_larger_one():
    betas = [0, 0.1, 0.3, 0.6, 0.95, 1]
    for span in (1, 3):
        flags = [drawn(beta, span=span) for beta in betas]
        for low, high in pairwise(flags):
            assert (high | ~low).all()
            assert high.sum() > low.sum()


def test_draws_depend_on_seed_epoch_sample_and_place_alone():
    ids, lengths = np.array([7, 0, 2**40, 3, 12]), np.array([5, 9, 4, 0, 17])
    given = {"beta": 0.4, "seed": 5, "epoch": 2, "span": 3, "clean_share": 0.2}
    whole = np.split(draw_replaced(ids, lengths, **given), np.cumsum(lengths)[:-1])
    for order in ([4, 2, 0, 1, 3], [1], [3, 0]):
        parts = draw_replaced(ids[order], lengths[order], **given)
        np.testing.assert_array_equal(parts, np.concatenate([whole[row] for row in order]))
    for row in (1, 4):  # a row that is cut has the same draws at the places that are left
        cut = draw_replaced(ids[row : row + 1], np.array([3]), **given)
        np.testing.assert_array_equal(cut, whole[row][:3])


def test_other_seeds_and_epochs_draw_anew():
    flags = [drawn(0.5), drawn(0.5, seed=1), drawn(0.5, epoch=1), drawn(0.5, seed=1, epoch=1)]
    for left in range(4):
        for right in range(left):
            same = (flags[left] == flags[right]).mean()
            assert abs(same - 0.5) < tolerance(0.5, flags[0].size)


@pytest.mark.parametrize("share", [0, 0.25, 0.8, 1])
def test_the_share_of_clean_rows(share):
    flags = drawn(1, length=2, clean_share=share)
    assert (flags[:, 0] == flags[:, 1]).all()
    assert abs((~flags[:, 0]).mean() - share) <= tolerance(share, ROWS)
    assert ((drawn(1, length=2, clean_share=share, epoch=1) != flags).any()) == (0 < share < 1)


def test_clean_rows_do_not_change_the_others():
    without, some = drawn(0.5), drawn(0.5, clean_share=0.5)
    clean = ~some.any(1)
    assert (some[~clean] == without[~clean]).all()
    assert without[clean].mean() == pytest.approx(0.5, abs=tolerance(0.5, without[clean].size))


def test_no_rows_and_empty_rows():
    none = np.zeros(0, np.int64)
    assert draw_replaced(none, none, beta=0.5, seed=0, epoch=0).shape == (0,)
    assert draw_replaced(np.array([4, 5]), np.array([0, 0]), beta=1, seed=0, epoch=0, span=3).shape == (0,)
