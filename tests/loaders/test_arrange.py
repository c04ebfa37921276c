"""DistinctBatches, and the sampler's option ``arrange``."""

import io
import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samplewise.loaders import DistinctBatches, Plan, Ragged, with_ids
from samplewise.loaders.seeding import generator
from samplewise.loaders.testing import check_sampler, train_epoch
from support import Everything, HardHalf, Lengths, Returns, loss_of


def arranged(keys, batch_size, *, ranks=1, seed=0, ids=None):
    ids = np.arange(len(keys)) if ids is None else np.asarray(ids)
    order = DistinctBatches(keys, batch_size)(ids, generator(seed), ranks)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(ids)))
    return order


def batches(order, size):
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def clashes(keys, order, size):
    """How often a sample shares a key with an earlier one of its batch, key by key."""
    rows = Ragged.from_lists(keys)
    held = (Counter(key for i in batch for key in set(rows[int(i)].tolist())) for batch in batches(order, size))
    return sum(count - 1 for counts in held for count in counts.values())


def groups(*sizes):
    """One key a sample: ``groups(2, 3)`` is 0 0 1 1 1."""
    return np.repeat(np.arange(len(sizes)), sizes)


# --- one key a sample -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "size"),
    [
        (groups(*[2] * 5), 5),  # two full batches, each key in both
        (groups(3, 3, 2, 1, 1), 4),  # 3 batches; the keys of 3 samples need the 2 places of the last one
        (groups(*[4] * 7), 7),
        (groups(*[1] * 10), 4),
        (groups(*[50] * 20), 20),
        (groups(1), 8),
        (groups(1, 1, 1), 8),
        (groups(*range(1, 21)), 10),  # 210 samples, 21 batches
        ([[5], [], [-3], [], [5], []], 3),
        ([[], []], 2),
        (groups(*[2] * 30) * 10**15 - 7, 6),
        ([[1, 1], [1], [2, 2, 2], [2]], 2),  # a key that is repeated in a row is one
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(5))
def test_no_two_samples_of_a_batch_share_a_key(keys, size, seed):
    assert clashes(keys, arranged(keys, size, seed=seed), size) == 0


def test_whatever_is_possible_is_found():
    """One key a sample: an order exists where no key has more samples than there are batches, and no more keys have
    one in each than the last batch has places."""
    rng, found = generator(0), 0
    for _ in range(400):
        size, number = int(rng.integers(1, 9)), int(rng.integers(1, 60))
        keys = rng.integers(0, rng.integers(1, 30), number)
        many = -(-number // size)
        counts = np.bincount(keys)
        last = number - (many - 1) * size
        possible = counts.max() <= many and (counts == many).sum() <= last
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            order = arranged(keys, size)
        assert (clashes(keys, order, size) == 0) == possible == (not caught)
        found += possible
    assert 100 < found < 350


def test_what_cannot_be_kept_apart_is_spread_evenly_and_warned_of():
    keys = groups(25, *[1] * 15)  # 8 batches of 5; one key has 25 samples, so 3 or 4 of them in each
    with pytest.warns(UserWarning, match=r"17 times among 40 samples.*key 0 has 25 samples and there are 8 batches"):
        order = arranged(keys, 5)
    held = [sum(keys[batch] == 0) for batch in batches(order, 5)]
    assert set(held) == {3, 4}


def test_the_warning_where_only_the_short_last_batch_is_in_the_way():
    keys = groups(3, 3, 3)  # batches of 4, 4 and 1
    with pytest.warns(UserWarning, match=r"2 times among 9 samples.*no order without was found"):
        assert clashes(keys, arranged(keys, 4), 4) == 2


# --- several keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "size", "names", "most"),
    [(100, 5, 60, 3), (1000, 32, 500, 4), (999, 50, 400, 3), (5000, 256, 20_000, 6)],
)
@pytest.mark.parametrize("seed", range(3))
def test_several_keys(number, size, names, most, seed):
    rng = generator(seed)
    keys = [rng.choice(names, rng.integers(1, most + 1), replace=False).tolist() for _ in range(number)]
    assert clashes(keys, arranged(keys, size, seed=seed), size) == 0


@pytest.mark.parametrize(("size", "names"), [(8, 24), (32, 100), (32, 80)])
def test_several_keys_with_little_room(size, names):
    """An order exists by construction, in which each batch holds 0.64 to 0.8 of all keys."""
    for seed in range(5):
        rng = generator(seed)
        keys = [pair for _ in range(10) for pair in rng.permutation(names)[: 2 * size].reshape(size, 2).tolist()]
        rng.shuffle(keys)
        assert clashes(keys, arranged(keys, size, seed=seed), size) == 0


def test_several_keys_that_cannot_be_kept_apart():
    keys = [[0, i + 1] for i in range(30)]
    with pytest.warns(UserWarning, match=r"24 times among 30 samples.*key 0 has 30 samples and there are 6 batches"):
        assert clashes(keys, arranged(keys, 5), 5) == 24


