import numpy as np
import pytest
from ranks_support import Threads

from samplewise.plugins import RS2
from samplewise.plugins.rs2 import Strata, hash_keep, row_block


def rounds(sampler, count, start=0):
    return [sampler.plan(n, np.random.default_rng(n)).ids for n in range(start, start + count)]


# --- without replacement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "ratio", "k"), [(100, 0.1, 10), (103, 0.1, 10), (7, 0.3, 2), (5, 0.01, 1), (9, 1.0, 9)]
)
def test_every_id_comes_once_in_each_pass(size, ratio, k):
    passes = 3
    drawn = rounds(RS2(size, ratio=ratio), -(-passes * size // k))
    assert {len(ids) for ids in drawn} == {k}
    row = np.concatenate(drawn)
    for start in range(0, passes * size, size):
        assert sorted(row[start : start + size]) == list(range(size))


def test_passes_differ_and_follow_the_seed():
    one, other = row_block(1000, 0, 3000, seed=1).reshape(3, -1), row_block(1000, 0, 1000, seed=2)
    assert not (one[0] == one[1]).all()
    assert not (one[1] == one[2]).all()
    assert not (one[0] == other).all()


def test_a_round_needs_no_earlier_round():
    whole = row_block(70_000, 0, 200_000, seed=5)
    np.testing.assert_array_equal(row_block(70_000, 130_000, 30_000, seed=5), whole[130_000:160_000])
    fresh = RS2(1000, ratio=0.3, seed=9)
    np.testing.assert_array_equal(rounds(fresh, 1, start=7)[0], rounds(RS2(1000, ratio=0.3, seed=9), 8)[7])


def test_sampler_serves_the_round():
    sampler = RS2(1000, ratio=0.2)
    assert len(sampler) == 200
    seen = list(sampler)
    sampler.set_epoch(1)
    seen += list(sampler)
    assert len(set(seen)) == 400


# --- stratified -------------------------------------------------------------------------------------------------------


def skewed_labels(size=2000):
    return np.random.default_rng(0).choice(5, size, p=[0.5, 0.3, 0.15, 0.04, 0.01]) * 10 - 7


def test_stratified_rounds_hold_each_class_by_its_share():
    labels, ratio = skewed_labels(), 0.1
    sampler = RS2(labels.size, ratio=ratio, mode="stratified", labels=labels)
    drawn = rounds(sampler, 25)
    for ids in drawn:
        assert ids.size == 200
        for label in np.unique(labels):
            share = (labels == label).mean()
            assert abs((labels[ids] == label).sum() - 200 * share) <= 2
    row = np.concatenate(drawn)
    for start in (0, 2000):
        assert sorted(row[start : start + 2000]) == list(range(2000))
    assert not np.array_equal(row[:2000], row[2000:4000])


def test_stratified_rounds_across_passes_and_without_history():
    labels = skewed_labels(103)
    strata = Strata(labels, seed=1)
    row = np.concatenate([strata.block(7 * n, 7) for n in range(60)])
    for start in (0, 103, 206):
        assert sorted(row[start : start + 103]) == list(range(103))
    np.testing.assert_array_equal(np.sort(Strata(labels, seed=1).block(98, 14)), np.sort(row[98:112]))


def test_stratified_draws_each_member_of_a_class_equally_often():
    """Over 2,000 seeds, 5 standard errors of sqrt(R p (1 - p)), p = 1/4."""
    labels, hits = np.array([0] * 8 + [1] * 4), np.zeros(12)
    for seed in range(2000):
        hits[RS2(12, ratio=0.25, mode="stratified", labels=labels, seed=seed).plan(0, None).ids] += 1
    assert (np.abs(hits - 500) <= 5 * np.sqrt(2000 * 0.25 * 0.75)).all()


# --- with replacement -------------------------------------------------------------------------------------------------


def test_with_replacement_draws_k_of_all_ids():
    drawn = np.concatenate(rounds(RS2(10, ratio=1.0, mode="with_replacement"), 2000))
    hits = np.bincount(drawn, minlength=10)
    assert drawn.size == 20_000
    assert (np.abs(hits - 2000) <= 5 * np.sqrt(20_000 * 0.1 * 0.9)).all()
    assert max(np.bincount(ids).max() for ids in rounds(RS2(10, ratio=1.0, mode="with_replacement"), 20)) > 1


# --- hash -------------------------------------------------------------------------------------------------------------


def assert_share(keep, p):
    """Five standard errors of the mean of keep.size Bernoulli variables."""
    assert abs(keep.mean() - p) <= 5 * np.sqrt(p * (1 - p) / keep.size)


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.93])
def test_hash_keeps_the_ratio_in_every_round_and_stretch_of_ids(ratio):
    ids = np.arange(200_000)
    for epoch in range(4):
        keep = hash_keep(ids, epoch, 0, ratio)
        assert_share(keep, ratio)
        for part in (keep[::2], keep[1::2], keep[:20_000], keep[-20_000:], keep[:: 2**10]):
            assert_share(part, ratio)
    assert_share(hash_keep(ids + 2**40, 0, 0, ratio), ratio)


