"""A plan of which each rank makes its share: all ranks together serve what one plan over the whole ledger would."""

import copy
import io
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from ranks_support import Threads
from torch.utils.data import BatchSampler, DataLoader

from samplewise.loaders import DistinctBatches, Plan, PlannedSampler, shares, with_ids
from samplewise.loaders.shares import reshard_samplers
from samplewise.loaders.testing import check_sampler
from samplewise.plugins import RS2, InfoBatch, SeTa, Uniform
from support import Everything, loss_of, run_ranks

SIZE = 97


@pytest.fixture
def threads(monkeypatch):
    return Threads(monkeypatch)


class Uneven(PlannedSampler):
    """Rank r plans ``lengths[r]`` of its ids, the hardest case of an exchange; weights tell the sample."""

    plans_shares = True

    def __init__(self, size, *, lengths, weighted=True, **common):
        super().__init__(size, **common, sharded=True)
        self.lengths, self.weighted = lengths, weighted

    def plan(self, epoch, rng):
        rank = self.ledger.shard[0]
        ids = self.ledger.ids_of(np.sort(rng.permutation(len(self.ledger.ids))[: self.lengths[rank]]))
        weighted = self.weighted if isinstance(self.weighted, bool) else self.weighted[rank]
        return Plan(ids, weight_of(ids) if weighted else None)


def weight_of(ids):
    return (1 + np.asarray(ids) % 7).astype(np.float32)


METHODS = {
    "uniform": lambda **common: Uniform(SIZE, sharded=True, **common),
    "infobatch": lambda **common: InfoBatch(SIZE, epochs=9, sharded=True, **common),
    "infobatch quantiles": lambda **common: InfoBatch(
        SIZE, epochs=9, quantiles=((0.2, 0.25), (0.85, 0.5)), sharded=True, **common
    ),
    "infobatch batch_loss": lambda **common: InfoBatch(SIZE, epochs=9, batch_loss=True, sharded=True, **common),
    "seta": lambda **common: SeTa(SIZE, epochs=9, groups=4, window=0.5, sharded=True, **common),
    "seta revisit": lambda **common: SeTa(SIZE, epochs=9, prune=0.6, revisit_every=3, sharded=True, **common),
    "rs2 hash": lambda **common: RS2(SIZE, ratio=0.3, mode="hash", sharded=True, **common),
    "rs2 with_replacement": lambda **common: RS2(SIZE, ratio=0.3, mode="with_replacement", sharded=True, **common),
    "one rank plans nothing": lambda **common: Uneven(SIZE, lengths=(20, 0, 5), **common),
    "one rank plans all": lambda **common: Uneven(SIZE, lengths=(1, 30, 0), weighted=False, **common),
    "some have weights": lambda **common: Uneven(SIZE, lengths=(9, 9, 11), weighted=(True, False, True), **common),
    "equal": lambda **common: Uneven(SIZE, lengths=(9, 9, 9), weighted=(False, True, True), **common),
}


def train(sampler, stop=None):
    """The rest of the epoch, observed; its ids and their weights as observe() applies them."""
    ids, weights = [], []
    for batch in islice(BatchSampler(sampler, 5, drop_last=False), stop):
        batch = torch.tensor(batch)
        sampler.observe(batch, loss_of(batch, sampler.step))
        ids += batch.tolist()
        weights += sampler.ledger.weights(batch).tolist()
    return ids, weights


def epochs(rank, factory, common):
    """Three epochs of a rank: what it planned, what it served, with which weights."""
    sampler, told = factory(**common), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        assert len(sampler) * sampler.num_replicas == sampler.total_size
        served = list(sampler)
        ids, weights = train(sampler)
        assert ids == served
        told.append((ids, weights, sampler.current_plan))
    return told