# --- randomness -------------------------------------------------------------------------------------------------------


def fits(counts, expected):
    """Whether a chi-square statistic of counts lies within 5 standard deviations of its mean."""
    freedom = counts.size - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)


def test_without_shared_keys_every_order_is_equally_likely():
    times = 24 * 200
    found = Counter(tuple(DistinctBatches(range(4), 3)(np.arange(4), generator(seed), 1)) for seed in range(times))
    assert set(found) == set(itertools.permutations(range(4)))
    assert fits(np.array(list(found.values())), 200)


@pytest.mark.parametrize(
    "keys",
    [groups(4, 2, 2, 2, 1, 1, 1, 1), [[0, 1], [1, 2], [0], [2, 3], *[[i] for i in range(4, 14)]]],
    ids=["one", "several"],
)
def test_every_sample_is_equally_likely_in_every_full_batch(keys):
    """14 samples in three batches of 4 and a last one of 2: how often each stands where in the full ones."""
    times = 2000
    distinct, ids = DistinctBatches(keys, 4), np.arange(14)
    places = np.zeros((14, 14))
    for seed in range(times):
        places[distinct(ids, generator(seed), 1), ids] += 1
    for sample in range(14):
        full = places[sample, :12].reshape(3, 4)
        assert fits(full.sum(axis=1), full.sum() / 3)
        assert fits(full.ravel(), full.sum() / 12)


def test_samples_come_in_the_short_last_batch_as_often_as_its_size_says():
    keys, times = groups(*[2] * 20, *[1] * 23), 3000  # 63 samples, batches of 10 and a last one of 3
    distinct, ids = DistinctBatches(keys, 10), np.arange(63)
    last = sum(np.bincount(distinct(ids, generator(seed), 1)[60:], minlength=63) for seed in range(times))
    assert fits(last, times * 3 / 63)


def test_the_order_depends_on_the_generator_alone():
    keys = groups(*[3] * 20)
    assert (arranged(keys, 6, seed=1) == arranged(keys, 6, seed=1)).all()
    assert (arranged(keys, 6, seed=1) != arranged(keys, 6, seed=2)).any()


# --- as a sampler's option --------------------------------------------------------------------------------------------

