"""PlannedSampler as a DataLoader's sampler, and as the model's bookkeeper."""

import pickle
import random
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from samplewise.cuda_ext import Ledger
from samplewise.loaders import Plan, PlannedSampler, with_ids
from samplewise.loaders.testing import check_sampler, train_epoch
from support import Everything, HardHalf, Lengths, Returns, loss_of

COMMON = [{}, {"seed": 3}, {"epoch_length": 33}, {"epoch_length": 250}, {"drop_last": True}, {"shuffle": False}]


@pytest.mark.parametrize("common", COMMON, ids=str)
@pytest.mark.parametrize("kind", [Everything, HardHalf])
def test_contract(kind, common):
    check_sampler(lambda: kind(101, **common))


def test_one_sample():
    check_sampler(lambda: Lengths(1, lengths=[1], shuffle=False))


# --- the contract can fail --------------------------------------------------------------------------------------------


class ReturnsItself(Everything):
    """T1: `__iter__` resets and returns self."""

    def __iter__(self):
        self.it = super().__iter__()
        return self

    def __next__(self):
        return next(self.it)


class GlobalGenerator(Everything):
    def plan(self, epoch, rng):
        np.random.seed(epoch)  # noqa: NPY002
        return super().plan(epoch, rng)


class Unkeyed(Everything):
    def plan(self, epoch, rng):
        return Plan(np.random.default_rng().permutation(self.size)[:50])


class FixedLength(HardHalf):
    """T6: a length frozen when the sampler is built."""

    def __len__(self):
        return self.size // self.num_replicas


class Forgetful(HardHalf):
    def state_dict(self):
        return {**super().state_dict(), "ledger": Ledger(self.size).state_dict()}


class DrawnNotConsumed(HardHalf):
    """T13: saves a position ahead of what the model trained on."""

    def state_dict(self):
        state = super().state_dict()
        return {**state, "cursor": state["cursor"] + torch.tensor([7, 0, 0, 0])}


class SameOrder(Everything):
    def set_epoch(self, epoch):
        pass


class Unpicklable(Everything):
    def __init__(self, size):
        super().__init__(size)
        self.function = lambda: None


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (ReturnsItself, AssertionError, "no side effect|islice|same samples|iter"),
        (GlobalGenerator, AssertionError, "global generator"),
        (Unkeyed, AssertionError, "order|ids"),
        (FixedLength, AssertionError, "len"),
        (Forgetful, AssertionError, "resumed in epoch"),
        (DrawnNotConsumed, AssertionError, "resumed in epoch"),
        (SameOrder, AssertionError, "epoch"),
        (Unpicklable, (AttributeError, pickle.PicklingError), "lambda"),
    ],
)
def test_check_sampler_catches(kind, error, message):
    with pytest.raises(error, match=message):
        check_sampler(lambda: kind(100))


# --- order and length -------------------------------------------------------------------------------------------------


def test_t1_batch_samplers_and_islice_end_their_epochs():
    sampler = Everything(10)
    assert sorted(i for batch in BatchSampler(sampler, 4, False) for i in batch) == list(range(10))
    it = iter(sampler)
    assert [*islice(it, 4), *islice(it, 4), *islice(it, 4)] == list(sampler)
    assert next(it, None) is None
    assert next(it, None) is None


def test_t5_is_a_distributed_sampler_whose_rank_is_looked_up_late():
    sampler = Everything(10)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    sampler.num_replicas, sampler.rank = 3, 1
    assert len(sampler) == 4


def test_t6_lengths_follow_the_plan_on_every_rank():
    ranks = [Lengths(64, lengths=[24, 64, 5], num_replicas=2, rank=r) for r in range(2)]
    for epoch, (length, planned) in enumerate([(12, 24), (32, 64), (3, 5)]):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in ranks]
        assert [len(share) for share in shares] == [length, length]
        assert set(shares[0]) | set(shares[1]) == set(range(planned))
        assert len(set(shares[0]) & set(shares[1])) == 2 * length - planned


def test_drop_last_leaves_out_instead_of_repeating():
    ranks = [Everything(11, drop_last=True, num_replicas=3, rank=r) for r in range(3)]
    assert len({i for sampler in ranks for i in sampler}) == 9
    with pytest.raises(ValueError, match=r"drop_last=True.*leaves none"):
        len(Everything(2, drop_last=True, num_replicas=3, rank=0))


def test_t7_set_epoch_is_idempotent_and_optional():
    called, forgotten = Everything(50), Everything(50)
    for epoch in range(3):
        called.set_epoch(epoch)
        called.set_epoch(epoch)
        assert train_epoch(called) == train_epoch(forgotten)
    assert forgotten.epoch == 2


