import numpy as np
import pytest
import torch
from ranks_support import Threads

from samplewise.cuda_ext.totals import Totals, TotalsOverRanks
from samplewise.plugins import InfoBatch, infobatch
from samplewise.plugins.infobatch import PAPER_QUANTILES, infobatch_keep

NAN = np.nan


def keep(losses, seed=0, **options):
    return infobatch_keep(np.array(losses, dtype=np.float32), np.random.default_rng(seed), **options)


REPETITIONS = 1000


def kept_share(losses, repetitions=REPETITIONS, **options):
    """How often each sample is kept (N,) and the set of weights that it had."""
    generator = np.random.default_rng(1)
    hits, seen_weights = np.zeros(len(losses)), [set() for _ in losses]
    for _ in range(repetitions):
        ids, weights = infobatch_keep(np.array(losses, dtype=np.float32), generator, **options)
        hits[ids] += 1
        for i, weight in zip(ids, weights.tolist(), strict=True):
            seen_weights[i].add(round(weight, 5))
    return hits / repetitions, seen_weights


TABLE = [
    # mean of the seen losses is 4: 1, 2 and 3 lie below it, 4 and 10 do not, the unseen one never does
    ([1, 2, 3, NAN, 4, 10], {"prune": 0.5}, [0.5, 0.5, 0.5, 1, 1, 1], [2, 2, 2, 1, 1, 1]),
    ([1, 2, 3, NAN, 4, 10], {"prune": 0.2}, [0.8, 0.8, 0.8, 1, 1, 1], [1.25, 1.25, 1.25, 1, 1, 1]),
    ([1, 2, 3, NAN, 4, 10], {"prune": 0.0}, [1] * 6, [1] * 6),
    ([0.1] * 7, {"prune": 0.9}, [1] * 7, [1] * 7),  # strictly below the mean: none
    ([-3, -1], {"prune": 0.5}, [0.5, 1], [2, 1]),
    # 10 seen: ranks 2 and 8 bound the levels; the lowest 2 keep 1/4, the next 6 keep 1/2
    ([NAN, *range(10)], {"quantiles": PAPER_QUANTILES}, [1, 0.25, 0.25, *[0.5] * 6, 1, 1], [1, 4, 4, *[2] * 6, 1, 1]),
    ([3, 1, 2, 4], {"quantiles": ((0.5, 0.1),)}, [1, 0.1, 0.1, 1], [1, 10, 10, 1]),
    ([5, 5, 5, 5], {"quantiles": ((0.5, 0.1),)}, [1] * 4, [1] * 4),
    ([1, 2], {"quantiles": ((0.5, 1.0),)}, [1, 1], [1, 1]),
    ([1, 2, 3, np.inf], {"prune": 0.5}, [0.5, 1, 1, 1], [2, 1, 1, 1]),  # what is not finite enters no statistic
    ([1, np.inf, np.inf], {"quantiles": ((0.5, 0.1),)}, [1, 1, 1], [1, 1, 1]),
]


@pytest.mark.parametrize(("losses", "options", "shares", "weights"), TABLE)
def test_keep_probabilities_and_weights_by_hand(losses, options, shares, weights):
    measured, seen_weights = kept_share(losses, **options)
    shares = np.array(shares)
    assert (np.abs(measured - shares) <= 5 * np.sqrt(shares * (1 - shares) / REPETITIONS)).all()
    assert seen_weights == [{weight} for weight in weights]


@pytest.mark.parametrize("options", [{"prune": 0.3}, {"prune": 0.5}, {"prune": 0.8}, {"quantiles": PAPER_QUANTILES}])
def test_weighted_sum_of_losses_is_unbiased(options):
    """Within 5 standard errors of R = 400 draws, and the errors are small enough for 0.5 % to matter."""
    losses = np.random.default_rng(2).lognormal(0, 1.5, 5000).astype(np.float32)
    generator, sums = np.random.default_rng(3), []
    for _ in range(400):
        ids, weights = infobatch_keep(losses, generator, **options)
        sums.append(float(weights @ losses[ids]))
    truth = losses.sum(dtype=np.float64)
    error = np.std(sums) / np.sqrt(400)
    assert error < 0.001 * truth
    assert abs(np.mean(sums) - truth) <= 5 * error


@pytest.mark.parametrize("options", [{"prune": 0.4}, {"quantiles": PAPER_QUANTILES}], ids=str)
def test_ranks_that_plan_their_shares_draw_as_one_that_plans_all(options, monkeypatch):
    """Bounds of all losses, on every rank; shares of 400 draws within 5 standard errors."""
    losses = np.random.default_rng(5).lognormal(0, 1, 61).astype(np.float32) * np.linspace(0.2, 2, 61, dtype=np.float32)
    losses[[3, 30]] = NAN
    bounds_of_all, _ = infobatch._loss_bounds(losses, 0.4, options.get("quantiles"), Totals())

    def draws(rank):
        rng, own = np.random.default_rng((7, rank)), losses[rank::3].copy()
        bounds, _ = infobatch._loss_bounds(own, 0.4, options.get("quantiles"), TotalsOverRanks())
        np.testing.assert_array_equal(bounds, bounds_of_all)
        hits, weights = np.zeros(own.size), np.ones(own.size)
        for _ in range(400):
            rows, drawn = infobatch_keep(own, rng, **options, totals=TotalsOverRanks())
            hits[rows] += 1
            weights[rows] = drawn
        return hits / 400, weights

    shares, weights = np.empty(61), np.empty(61)
    for rank, found in enumerate(Threads(monkeypatch).run(3, draws)):
        shares[rank::3], weights[rank::3] = found
    ratios = (0.6,) if "prune" in options else (0.25, 0.5)
    expected = np.ones(61)
    for bound, ratio in reversed([*zip(bounds_of_all, ratios, strict=True)]):
        expected[losses < bound] = ratio
    assert len(np.unique(expected)) == len(ratios) + 1
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / 400)).all()
    np.testing.assert_allclose(weights, 1 / expected, rtol=1e-6)