SIZE, BATCH = 101, 7
KEYS = [[i // 2, 51 + i % 51] for i in range(SIZE)]


def make(kind=Everything, size=SIZE, **options):
    return kind(size, arrange=DistinctBatches(KEYS, BATCH), **options)


COMMON = [{}, {"seed": 3}, {"epoch_length": 34}, {"epoch_length": 250}, {"drop_last": True}]


@pytest.mark.filterwarnings("ignore:DistinctBatches")  # plans of one batch
@pytest.mark.parametrize("common", COMMON, ids=str)
@pytest.mark.parametrize("kind", [Everything, HardHalf])
def test_contract(kind, common):
    check_sampler(lambda: make(kind, **common))


@pytest.mark.parametrize("common", COMMON, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_batches_of_all_ranks_together_are_distinct(ranks, common):
    """Those that a loader makes, in every epoch; also where the last one is filled up with the epoch's first ids."""
    samplers = [make(num_replicas=ranks, rank=rank, **common) for rank in range(ranks)]
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        loaders = [DataLoader(with_ids(range(SIZE)), batch_size=BATCH, sampler=sampler) for sampler in samplers]
        together = [torch.cat([ids for ids, _ in parts]).tolist() for parts in zip(*loaders, strict=True)]
        length = common.get("epoch_length", SIZE)
        served = sum(map(len, together))
        assert len(together) == -(-served // (BATCH * ranks))
        assert served == (length // ranks * ranks if common.get("drop_last") else -(-length // ranks) * ranks)
        for batch in together:
            keys = [key for i in batch for key in KEYS[i]]
            assert len(keys) == len(set(keys))


def test_the_number_of_ranks_counts_when_the_order_is_made_not_when_the_plan_is():
    sampler = make()
    assert len(sampler) == SIZE  # a schedule wants to know, before there is a process group
    list(sampler)
    sampler.num_replicas, sampler.rank = 2, 1
    assert list(sampler) == list(make(num_replicas=2, rank=1))


def test_weights_stay_with_their_ids():
    weights = np.arange(1, SIZE + 1, dtype=np.float32)
    sampler = Returns(SIZE, Plan(np.arange(SIZE)[::-1].copy(), weights), arrange=DistinctBatches(KEYS, BATCH))
    ids = torch.tensor(list(sampler))
    assert sampler.ledger.weights(ids).tolist() == (SIZE - ids).tolist()
    assert sorted(ids.tolist()) == list(range(SIZE))


def test_plans_change_their_length():
    sampler = make(Lengths, lengths=[40, 101, 14])
    for epoch, length in enumerate([40, 101, 14]):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(length))
        assert clashes(KEYS, order, BATCH) == 0


def test_an_epoch_of_fixed_length_holds_the_ids_that_it_would_hold_without():
    for epoch in range(4):
        one, other = make(epoch_length=150), Everything(SIZE, epoch_length=150)
        for past in range(epoch + 1):
            one.set_epoch(past)
            other.set_epoch(past)
        assert sorted(one) == sorted(other)


def saved(sampler):
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_with_another_number_of_ranks_the_epoch_goes_on_as_it_was(ranks):
    """No sample is passed over or comes twice; the next epoch is arranged for the new number."""
    sampler = make(num_replicas=3 - ranks, rank=0)
    order = list(make(num_replicas=1)) if ranks == 2 else None
    train_epoch(sampler, batch_size=4, stop=6)
    state = saved(sampler)
    resumed = [make(num_replicas=ranks, rank=rank) for rank in range(ranks)]
    rests = []
    for other in resumed:
        other.load_state_dict(state)
        assert saved(other)["ranks"] == 3 - ranks
        rests.append(list(other))
    rest = [i for group in zip(*rests, strict=True) for i in group]
    done = sampler.consumed
    assert done == 24 * (3 - ranks)
    assert len(set(rest[: SIZE - done])) == SIZE - done  # behind it, on two ranks, the filling
    if order:
        assert rest[: SIZE - done] == order[done:]
    for rank, other in enumerate(resumed):
        other.set_epoch(1)
        fresh = make(num_replicas=ranks, rank=rank)
        fresh.set_epoch(1)
        assert list(other) == list(fresh)


def test_a_state_is_loaded_into_a_sampler_that_was_iterated():
    ahead, sampler = make(), make()
    ahead.set_epoch(1)
    train_epoch(ahead, stop=2)
    list(sampler)
    sampler.load_state_dict(saved(ahead))
    assert list(sampler) == list(ahead)[14:]


def function(ids, rng, ranks):
    return rng.permutation(len(ids))


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "message"),
    [
        (None, DistinctBatches(KEYS, BATCH), "saved with arrange=None, this one has 'DistinctBatches"),
        (DistinctBatches(KEYS, BATCH), None, r"saved with arrange='DistinctBatches\(.*, this one has None"),
        (function, DistinctBatches(KEYS, BATCH), r"arrange='function\(\)'"),
        (
            DistinctBatches(KEYS, BATCH),
            DistinctBatches(KEYS, BATCH + 1),
            f"this one has .*batch_size={BATCH + 1}, keys",
        ),
        (DistinctBatches(KEYS, BATCH), DistinctBatches([0, *KEYS[1:]], BATCH), "keys .*keys"),
    ],
)
def test_a_state_of_another_arrangement_is_refused(saved_with, loaded_with, message):
    sampler, other = Everything(SIZE, arrange=saved_with), Everything(SIZE, arrange=loaded_with)
    train_epoch(sampler, stop=2)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved(sampler))
    assert (other.epoch, other.consumed) == (0, 0)


def test_a_state_from_before_there_was_an_arrangement():
    sampler = Everything(SIZE)
    train_epoch(sampler, stop=2)
    state = saved(sampler)
    del state["arrange"], state["ranks"]
    resumed = Everything(SIZE)
    resumed.load_state_dict(state)
    assert list(resumed) == list(sampler)[14:]
    with pytest.raises(ValueError, match="arrange"):
        make().load_state_dict(state)


def test_training_with_losses_and_a_loader():
    sampler = make(HardHalf)
    loader = DataLoader(with_ids(range(SIZE)), batch_size=BATCH, sampler=sampler, num_workers=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for ids, _ in loader:
            sampler.observe(ids, loss_of(ids, sampler.step))
            keys = [key for i in ids.tolist() for key in KEYS[i]]
            assert len(keys) == len(set(keys))
    assert sampler.ledger.seen.all()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1], ["a"]], 2), TypeError, r"DistinctBatches\(keys\): row 1 must hold integers"),
        (([[1]], 0), ValueError, r"DistinctBatches\(batch_size=0\)"),
        (([[1]], 2.0), TypeError, r"DistinctBatches\(batch_size=2.0\)"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        DistinctBatches(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"arrange": 7}, TypeError, r"Everything\(arrange=7\): arrange must be callable"),
        ({"arrange": function, "shuffle": False}, ValueError, "leave one of them out"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Everything(10, **options)


@pytest.mark.parametrize(
    "order", [np.arange(9), np.zeros(10, int), np.arange(1, 11), np.arange(-1, 9), np.arange(10.0), np.eye(10), None]
)
def test_orders_that_are_no_permutation(order):
    with pytest.raises(ValueError, match=r"arrange must give a permutation of the positions 0 ... 9"):
        list(Everything(10, arrange=lambda ids, rng, ranks: order))


def test_keys_of_too_few_samples():
    with pytest.raises(ValueError, match=r"it has keys of 100 samples, but sample 100 is planned"):
        list(Everything(SIZE, arrange=DistinctBatches(KEYS[:-1], BATCH)))