def test_t7_forgotten_set_epoch_with_a_loader_that_drops_its_last_batch():
    sampler = Everything(10)
    loader = DataLoader(with_ids(range(10)), batch_size=4, sampler=sampler, drop_last=True)
    epochs = []
    for _ in range(3):
        for ids, _ in loader:
            sampler.observe(ids, loss_of(ids))
        epochs.append((sampler.epoch, sampler.consumed))
    assert epochs == [(0, 8), (1, 8), (2, 8)]


def test_t7_looking_at_a_batch_and_dropping_the_last_one():
    sampler = Everything(10)
    loader = DataLoader(with_ids(range(10)), batch_size=4, sampler=sampler, drop_last=True)
    for _ in range(3):
        for ids, _ in loader:
            sampler.observe(ids, loss_of(ids))
            next(iter(loader))
    assert (sampler.epoch, sampler.consumed) == (2, 8)


def test_t7_looking_and_evaluating_in_mid_epoch_is_no_new_epoch():
    sampler = HardHalf(60)
    loader = DataLoader(with_ids(range(60)), batch_size=8, sampler=sampler)
    for number, (ids, _) in enumerate(loader):
        sampler.observe(ids, loss_of(ids))
        if number in (2, 4):
            assert sum(len(ids) for ids, _ in loader) == 60
            next(iter(loader))
    assert (sampler.epoch, sampler.consumed) == (0, 60)
    iter(loader)
    assert sampler.epoch == 0  # the loader asks for the sampler's iterator with its first batch
    next(iter(loader))
    assert sampler.epoch == 1