def test_draw_has_the_right_types_and_order():
    ids, weights = keep(np.random.default_rng(0).random(1000))
    assert (ids.dtype, weights.dtype) == (np.int64, np.float32)
    assert (np.diff(ids) > 0).all()
    assert ids.size == weights.size


def test_nothing_seen_keeps_everything():
    ids, weights = keep([NAN] * 5)
    assert ids.tolist() == [0, 1, 2, 3, 4]
    assert weights.tolist() == [1] * 5


def observe_all(sampler, losses):
    losses = torch.as_tensor(losses, dtype=torch.float32)
    sampler.observe(torch.arange(sampler.size), losses)


def test_epochs_first_whole_then_pruned_then_annealed():
    losses = np.random.default_rng(4).random(2000)
    sampler = InfoBatch(2000, epochs=8)
    lengths = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        lengths.append(len(sampler))
        if epoch in (0, 7):
            assert sampler.current_plan.ids == range(2000)
            assert sampler.current_plan.weights is None
        observe_all(sampler, losses)
    assert lengths[0] == lengths[7] == 2000
    assert all(abs(length - 1500) < 5 * np.sqrt(1000 * 0.25) for length in lengths[1:7])
    assert len(set(lengths[1:7])) > 1


def test_observe_applies_the_weights():
    sampler = InfoBatch(4, epochs=8)
    observe_all(sampler, [1, 1, 1, 9])
    sampler.set_epoch(1)
    ids = torch.tensor([*sampler.current_plan.ids])
    expected = [2.0 if i < 3 else 1.0 for i in ids.tolist()]
    assert sampler.observe(ids, torch.ones(len(ids))).item() == pytest.approx(np.mean(expected))


def test_non_finite_losses_do_not_stop_the_pruning():
    """T20: one NaN makes the public code's mean NaN."""
    sampler = InfoBatch(1000, epochs=8)
    losses = torch.linspace(0, 1, 1000)
    losses[3] = NAN
    losses[5] = float("inf")
    observe_all(sampler, losses)
    sampler.set_epoch(1)
    assert 600 < len(sampler) < 900
    assert {3, 5} <= set(sampler.current_plan.ids.tolist())


def test_annealing_counts_training_epochs_also_where_epochs_have_a_fixed_length():
    sampler = InfoBatch(100, epochs=8, epoch_length=400)
    for epoch in range(7):
        sampler.set_epoch(epoch)
        observe_all(sampler, np.linspace(0, 1, 100))
        if epoch:
            assert sampler.current_plan.weights is not None
    sampler.set_epoch(7)
    sampler.set_epoch(8)
    assert sampler.current_plan.weights is None


def test_batch_loss_moves_an_average_of_decay_0_7():
    sampler = InfoBatch(6, epochs=8, batch_loss=True)
    sampler.observe(torch.tensor([0, 1, 2]), torch.tensor(1.0))
    sampler.observe(torch.tensor([2, 3]), torch.tensor(3.0))
    average = sampler.ledger.column("loss_ema").numpy()
    np.testing.assert_allclose(average, [1, 1, 0.7 * 1 + 0.3 * 3, 3, NAN, NAN], rtol=1e-6)
    # the mean of the averages is 1.65: 0, 1 and 2 (1.6) lie below it, though 2's latest loss, 3, lies above its mean
    easy = set()
    for seed in range(64):
        kept = sampler.plan(1, np.random.default_rng(seed)).ids
        easy |= set(range(6)) - set(kept.tolist())
    assert easy == {0, 1, 2}


def test_batch_loss_is_refused_without_the_option_and_ema_can_be_chosen():
    with pytest.raises(ValueError, match="scalar"):
        InfoBatch(6, epochs=8).observe(torch.tensor([0]), torch.tensor(1.0))
    assert InfoBatch(6, epochs=8, batch_loss=True).ledger.ema == 0.7
    assert InfoBatch(6, epochs=8, batch_loss=True, ema=0.5).ledger.ema == 0.5
    assert InfoBatch(6, epochs=8).ledger.ema == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"prune": 1.0}, r"prune=1.0\): prune is .* must be in \[0, 1\)"),
        ({"prune": -0.1}, "prune=-0.1"),
        ({"prune": NAN}, "prune=nan"),
        ({"anneal_from": 1.1}, "anneal_from=1.1"),
        ({"quantiles": ()}, "quantiles"),
        ({"quantiles": ((0.8, 0.5), (0.2, 0.5))}, "ascending"),
        ({"quantiles": ((1.0, 0.5),)}, r"in \(0, 1\)"),
        ({"quantiles": ((0.5, 0.0),)}, "ratios in"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=r"InfoBatch\(.*" + message):
        InfoBatch(10, **{"epochs": 8, **options})
