"""Another number of ranks: an epoch that was begun by some goes on with others; and loaders that deal out the ids."""

import re
from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from samplewise.loaders import DistinctBatches
from samplewise.loaders.guard import check_batch
from samplewise.loaders.streams import KeyIndex, keep
from samplewise.loaders.testing import _through_file as through_file
from support import Everything, HardHalf, Lengths, loss_of

SIZE, BATCH = 103, 3


def make(world, *, kind=HardHalf, **settings):
    """The samplers of all ranks."""
    return [kind(SIZE, num_replicas=world, rank=rank, **settings) for rank in range(world)]


def train(ranks, *, stop=None):
    """Steps of all ranks at once; each ledger gets what a sync would bring. Gives the ids by step."""
    loaders = [BatchSampler(sampler, BATCH, drop_last=False) for sampler in ranks]
    steps = []
    for number, batches in enumerate(zip(*map(iter, loaders), strict=True)):
        if number == stop:
            break
        observe(ranks, batches)
        steps.append([i for batch in batches for i in batch])
    return steps


def observe(ranks, batches):
    batches = [torch.tensor(batch) for batch in batches]
    step = ranks[0].step
    for rank, sampler in enumerate(ranks):
        for other, batch in enumerate(batches):
            if other != rank:
                sampler.ledger.update(batch, loss_of(batch, step))
        sampler.observe(batches[rank], loss_of(batches[rank], step))


def resumed(state, world, **settings):
    ranks = make(world, **settings)
    for sampler in ranks:
        sampler.load_state_dict(through_file(state))
    return ranks


def flat(steps):
    return [i for step in steps for i in step]


def check_whole(served, plan, world):
    """Nothing lost, and nothing repeated but what fills up the last step."""
    assert not Counter(plan) - Counter(served)
    assert len(served) - len(plan) < world