@pytest.mark.parametrize("common", [{}, {"drop_last": True}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_union_over_ranks_is_the_plan(name, common, threads, monkeypatch):
    made = {}
    balanced = shares.balanced

    def recorded(owner, plan, number, seed, ledger, drop_last):
        made[ledger.shard[0], number] = plan
        return balanced(owner, plan, number, seed, ledger, drop_last)

    monkeypatch.setattr(shares, "balanced", recorded)
    for world in (2, 3):
        ranks = threads.run(world, epochs, METHODS[name], common)
        for epoch, parts in enumerate(zip(*ranks, strict=True)):
            assert len({len(ids) for ids, _, _ in parts}) == 1
            plans = [made[rank, epoch] for rank in range(world)]
            planned = Counter(int(i) for plan in plans for i in plan.ids)
            served = Counter(i for ids, _, _ in parts for i in ids)
            extra, missing = (served - planned).total(), (planned - served).total()
            assert (extra, missing) == ((0, planned.total() % world) if common.get("drop_last") else (extra, 0))
            assert extra < world
            weights = {int(i): 1.0 for i in planned}
            for plan in plans:
                if plan.weights is not None:
                    weights |= zip(plan.ids.tolist(), plan.weights.tolist(), strict=True)
            for ids, applied, _ in parts:
                assert applied == [weights[i] for i in ids]
                assert common.get("shuffle", True) or name == "rs2 with_replacement" or ids == sorted(ids)
    assert [[ids for ids, _, _ in rank] for rank in threads.run(3, epochs, METHODS[name], common)] == [
        [ids for ids, _, _ in rank] for rank in ranks
    ]


@pytest.mark.parametrize("name", ["uniform", "infobatch", "seta revisit", "one rank plans nothing"])
@pytest.mark.parametrize("length", [20, 31, 150])
def test_epochs_of_fixed_length(name, length, threads):
    for world in (2, 3):
        ranks = threads.run(world, epochs, METHODS[name], {"epoch_length": length})
        for parts in zip(*ranks, strict=True):
            assert {len(ids) for ids, _, _ in parts} == {-(-length // world)}
            for ids, weights, plan in parts:  # a sample shown several times has the mean of its weights
                sums = Counter()
                for i, weight in zip(ids, weights, strict=True):
                    sums[i] += weight
                of_plan = np.ones(len(plan)) if plan.weights is None else plan.weights
                assert sorted(ids) == sorted(np.asarray(plan.ids).tolist())
                for i, total in sums.items():
                    assert total == pytest.approx(of_plan[np.asarray(plan.ids) == i].sum())


@pytest.mark.parametrize("drop_last", [False, True])
def test_ids_that_move_or_are_left_out_are_drawn_by_lot(drop_last, threads):
    """Of ranks 0 and 1 each id equally often, and of both ranks equally many, within 5 standard errors of 300 draws.

    Filled up to 7 a rank, two of their 16 ids move to rank 2 and one of 20 is repeated there; with 6 a rank, two of
    their ids are left out.
    """

    def served(rank):
        sampler = Uneven(24, lengths=(8, 8, 4), drop_last=drop_last)
        return [list(sampler) for epoch in range(300) if sampler.set_epoch(epoch) is None]

    ranks = [np.concatenate(epochs) for epochs in threads.run(3, served)]
    counts = np.bincount(np.concatenate(ranks) if drop_last else ranks[2], minlength=24) / 300
    expected = 7 / 8 if drop_last else 1 / 8 + 1 / 24
    error = np.sqrt(expected * (1 - expected) / 300)
    assert (np.abs(counts[np.arange(24) % 3 < 2] - expected) <= 5 * error).all()
    assert abs(counts[::3].mean() - counts[1::3].mean()) <= 5 * error * np.sqrt(2 / 8) * np.sqrt(2)


def test_ranks_draw_and_shuffle_each_for_themselves(threads):
    def rows(rank, factory):
        return [i // 3 for i in factory()]

    for factory in (lambda: Uniform(99, sharded=True), lambda: Uneven(99, lengths=(20, 20, 20), shuffle=False)):
        one, two, three = threads.run(3, rows, factory)
        assert one != two != three != one


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["infobatch", "seta", "one rank plans nothing"])
@pytest.mark.parametrize("common", [{}, {"epoch_length": 60}], ids=str)
def test_resume_is_exact_at_any_cursor_on_the_same_ranks(name, common, threads):
    def run(rank, epoch, stop):
        sampler = METHODS[name](**common)
        for past in range(epoch):
            sampler.set_epoch(past)
            train(sampler)
        sampler.set_epoch(epoch)
        train(sampler, stop)
        resumed = METHODS[name](**common)
        resumed.load_state_dict(through_file(sampler.state_dict()))  # unsynced: this rank's own
        over = stop * 5 >= len(sampler)
        assert (resumed.epoch, resumed.consumed) == ((epoch + 1, 0) if over else (epoch, sampler.consumed))
        if over:
            sampler.set_epoch(epoch + 1)
        rest = list(sampler)[sampler.consumed // sampler.num_replicas :]
        ids, weights = train(resumed)
        assert ids == rest
        for begin in range(0, len(rest), 5):
            batch = torch.tensor(rest[begin : begin + 5])
            sampler.observe(batch, loss_of(batch, sampler.step))
        assert sampler.ledger.weights(torch.tensor(rest)).tolist() == weights
        for one in (sampler, resumed):
            one.set_epoch(epoch + 2)
        assert torch.equal(sampler.ledger.records.view(torch.int32), resumed.ledger.records.view(torch.int32))
        assert list(sampler) == list(resumed)

    for epoch, stop in ((0, 1), (2, 0), (2, 3), (2, 100)):
        threads.run(3, run, epoch, stop)


def real_ranks(rank):
    """Real processes: three epochs, and a resume into the fourth."""
    sampler = InfoBatch(SIZE, epochs=9, sharded=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        train(sampler)
    other = InfoBatch(SIZE, epochs=9, sharded=True)
    other.load_state_dict(through_file(sampler.state_dict()))
    sampler.set_epoch(3)
    assert list(other) == list(sampler)
    return list(sampler), sampler.ledger.records


def test_in_real_processes(threads):
    def simulated(rank):
        sampler = InfoBatch(SIZE, epochs=9, sharded=True)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            train(sampler)
        sampler.set_epoch(3)
        return list(sampler), sampler.ledger.records

    for (order, records), (expected, expected_records) in zip(
        run_ranks(2, real_ranks), threads.run(2, simulated), strict=True
    ):
        assert order == expected
        assert torch.equal(records.view(torch.int32), expected_records.view(torch.int32))


def test_workers_do_not_change_the_order(threads):
    samplers = threads.run(2, lambda rank: (sampler := Uniform(SIZE, sharded=True), len(sampler))[0])
    for rank, sampler in enumerate(samplers):
        with threads.acting_as(rank, 2):
            loader = DataLoader(with_ids(range(SIZE)), batch_size=5, sampler=sampler, num_workers=2)
            assert torch.cat([ids for ids, _ in loader]).tolist() == list(sampler)


@pytest.mark.parametrize("length", ["plan", 10])
def test_a_plan_from_before_the_process_group_is_refused_when_it_is_served(length, threads):
    early, alone = (Uniform(SIZE, sharded=True, epoch_length=length, num_replicas=world) for world in (None, 1))
    assert len(early) == len(alone) == (SIZE if length == "plan" else length)

    with pytest.raises(RuntimeError, match=r"Uniform\(sharded=True\): epoch 0 was planned before the process group"):
        threads.run(2, lambda rank: list(copy.deepcopy(early)))
    assert threads.run(2, lambda rank: len(list(copy.deepcopy(alone)))) == [len(alone)] * 2


def test_with_one_process_nothing_changes():
    check_sampler(lambda: InfoBatch(SIZE, epochs=4, sharded=True))
    for sharded, whole in (
        (InfoBatch(SIZE, epochs=4, sharded=True), InfoBatch(SIZE, epochs=4)),
        (SeTa(SIZE, epochs=4, sharded=True), SeTa(SIZE, epochs=4)),
        (RS2(SIZE, mode="hash", sharded=True), RS2(SIZE, mode="hash")),
    ):
        for epoch in range(3):
            for sampler in (sharded, whole):
                sampler.set_epoch(epoch)
            assert train(sharded) == train(whole)


def test_a_whole_plan_over_equal_shares_stores_no_list(threads):
    assert threads.run(2, lambda rank: Uniform(10, sharded=True).current_plan.ids) == [range(0, 10, 2), range(1, 10, 2)]


def test_a_ranks_summary_is_that_of_its_share(threads):
    def summary(rank):
        sampler = InfoBatch(100, epochs=9, sharded=True)
        own = torch.arange(100)[rank::2]
        sampler.observe(own[:30], torch.ones(30, requires_grad=True))
        sampler.ledger.sync()
        plan = Plan(sampler.ledger.ids_of(np.arange(25, 45)), np.ones(20, np.float32))
        whole = Plan(sampler.ledger.ids).summary(sampler.ledger)
        return plan.summary(sampler.ledger), whole["kept"], whole["coverage"]

    for summary_of_plan, kept, coverage in threads.run(2, summary):
        assert (summary_of_plan["kept"], summary_of_plan["coverage"]) == (0.4, 0.9)
        assert (kept, coverage) == (1, 1)


# --- another number of ranks ------------------------------------------------------------------------------------------


def whole_states(threads, world, epoch=1, stop=None, **common):
    def run(rank):
        sampler = SeTa(SIZE, epochs=9, prune=0.0, groups=4, window=0.5, sharded=True, **common)
        for past in range(epoch + 1):
            sampler.set_epoch(past)
            train(sampler, stop if past == epoch else None)
        sampler.sync()
        return through_file(sampler.state_dict())

    return threads.run(world, run)


def go_on(threads, states):
    """The next epoch's plan of all ranks together, and the whole ledger's bytes."""

    def load(rank):
        sampler = SeTa(SIZE, epochs=9, prune=0.0, groups=4, window=0.5, sharded=True)
        sampler.load_state_dict(through_file(states[rank]))
        assert (sampler.epoch, sampler.consumed) == (2, 0)
        return np.asarray(sampler.current_plan.ids), sampler.step, sampler.ledger.records.clone()

    ids, steps, records = zip(*threads.run(len(states), load), strict=True)
    whole = torch.empty(SIZE, 8)
    for rank, part in enumerate(records):
        whole[rank :: len(states)] = part
    return np.unique(np.concatenate(ids)), set(steps), whole


def test_another_number_of_ranks_goes_on_at_an_epochs_end(threads):
    two = whole_states(threads, 2)
    ids, steps, records = go_on(threads, two)
    three = reshard_samplers(two, 3)
    for states in (three, reshard_samplers(three, 1), reshard_samplers(reshard_samplers(three[::-1], 4), 2)):
        other, other_steps, other_records = go_on(threads, states)
        np.testing.assert_array_equal(other, ids)
        assert other_steps == steps
        assert torch.equal(other_records.view(torch.int32), records.view(torch.int32))


def test_a_whole_ledgers_sampler_can_be_dealt_out():
    sampler = Uniform(10)
    train(sampler)
    states = reshard_samplers([sampler.state_dict()], 2)
    assert [state["ledger"]["shard"] for state in states] == [[0, 2], [1, 2]]
    records = states[1]["ledger"]["records"]
    assert torch.equal(records.view(torch.int32), sampler.ledger.records[1::2].view(torch.int32))
    other = Uniform(10, sharded=True)
    other.load_state_dict(reshard_samplers(states, 1)[0])
    assert (other.epoch, other.step) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 2}, "must be of the end of an epoch, and epoch 1 is not over"),
        ({"epoch_length": 50}, "epoch of fixed length goes on in the middle of a plan"),
    ],
)
def test_an_epoch_that_is_not_over_is_not_dealt_out(options, message, threads):
    with pytest.raises(ValueError, match=message):
        reshard_samplers(whole_states(threads, 2, **options), 3)


def test_a_state_of_another_rank_or_number_of_ranks_is_refused(threads):
    states = whole_states(threads, 2, stop=2)

    def load(rank, states):
        SeTa(SIZE, epochs=9, sharded=True).load_state_dict(states[rank])

    with pytest.raises(ValueError, match=r"this process holds shard \d of 2"):
        threads.run(2, load, states[::-1])
    with pytest.raises(ValueError, match=r"shard \d of 2, and this process holds shard \d of 3.*reshard"):
        threads.run(3, load, [*states, states[0]])
    with pytest.raises(ValueError, match="saved with sharded=True, this one has False"):
        SeTa(SIZE, epochs=9).load_state_dict(states[0])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Everything(10, sharded=True), r"Everything\(sharded=True\): .*cannot plan by shares; leave sharded"),
        (lambda: RS2(10, sharded=True), r"RS2\(sharded=True\)"),
        (lambda: RS2(10, mode="stratified", labels=[0] * 10, sharded=True), r"RS2\(sharded=True\)"),
        (lambda: Uniform(10, sharded=1), r"Uniform\(sharded=1\): sharded must be True or False"),
        (
            lambda: Uniform(10, sharded=True, arrange=DistinctBatches([[0]] * 10, 2)),
            r"Uniform\(sharded=True, arrange=...\)",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda rank: Uneven(9, lengths=(0, 0)).current_plan, r"Uneven.plan\(0\): the plan is empty on all ranks"),
        (lambda rank: Uneven(9, lengths=(1, 0), drop_last=True).current_plan, "leaves none for each rank"),
        (lambda rank: len(Uniform(9, sharded=True, num_replicas=3)), r"num_replicas=3\): each of the 2 processes"),
        (lambda rank: setattr(s := Uniform(9, sharded=True), "sharding", "loader") or list(s), "deal them out"),
    ],
)
def test_what_cannot_be_served(use, message, threads):
    with pytest.raises(ValueError, match=message):
        threads.run(2, use)