def test_hash_rounds_seeds_and_neighbours_are_independent():
    ids, p = np.arange(200_000), 0.3
    keep = hash_keep(ids, 0, 0, p)
    for other in (
        hash_keep(ids, 1, 0, p),
        hash_keep(ids, 2, 0, p),
        hash_keep(ids, 0, 1, p),
        hash_keep(ids + 1, 0, 0, p),
    ):
        assert_share(keep & other, p * p)
    by_epoch = np.mean([hash_keep(ids[:2000], epoch, 0, p) for epoch in range(400)], axis=0)
    assert (np.abs(by_epoch - p) <= 5 * np.sqrt(p * (1 - p) / 400)).all()


def test_hash_is_a_pure_function_of_each_id():
    ids = np.random.default_rng(0).integers(0, 2**31, 100_000)
    keep = hash_keep(ids, 3, 7, 0.4)
    order = np.random.default_rng(1).permutation(ids.size)
    np.testing.assert_array_equal(hash_keep(ids[order], 3, 7, 0.4), keep[order])
    np.testing.assert_array_equal(hash_keep(ids.astype(np.uint32), 3, 7, 0.4), keep)
    np.testing.assert_array_equal(hash_keep(ids.reshape(100, -1), 3, 7, 0.4), keep.reshape(100, -1))
    assert bool(hash_keep(int(ids[5]), 3, 7, 0.4)) == keep[5]
    assert hash_keep(ids, 3, 7, 1.0).all()


def test_hash_keeps_grow_with_the_ratio():
    ids = np.arange(10_000)
    assert (hash_keep(ids, 0, 0, 0.3) <= hash_keep(ids, 0, 0, 0.4)).all()


def test_hash_plan_is_the_function_and_never_empty():
    sampler = RS2(5000, ratio=0.2, mode="hash", seed=11)
    np.testing.assert_array_equal(rounds(sampler, 1, 4)[0], np.flatnonzero(hash_keep(np.arange(5000), 4, 11, 0.2)))
    assert {ids.size for ids in rounds(RS2(1, ratio=0.01, mode="hash"), 50)} == {1}


# --- shares -----------------------------------------------------------------------------------------------------------


def plans_of_shares(monkeypatch, size, count, **options):
    """The plans of three ranks, each of which plans its share: ids of all of them together."""

    def plans(rank):
        sampler = RS2(size, sharded=True, **options)
        return [sampler.plan(n, np.random.default_rng((n, rank))).ids for n in range(count)]

    return [np.concatenate(parts) for parts in zip(*Threads(monkeypatch).run(3, plans), strict=True)]


def test_shares_of_hashed_rounds_are_those_of_the_whole(monkeypatch):
    whole = rounds(RS2(500, ratio=0.2, mode="hash"), 3)
    for ids, expected in zip(plans_of_shares(monkeypatch, 500, 3, ratio=0.2, mode="hash"), whole, strict=True):
        np.testing.assert_array_equal(np.sort(ids), expected)
    assert {ids.size for ids in plans_of_shares(monkeypatch, 3, 50, ratio=1e-9, mode="hash")} == {1}


def test_shares_of_draws_with_replacement_are_uniform(monkeypatch):
    """Each id equally often, within 5 standard errors; as many draws on a rank's share as fall there by chance."""
    drawn = plans_of_shares(monkeypatch, 31, 200, ratio=0.7, mode="with_replacement")
    assert {ids.size for ids in drawn} == {22}
    counts = np.bincount(np.concatenate(drawn), minlength=31)
    assert (np.abs(counts - 4400 / 31) <= 5 * np.sqrt(4400 * 30) / 31).all()
    here = np.array([np.count_nonzero(ids % 3 == 0) for ids in drawn])  # Binomial(22, 11/31), variance 5.04
    assert abs(here.var() - 5.04) <= 5 * 5.04 * np.sqrt(2 / 200)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0.0}, ValueError, r"RS2\(ratio=0.0\): ratio is .* must be in \(0, 1\]"),
        ({"ratio": 1.5}, ValueError, "ratio=1.5"),
        ({"ratio": float("nan")}, ValueError, "ratio=nan"),
        ({"mode": "strat"}, ValueError, "'without_replacement', 'with_replacement', 'stratified', 'hash'"),
        ({"mode": "stratified"}, ValueError, "needs labels"),
        ({"labels": [0] * 10}, ValueError, "labels are for mode='stratified'"),
        ({"mode": "stratified", "labels": [0] * 9}, ValueError, r"\(10,\), not \(9,\)"),
        ({"mode": "stratified", "labels": [0.5] * 10}, TypeError, "must be integers"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        RS2(10, **options)


def test_hash_keep_rejects_bad_arguments():
    with pytest.raises(ValueError, match=r"hash_keep\(ratio=2\)"):
        hash_keep([1], 0, 0, 2)
    with pytest.raises(TypeError, match="ids must be integers"):
        hash_keep([0.5], 0, 0, 0.5)