SETTINGS = {
    "plans that change": {},
    "fixed length": {"epoch_length": 77},
    "in order": {"shuffle": False},
    "arranged": {"arrange": DistinctBatches([[i // 3] for i in range(SIZE)], BATCH)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("worlds", [(4, 2), (4, 8), (2, 4), (3, 2), (4, 1), (1, 3), (2, 3, 2), (4, 3, 4, 1)])
def test_another_number_of_ranks_goes_on_with_the_epoch(worlds, settings):
    ranks = make(worlds[0], **settings)
    train(ranks)
    for sampler in ranks:
        sampler.set_epoch(1)  # a plan that depends on the losses
    plan = ranks[0].current_plan.ids.tolist()
    served = flat(train(ranks, stop=2))
    for world in worlds[1:-1]:
        ranks = resumed(ranks[0].state_dict(), world, **settings)
        served += flat(train(ranks, stop=2))
    last = worlds[-1]
    ranks = resumed(ranks[0].state_dict(), last, **settings)
    assert ranks[0].current_plan.ids.tolist() == plan
    state = through_file(ranks[0].state_dict())
    rest = train(ranks)
    check_whole(served + flat(rest), plan, last)
    assert all(sampler.consumed >= len(plan) for sampler in ranks)
    again = resumed(state, last, **settings)  # once more, with as many ranks
    assert train(again) == rest
    for sampler in (*ranks, *again):
        sampler.set_epoch(2)
    assert list(again[0]) == list(ranks[0])
    assert sum(map(len, ranks)) - len(ranks[0].current_plan) < last


def test_the_first_part_is_the_same_for_any_number_of_ranks():
    """Positions count over all ranks, so that only the filling differs."""
    orders = []
    for world in (1, 2, 4):
        ranks = make(world)
        orders.append([i for step in zip(*ranks, strict=True) for i in step][:SIZE])
    assert orders[0] == orders[1] == orders[2]


def test_lengths_after_a_change_of_ranks():
    ranks = make(4, kind=Lengths, lengths=[50])
    train(ranks, stop=1)  # 12 of 50
    (alone,) = resumed(ranks[0].state_dict(), 1, kind=Lengths, lengths=[50])
    assert (len(alone), alone.total_size, alone.consumed) == (50, 50, 12)
    assert len(list(alone)) == 38
    ranks = resumed(ranks[0].state_dict(), 5, kind=Lengths, lengths=[50])
    assert {len(sampler) for sampler in ranks} == {3 + 8}  # 12 of 5 ranks' samples are done, 38 left
    assert {len(list(sampler)) for sampler in ranks} == {8}
    assert {sampler.total_size for sampler in ranks} == {12 + 40}


def test_drop_last_leaves_out_less_than_one_sample_a_rank():
    ranks = make(4, kind=Lengths, lengths=[50], drop_last=True)
    served = flat(train(ranks, stop=1))
    ranks = resumed(ranks[0].state_dict(), 3, kind=Lengths, lengths=[50], drop_last=True)
    served += flat(train(ranks))
    assert len(set(served)) == len(served) == 12 + 36


def test_a_loaders_state_of_other_ranks():
    ranks = make(4)
    iterator = iter(ranks[0])
    for _ in range(2):
        next(iterator)
    state = iterator.state_dict()
    train(ranks, stop=2)
    (alone,) = resumed(ranks[0].state_dict(), 1)
    with pytest.raises(ValueError, match=r"position 8, which another number of ranks.*goes on at position 24"):
        iter(alone).load_state_dict(state)


def test_a_limit_was_that_of_the_other_ranks():
    ranks = make(4)
    for sampler in ranks:
        sampler.epoch_samples = 96
    train(ranks, stop=2)
    assert resumed(ranks[0].state_dict(), 4)[0].epoch_samples == 96
    assert resumed(ranks[0].state_dict(), 2)[0].epoch_samples is None


# --- a loader that deals out the ids ----------------------------------------------------------------------------------


def dealt_by_accelerate(ranks):
    """Each rank's batches, as accelerate's loaders make them."""
    world = len(ranks)
    return [
        list(BatchSamplerShard(BatchSampler(sampler, BATCH, drop_last=False), world, rank))
        for rank, sampler in enumerate(ranks)
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_the_loader_gets_all_ids_on_every_rank(world):
    ranks = make(world)
    for sampler in ranks:
        sampler.sharding = "loader"
    for epoch in range(3):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        assert {len(sampler) for sampler in ranks} == {len(list(ranks[0]))} == {ranks[0].total_size}
        assert all(list(sampler) == list(ranks[0]) for sampler in ranks)
        shares = dealt_by_accelerate(ranks)
        plan = ranks[0].current_plan.ids.tolist()
        served = [i for batches in shares for batch in batches for i in batch]
        assert set(served) == set(plan)
        assert len(served) - len(plan) < world * BATCH
        for number, batches in enumerate(zip(*shares, strict=True)):
            for sampler, batch in zip(ranks, batches, strict=True):
                check_batch("test", sampler, torch.tensor(batch), "")
                assert sampler.consumed == number * world * BATCH
            observe(ranks, batches)
        assert all(sampler.consumed >= len(plan) for sampler in ranks)


def test_resume_where_the_loader_deals_out():
    """Exact to the last batch, which is filled up with the epoch's first ids."""
    ranks = make(2)
    for sampler in ranks:
        sampler.sharding, sampler.step_samples = "loader", 2 * BATCH
    assert ranks[0].total_size == len(ranks[0]) == 108
    whole = list(zip(*dealt_by_accelerate(ranks), strict=True))
    assert [i for batch in whole[-1] for i in batch][-5:] == [i for batch in whole[0] for i in batch][:5]
    for batches in whole[:5]:
        observe(ranks, batches)
    again = resumed(ranks[0].state_dict(), 2)
    for sampler in again:
        sampler.sharding, sampler.step_samples = "loader", 2 * BATCH
    assert list(zip(*dealt_by_accelerate(again), strict=True)) == whole[5:]


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["sampler", "loader"])
def test_a_batch_of_another_sampler_is_not_due(sharding):
    ranks = make(2)
    for sampler in ranks:
        sampler.sharding = sharding
    others = [(i * 37) % SIZE for i in range(BATCH)]
    with pytest.raises(RuntimeError, match=r"^SomeCallback: the batch holds the samples \[0, 37, 74\].*Set it\.$"):
        check_batch("SomeCallback", ranks[1], torch.tensor(others), "Set it.")


def test_filling_up_with_what_other_ranks_began_the_epoch_with():
    ranks = make(4)
    for sampler in ranks:
        sampler.sharding = "loader"
    shares = list(zip(*dealt_by_accelerate(ranks), strict=True))
    for batches in shares[:8]:
        observe(ranks, batches)
    sampler = resumed(ranks[0].state_dict(), 2)[1]
    sampler.sharding = "loader"
    sampler.advance_to(SIZE - 1)
    check_batch("test", sampler, torch.tensor(shares[0][0]), "")
    sampler.advance_to(8 * 4 * BATCH)
    with pytest.raises(RuntimeError, match="are due"):
        check_batch("test", sampler, torch.tensor(shares[0][0]), "")


@pytest.mark.parametrize("called", [False, True])
def test_a_loop_over_a_stream_that_never_calls_set_epoch(called, recwarn):
    sampler = Everything(10)
    stage = keep(sampler, KeyIndex.from_keys(range(10)), key="row")
    for epoch in range(3):
        if called:
            sampler.set_epoch(epoch)
        for sample in stage({"row": row} for row in range(10)):
            ids = torch.tensor([sample["sample_id"]])
            sampler.observe(ids, torch.ones(1, requires_grad=True))
    warned = [str(warning.message) for warning in recwarn]
    assert len(warned) == (not called)
    assert all(re.search(r"^Everything: .*Call sampler\.set_epoch", text) for text in warned)