def test_t7_a_loop_that_calls_set_epoch_is_never_overridden():
    sampler = HardHalf(60)
    sampler.set_epoch(0)
    first = train_epoch(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert sampler.epoch == 0


def test_an_epoch_left_early_and_begun_again_is_warned_of_and_counted_right():
    sampler = Everything(40)
    loader = DataLoader(with_ids(range(40)), batch_size=8, sampler=sampler)
    train_epoch(sampler, batch_size=8, stop=3)
    with pytest.warns(UserWarning, match=r"left early.*set_epoch"):
        train_epoch(sampler, batch_size=8, stop=2)
    assert sampler.consumed == 16
    next(iter(loader))  # a look at a batch between two of training is no new beginning
    order = list(Everything(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for begin in (16, 24):
            ids = torch.tensor(order[begin : begin + 8])
            sampler.observe(ids, loss_of(ids))
    assert sampler.consumed == 32


def test_with_several_ranks_iterating_is_not_collective_once_set_epoch_is_used():
    sampler = Everything(8, num_replicas=2, rank=0)
    sampler.set_epoch(0)
    train_epoch(sampler)
    iter(sampler)
    assert sampler.epoch == 0


def test_integers_of_numpy_and_torch():
    sampler = Everything(np.int64(10), seed=np.int32(3), num_replicas=np.int64(1), rank=np.int64(0))
    sampler.set_epoch(np.int64(2))
    sampler.set_epoch(torch.tensor(2))
    assert type(sampler.epoch) is int
    assert type(sampler.seed) is int
    for wrong in (2.5, True, "2", None):
        with pytest.raises(TypeError, match="epoch"):
            sampler.set_epoch(wrong)
    assert sampler.epoch == 2


def test_a_data_set_that_grew():
    old = HardHalf(20)
    train_epoch(old)
    new = HardHalf(20)
    new.load_state_dict(old.state_dict())
    new.grow(30)
    assert max(new) < 20  # the plan in progress stays
    new.set_epoch(new.epoch + 1)
    assert set(range(20, 30)) <= set(new)  # unseen ones are kept
    with pytest.raises(ValueError, match=r"grow\(30\)"):
        HardHalf(30).load_state_dict(old.state_dict())


def test_set_epoch_back_and_ahead():
    sampler = Everything(20)
    sampler.set_epoch(5)
    ahead = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == list(Everything(20))
    sampler.set_epoch(5)
    assert list(sampler) == ahead
    with pytest.raises(ValueError, match="set_epoch"):
        sampler.set_epoch(-1)


def test_a_fixed_epoch_length_runs_through_whole_plans():
    sampler = Everything(10, epoch_length=15)
    stream = [i for epoch in range(4) for i in (sampler.set_epoch(epoch), *train_epoch(sampler))[1:]]
    assert len(stream) == 60
    for start in range(0, 60, 10):
        assert sorted(stream[start : start + 10]) == list(range(10))


def test_no_shuffle_keeps_the_plans_order():
    plan = Plan(np.array([4, 1, 3]))
    assert list(Returns(5, plan, shuffle=False)) == [4, 1, 3]


def test_t15_heavy_samples_do_not_come_first():
    """The mean weight of the first and last tenth of an epoch, over 200 epochs, against their common mean: z-test."""
    size = 1000
    weights = np.linspace(0, 1, size, dtype=np.float32) + 0.01
    sampler = Returns(size, Plan(np.arange(size)[::-1].copy(), weights[::-1].copy()))
    first, last = [], []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        order = np.fromiter(sampler, np.int64)
        first.append(weights[order[:100]].mean())
        last.append(weights[order[-100:]].mean())
    se = weights.std() / np.sqrt(200 * 100)
    for part in (first, last):
        assert abs(np.mean(part) - weights.mean()) < 5 * se


def test_t14_no_limit_at_2_24_and_the_first_id_at_once():
    sampler = Everything(2**24 + 1000)
    assert len(sampler) == 2**24 + 1000
    some = list(islice(sampler, 100_000))
    assert len(set(some)) == 100_000
    # uniform over the range: the mean is N/2 +- 5 N / sqrt(12 n)
    assert abs(np.mean(some) / len(sampler) - 0.5) < 5 / np.sqrt(12 * 100_000)


def test_t19_global_generators_are_untouched():
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    sampler = HardHalf(100)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        train_epoch(sampler)
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == states  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_order", [True, False])
def test_t3_t4_losses_land_on_their_rows_whatever_the_loader_fetches_ahead(workers, in_order):
    sampler = HardHalf(300)
    loader = DataLoader(
        with_ids(range(300)),
        batch_size=16,
        sampler=sampler,
        num_workers=workers,
        in_order=in_order,
        persistent_workers=workers > 0,
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        ahead = iter(loader)
        batches = [next(ahead), next(ahead)]  # a loop that fetches two batches before it trains on the first
        for batch in ahead:
            batches.append(batch)
            ids, items = batches.pop(0)
            sampler.observe(ids, (items.float() + 1000 * epoch).requires_grad_())
        for ids, items in batches:
            sampler.observe(ids, (items.float() + 1000 * epoch).requires_grad_())
    last = sampler.ledger.column("loss_last").numpy()
    assert sampler.ledger.seen.all()
    assert (last % 1000 == np.arange(300)).all()


def test_t24_persistent_workers_follow_every_new_plan():
    sampler = Lengths(40, lengths=[40, 8, 24])
    loader = DataLoader(with_ids(range(40)), batch_size=4, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch, length in enumerate([40, 8, 24]):
        sampler.set_epoch(epoch)
        assert len(loader) == length // 4
        assert sorted(torch.cat([ids for ids, _ in loader]).tolist()) == list(range(length))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size=0"),
        ({"size": -3}, ValueError, r"size=-3"),
        ({"size": 10.0}, TypeError, r"len\(dataset\)"),
        ({"size": [1, 2]}, TypeError, r"len\(dataset\)"),
        ({"size": 10, "seed": -1}, ValueError, "seed"),
        ({"size": 10, "seed": 1.5}, TypeError, "seed"),
        ({"size": 10, "epoch_length": 0}, ValueError, "epoch_length"),
        ({"size": 10, "epoch_length": "epoch"}, TypeError, "epoch_length"),
        ({"size": 10, "epoch_length": 10**9}, ValueError, "epoch_length"),
        ({"size": 0}, ValueError, r"Everything\(size=0\)"),
        ({"size": 10, "fingerprint": 3}, TypeError, "fingerprint"),
        ({"size": 10, "ema": None}, TypeError, "ema"),
        ({"size": 10, "ema": 1.0}, ValueError, "ema"),
        ({"size": 10, "num_replicas": 2, "rank": 2}, ValueError, "rank"),
        ({"size": 10, "num_replicas": 0, "rank": 0}, ValueError, "num_replicas"),
        ({"size": 10, "sead": 1}, TypeError, "sead"),
    ],
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        Everything(**arguments)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ([1, 2], TypeError, "must return a Plan"),
        (Plan(np.array([], dtype=np.int64)), ValueError, r"Returns.plan\(0\).*empty"),
        (Plan(np.array([9])), ValueError, r"\[0, 5\)"),
    ],
)
def test_bad_plans_are_refused_when_they_are_made(plan, error, message):
    with pytest.raises(error, match=message):
        len(Returns(5, plan))


def test_abstract():
    with pytest.raises(TypeError, match="abstract"):
        PlannedSampler(5)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_epoch(HardHalf(30))
