from collections import Counter
from itertools import product
from math import comb, prod

import numpy as np
import pytest
import torch
from ranks_support import Threads

from samplewise.cuda_ext.totals import TotalsOverRanks
from samplewise.plugins import SeTa
from samplewise.plugins.seta import has_turn, seta_select, subset_shares, subset_size, window_start_and_width

NAN = np.nan


def rng(seed=0):
    return np.random.default_rng(seed)


# --- window -----------------------------------------------------------------------------------------------------------

WINDOWS = [
    # groups, window, rounding, width, starts of plans 1, 2, 3, ...
    (10, 0.9, "code", 9, [1, 0, 1, 0]),
    (10, 0.9, "paper", 9, [1, 0, 1, 0]),
    (5, 0.9, "code", 4, [1, 0, 1, 0]),  # round(4.5) is 4
    (5, 0.9, "paper", 5, [0, 0, 0]),
    (5, 0.5, "code", 2, [1, 2, 3, 0, 1, 2, 3, 0]),  # round(2.5) is 2
    (5, 0.5, "paper", 3, [1, 2, 0, 1, 2, 0]),
    (10, 0.5, "code", 5, [1, 2, 3, 4, 5, 0, 1]),
    (10, 0.5, "paper", 5, [1, 2, 3, 4, 5, 0, 1]),
    (7, 0.5, "code", 4, [1, 2, 3, 0]),  # round(3.5) is 4
    (10, 0.01, "code", 1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
    (10, 1.0, "code", 10, [0, 0]),
    (1, 0.5, "code", 1, [0, 0]),
    (100, 0.07, "paper", 7, [1, 2, 3]),  # 100 * 0.07 is 7.000000000000001
]


@pytest.mark.parametrize(("groups", "window", "rounding", "width", "starts"), WINDOWS)
def test_windows_by_hand(groups, window, rounding, width, starts):
    plans = [window_start_and_width(n, groups, window, rounding) for n in range(1, len(starts) + 1)]
    assert plans == [(start, width) for start in starts]


@pytest.mark.parametrize(
    ("size", "prune", "expected"),
    [
        (100, 0.1, 90),
        (101, 0.1, 90),
        (1000, 0.0, 1000),
        (10, 0.75, 2),
        (3, 0.9, 1),
        (1, 0.5, 1),
        (50_000, 0.3, 35_000),
        (10, 0.8, 2),
    ],
)
def test_subset_size(size, prune, expected):
    assert subset_size(size, prune) == expected


# --- selection --------------------------------------------------------------------------------------------------------


def grouped_losses(groups=10, each=20, seed=0):
    """Losses in well separated groups, and the group of each."""
    group = rng(seed).permutation(np.repeat(np.arange(groups), each))
    return (group + 0.01 * rng(seed + 1).random(group.size)).astype(np.float32), group


@pytest.mark.parametrize(
    ("n", "options", "expected"),
    [
        (0, {"window": 0.5}, range(10)),
        (1, {"window": 0.5}, range(1, 6)),
        (5, {"window": 0.5}, range(5, 10)),
        (6, {"window": 0.5}, range(5)),
        (7, {"window": 0.5}, range(1, 6)),
        (1, {"window": 0.9}, range(1, 10)),
        (2, {"window": 0.9}, range(9)),
        (3, {"window": 0.25}, range(3, 5)),
        (3, {"window": 0.25, "rounding": "paper"}, range(3, 6)),
        (4, {"window": 1.0}, range(10)),
    ],
)
def test_window_slides_from_easy_to_hard_and_starts_again(n, options, expected):
    losses, group = grouped_losses()
    ids = seta_select(losses, n, rng(), prune=0.0, **options)
    np.testing.assert_array_equal(ids, np.flatnonzero(np.isin(group, list(expected))))


def test_subset_is_drawn_before_the_window():
    losses, group = grouped_losses(each=1000)
    ids = seta_select(losses, 1, rng(), prune=0.3, window=0.5)
    assert ids.dtype == np.int64
    assert set(group[ids]) == {1, 2, 3, 4, 5}
    assert abs(ids.size - 3500) < 5 * np.sqrt(7000 * 0.25)
    assert seta_select(losses, 0, rng(), prune=0.3).size == 7000


def test_unseen_samples_of_the_subset_are_kept():
    losses, group = grouped_losses()
    losses[::7] = NAN
    ids = seta_select(losses, 2, rng(), prune=0.0, window=0.5)
    np.testing.assert_array_equal(ids, np.flatnonzero(np.isnan(losses) | ((group >= 2) & (group < 7))))
    assert seta_select(np.full(10, NAN, np.float32), 3, rng(), prune=0.5).size == 5


def test_equal_losses_are_consecutive_chunks():
    losses = np.full(10, 0.3, dtype=np.float32)
    chosen = [seta_select(losses, n, rng(), prune=0.0, groups=5, window=0.4).tolist() for n in range(1, 5)]
    assert chosen == [[2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9], [0, 1, 2, 3]]
    losses[4] = NAN  # unseen: always kept, and in no chunk
    assert seta_select(losses, 1, rng(), prune=0.0, groups=3, window=0.33).tolist() == [3, 4, 5, 6]
    assert seta_select(losses[:2], 1, rng(), prune=0.0, groups=5, window=0.4).tolist() == [1]


@pytest.mark.parametrize("n", range(1, 12))
def test_fewer_distinct_losses_than_groups_leave_no_window_empty(n):
    losses = np.array([1, 2, 1, 2, 3, 3], dtype=np.float32)
    ids = seta_select(losses, n, rng(), prune=0.0, groups=10, window=0.3)
    assert set(losses[ids]) == {[1, 2, 3][n % 3]}


# --- shares -----------------------------------------------------------------------------------------------------------


def test_the_subset_falls_into_the_shares_as_a_uniform_one_does():
    """The multivariate hypergeometric distribution, within 5 standard errors of 20,000 draws."""
    sizes, k, generator = (3, 1, 4, 2), 5, rng(3)
    found = Counter(tuple(subset_shares(sizes, k, generator)) for _ in range(20_000))
    for drawn in product(*(range(size + 1) for size in sizes)):
        pmf = prod(map(comb, sizes, drawn)) / comb(sum(sizes), k) if sum(drawn) == k else 0
        assert abs(found[drawn] / 20_000 - pmf) <= 5 * np.sqrt(pmf * (1 - pmf) / 20_000)
    assert subset_shares([7], 3, generator) == [3]
    assert sum(subset_shares([900_000_000, 900_000_000], 10**9, generator)) == 10**9


def selected(monkeypatch, losses, n, draws, *, prune, **options):
    """What three ranks that plan their shares select, `draws` times: ids of all of them together."""

    def select(rank):
        own, generator, common, parts = losses[rank::3].copy(), rng((n, rank)), rng(n), []
        sizes = [len(losses[r::3]) for r in range(3)]
        for _ in range(draws):
            k = subset_shares(sizes, subset_size(len(losses), prune), common)[rank]
            parts.append(3 * seta_select(own, n, generator, k=k, totals=TotalsOverRanks(), **options) + rank)
        return parts

    ranks = Threads(monkeypatch).run(3, select)
    return [np.sort(np.concatenate(parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("n", [0, 1, 4])
def test_ranks_that_plan_their_shares_select_what_one_that_plans_all_does(n, monkeypatch):
    losses = rng(2).lognormal(0, 1, 1001).astype(np.float32)
    losses[::17] = NAN
    losses[1::3] *= 3  # one rank's are the hard ones
    whole = seta_select(losses, n, rng(), prune=0.0, window=0.3)
    for ids in selected(monkeypatch, losses, n, 1, prune=0.0, window=0.3):
        np.testing.assert_array_equal(ids, whole)


def test_shares_of_a_pruned_plan_are_drawn_uniformly(monkeypatch):
    """Every sample of the window equally often, within 5 standard errors of 300 draws."""
    losses, group = grouped_losses()  # no subset misses one of the groups
    plans = selected(monkeypatch, losses, 1, 300, prune=0.25, window=0.5)
    shares = np.bincount(np.concatenate(plans), minlength=200) / 300
    assert (np.abs(shares - 0.75) <= 5 * np.sqrt(0.75 * 0.25 / 300))[(group >= 1) & (group < 6)].all()
    assert not shares[(group < 1) | (group >= 6)].any()
    assert {len(ids) for ids in selected(monkeypatch, losses, 0, 20, prune=0.25)} == {150}


def test_plans_of_shares_have_the_size_of_the_whole_one(monkeypatch):
    def sizes(rank):
        sampler = SeTa(101, epochs=4, prune=0.3, anneal_from=0.5, sharded=True)
        return [len(sampler.plan(n, rng((n, rank))).ids) for n in range(3) if sampler.set_epoch(n) is None]

    ranks = np.array(Threads(monkeypatch).run(3, sizes))
    assert ranks.sum(axis=0).tolist() == [70, 70, 70]
    assert len(np.unique(ranks)) > 2


def test_shares_hold_those_whose_turn_it_is(monkeypatch):
    def plans(rank):
        sampler = SeTa(101, epochs=9, prune=0.9, revisit_every=3, seed=4, sharded=True)
        return [sampler.plan(n, rng((n, rank))).ids for n in range(3)]

    for n, parts in enumerate(zip(*Threads(monkeypatch).run(3, plans), strict=True)):
        assert set(np.flatnonzero(has_turn(range(101), n, 3, seed=4))) <= set(np.concatenate(parts))


def test_equal_losses_are_chunks_of_each_share(monkeypatch):
    losses = np.full(30, 0.3, dtype=np.float32)
    ids = selected(monkeypatch, losses, 1, 1, prune=0.0, groups=5, window=0.4)[0]
    assert ids.tolist() == list(range(6, 18))  # the second and third of five chunks, as with one rank
    losses[np.arange(30) % 3 > 0] = NAN  # on two ranks all are unseen, which are always kept
    ids = selected(monkeypatch, losses, 1, 1, prune=0.0, groups=5, window=0.4)[0]
    assert [i for i in ids.tolist() if i % 3 == 0] == [6, 9, 12, 15]
    assert len(ids) == 24


# --- sampler ----------------------------------------------------------------------------------------------------------


def train(sampler, losses, epochs):
    """Plans of the epochs, each observed in full."""
    plans = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        plan = sampler.current_plan
        plans.append(plan)
        ids = torch.from_numpy(np.asarray(plan.ids))
        sampler.observe(ids, torch.from_numpy(losses)[ids])
    return plans


def test_epochs_of_a_training():
    losses, group = grouped_losses(each=100)
    plans = train(SeTa(1000, epochs=8, prune=0.1, window=0.5), losses, 8)
    assert all(plan.weights is None for plan in plans)
    assert len(plans[0]) == 900
    for n in range(1, 7):
        seen = np.unique(np.concatenate([plan.ids for plan in plans[:n]]))
        chosen = np.intersect1d(plans[n].ids, seen)
        start = n % 6
        assert set(group[chosen]) == set(range(start, start + 5))
    assert len(plans[7]) == 900  # anneal_from * epochs = 7: the uniform subset
    assert set(group[plans[7].ids]) == set(range(10))


def test_annealed_epochs_are_fresh_subsets():
    plans = train(SeTa(100, epochs=4, anneal_from=0.5, prune=0.2), grouped_losses(each=10)[0], 4)
    assert [len(plan) for plan in plans[2:]] == [80, 80]
    assert not np.array_equal(plans[2].ids, plans[3].ids)


def test_annealing_counts_training_epochs_and_windows_count_plans():
    losses, group = grouped_losses(each=10)
    sampler = SeTa(100, epochs=8, prune=0.0, window=0.1, epoch_length=100)  # every plan but the first has 10 samples
    train(sampler, losses, 2)
    parts = np.array_split(group[sampler.current_plan.ids], 10)
    assert [set(part) for part in parts] == [{n % 10} for n in range(1, 11)]
    for epoch in range(2, 8):
        sampler.set_epoch(epoch)
    assert len(np.unique(sampler.current_plan.ids)) == 100


def longest_absence(plans, size):
    last, longest = np.full(size, -1), np.zeros(size, dtype=int)
    for n, plan in enumerate(plans):
        longest[plan.ids] = np.maximum(longest, n - last)[plan.ids]
        last[plan.ids] = n
    return np.maximum(longest, len(plans) - last)


def test_revisit_every_bounds_the_absence():
    losses = grouped_losses(each=50)[0]
    options = {"epochs": 40, "prune": 0.5, "window": 0.3}
    forced = train(SeTa(500, **options, revisit_every=4), losses, 40)
    free = train(SeTa(500, **options), losses, 40)
    assert longest_absence(forced, 500).max() <= 4
    assert longest_absence(free, 500).max() > 4


def test_turns_are_even_shares_and_cover_all_ids():
    turns = np.stack([has_turn(range(100_000), n, 7, seed=3) for n in range(5, 12)])
    assert (turns.sum(axis=0) == 1).all()
    assert (np.abs(turns.mean(axis=1) - 1 / 7) <= 5 * np.sqrt(6 / 49 / 100_000)).all()
    assert not np.array_equal(turns[0], has_turn(range(100_000), 5, 7, seed=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prune": 1.4},
            r"prune=1.4\): prune is the share of samples dropped before clustering and must be in \[0, 1\)",
        ),
        ({"prune": -0.1}, "prune=-0.1"),
        ({"prune": NAN}, "prune=nan"),
        ({"epochs": 0}, r"epochs=0\): epochs"),
        ({"groups": 0}, r"groups=0\): groups"),
        ({"groups": 2.5}, r"groups=2.5\)"),
        ({"window": 0.0}, r"window=0.0\): window"),
        ({"window": 1.1}, r"window=1.1\)"),
        ({"anneal_from": -0.1}, r"anneal_from=-0.1\)"),
        ({"rounding": "ceil"}, r"rounding='ceil'\): rounding must be 'code' \(round\) or 'paper' \(ceil\)"),
        ({"revisit_every": 0}, r"revisit_every=0\)"),
        ({"revisit_every": 1.5}, r"revisit_every=1.5\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((ValueError, TypeError), match=r"SeTa\(" + message):
        SeTa(10, **{"epochs": 8, **options})
