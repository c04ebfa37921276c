"""ShardedLedger: the shards together are the whole ledger, bit for bit, and so is what is found over them."""

import copy
import io

import numpy as np
import pytest
import torch
from ranks_support import Threads

from samplewise.cuda_ext import Ledger, ops, sharded
from samplewise.cuda_ext.reference import WEIGHT
from samplewise.cuda_ext.sharded import ShardedLedger, reshard
from samplewise.cuda_ext.totals import Totals, TotalsOverRanks

NAN, INF = float("nan"), float("inf")
SIZE = 101


@pytest.fixture
def threads(monkeypatch):
    return Threads(monkeypatch)


def observe(rank, world, *ledgers, steps=9, syncs=(2, 6)):
    """Uneven ranks; ids of all ranks, some several times in a batch and on several ranks; NaN; scores at times."""
    rng = np.random.default_rng((world, rank))
    for step in range(steps + rank):
        length = 0 if step == 1 else int(rng.integers(1, 40))
        ids = torch.from_numpy(rng.integers(0, SIZE, length))
        losses = torch.from_numpy(rng.lognormal(size=length)).to(torch.bfloat16 if step % 2 else torch.float64)
        losses[torch.from_numpy(rng.random(length)) < 0.1] = NAN
        scores = losses.float() * 2 if step % 3 == 0 else None
        for ledger in ledgers:
            ledger.update(ids, losses, scores=scores)
            if step in syncs:
                ledger.sync()
    for ledger in ledgers:
        ledger.sync()


def bits(records):
    """Records without the weights, as integers."""
    return records.view(torch.int32)[:, [column for column in range(8) if column != WEIGHT]]


def histories(rank, world):
    shard, whole = ShardedLedger(SIZE, ema=0.8), Ledger(SIZE, ema=0.8)
    observe(rank, world, shard, whole)
    assert shard.shard == (rank, world)
    assert shard.ids == range(rank, SIZE, world)
    rows = slice(rank, None, world)
    assert torch.equal(bits(shard.records), bits(whole.records[rows]))
    assert (shard.rejected, shard.updates) == (whole.rejected, whole.updates)
    assert shard.rejected > 0
    for name in ("loss_last", "loss_ema", "loss_mean", "loss_m2", "score", "count", "last_step"):
        torch.testing.assert_close(shard.column(name), whole.column(name)[rows], rtol=0, atol=0, equal_nan=True)
    shard.grow(SIZE + 10)
    whole.grow(SIZE + 10)
    observe(rank, world, shard, whole)
    assert torch.equal(bits(shard.records), bits(whole.records[rows]))
    return shard.state_dict(), whole.state_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_the_shards_hold_what_the_whole_ledger_holds(world, threads):
    states = threads.run(world, histories, world)
    whole = Ledger(SIZE + 10, ema=0.8)
    whole.load_state_dict(reshard([shard for shard, _ in states], 1)[0])
    assert torch.equal(bits(whole.records), bits(states[0][1]["records"]))


@pytest.mark.parametrize("chunk", [1, 30])
def test_any_size_of_the_rounds_gives_the_same(chunk, threads, monkeypatch):
    monkeypatch.setattr(sharded, "_CHUNK", chunk)
    threads.run(3, histories, 3)


def test_one_process_holds_a_whole_ledger():
    shard, whole = ShardedLedger(SIZE), Ledger(SIZE)
    observe(0, 1, shard, whole)
    assert torch.equal(shard.records.view(torch.int32), whole.records.view(torch.int32))
    assert (shard.shard, shard.ids) == ((0, 1), range(SIZE))
    whole.load_state_dict(shard.state_dict())
    shard.load_state_dict(whole.state_dict())


def own_observations_stay(rank, world):
    ledger = ShardedLedger(SIZE)
    ledger.update(torch.arange(rank, SIZE, world), torch.ones(len(range(rank, SIZE, world))))
    ledger.update(torch.tensor([5]), torch.ones(1))
    ledger.sync()
    return ledger.column("count").tolist()


def test_only_what_belongs_to_other_ranks_travels(threads, monkeypatch):
    lengths = []
    gather = sharded.ranks.gather_rows

    def counted(*tensors):
        lengths.extend(len(rows) for rows in tensors if rows.is_floating_point())
        return gather(*tensors)

    monkeypatch.setattr(sharded.ranks, "gather_rows", counted)
    counts = threads.run(2, own_observations_stay, 2)
    assert sorted(lengths) == [0, 1]  # id 5 of rank 0
    assert counts == [[1] * 51, [1, 1, 3] + [1] * 47]


# --- rows and weights -------------------------------------------------------------------------------------------------


def rows_and_weights(rank):
    ledger = ShardedLedger(10)
    ids = np.array([3, 1, 8, 9])
    rows = ledger.rows_of(ids)
    assert ledger.ids_of(rows).tolist() == [i for i in ids.tolist() if i % 3 == rank]
    assert np.array_equal(ledger.rows_of(ledger.ids), np.arange(len(ledger.ids)))
    ledger.set_weights(torch.from_numpy(ids), torch.tensor([2.0, 0.5, 4.0, 0.0]))
    asked = torch.tensor([9, 0, 8, 3, 3, 1, 7], dtype=torch.int32)
    assert ledger.weights(asked).tolist() == pytest.approx([0.0, 1, 4, 2, 2, 0.5, 1])
    ledger.set_weights(torch.tensor([rank]), torch.tensor([3.0]))  # none of another rank
    assert ledger.weights(torch.tensor([0, 1, 2, 3])).tolist() == [3.0 if i == rank else 1.0 for i in range(4)]
    ledger.set_weights(torch.tensor([(rank + 1) % 3]), torch.tensor([3.0]))
    ledger.clear_weights()
    assert ledger.weights(torch.arange(10)).tolist() == [1] * 10


def test_rows_and_weights_of_own_and_foreign_ids(threads):
    threads.run(3, rows_and_weights)


def test_ids_outside_are_refused(threads):
    def outside(rank):
        with pytest.raises(IndexError, match=r"outside \[0, 4\)"):
            ShardedLedger(4).update(torch.tensor([4]), torch.ones(1))

    threads.run(2, outside)


def test_ids_outside_that_a_gpu_passed_over_are_an_error_on_all_ranks(threads):
    def sync(rank):
        ledger = ShardedLedger(4)
        if rank == 1:  # as update() leaves them on a GPU
            ledger._pending.append((torch.tensor([1, -1, 7]), torch.ones(3), None, torch.tensor([0])))
        with pytest.raises(IndexError, match=r"2 observed ids were outside \[0, 4\)"):
            ledger.sync()
        ledger.sync()
        return ledger.seen.any()

    assert not any(threads.run(2, sync))


def test_shards_are_settled_anew_until_something_is_recorded(threads):
    ledger = ShardedLedger(7)
    assert len(ledger.records) == 7  # before there is a process group
    assert threads.run(2, lambda rank: len(copy.deepcopy(ledger).records)) == [4, 3]
    ledger.update(torch.tensor([1]), torch.ones(1))
    with pytest.raises(RuntimeError, match="Make the process group before the first update"):
        threads.run(2, lambda rank: ledger.records)
    ledger.distributed = False  # each process has all of it
    assert threads.run(2, lambda rank: len(ledger.records)) == [7, 7]
    with pytest.raises(ValueError, match=r"size=1\): size must be at least the 2 ranks"):
        threads.run(2, lambda rank: ShardedLedger(1).ids)


# --- totals -----------------------------------------------------------------------------------------------------------


def values_named(name, size=30_000):
    rng = np.random.default_rng(0)
    values = {
        "lognormal": rng.lognormal(0, 2, size),
        "with NaN": np.where(rng.random(size) < 0.5, NAN, rng.normal(0, 1, size)),
        "constant": np.full(size, 0.1),
        "sorted": np.sort(rng.exponential(1, size)),
        "one rank has none": np.where(np.arange(size) % 3 == 1, NAN, rng.exponential(1, size)),
        "few": np.array([3.0, NAN, -INF, 2.0, -0.0, 5.0]),
    }
    return torch.from_numpy(values[name].astype(np.float32))


@pytest.mark.parametrize("name", ["lognormal", "with NaN", "constant", "sorted", "one rank has none", "few"])
def test_totals_over_ranks_are_those_of_all_values(name, threads):
    values = values_named(name)
    finite = values[values.isfinite()]
    ranks = sorted({0, len(finite) // 5, len(finite) // 2, len(finite) - 1})
    expected = ops.histogram(values)

    def check(rank):
        totals, own = TotalsOverRanks(), values[rank::3]
        counted = totals.histogram(own)
        assert (counted.low, counted.shift) == (expected.low, expected.shift)
        np.testing.assert_array_equal(counted.counts, expected.counts)
        np.testing.assert_array_equal(counted.offsets, expected.offsets)
        assert totals.mean(own) == Totals().mean(values) == pytest.approx(finite.double().mean().item(), rel=1e-12)
        np.testing.assert_array_equal(totals.order_statistics(own, ranks), ops.order_statistics(values, ranks))
        assert totals.total(len(own)) == len(values)
        assert totals.each(rank) == [0, 1, 2]

    threads.run(3, check)


def test_no_finite_value_on_any_rank(threads):
    with pytest.raises(ValueError, match="no finite value on any rank"):
        threads.run(2, lambda rank: TotalsOverRanks().histogram(torch.tensor([NAN])))
    with pytest.raises(ValueError, match=r"mean\(values=...\): there is no finite value"):
        threads.run(2, lambda rank: TotalsOverRanks().mean(torch.tensor([NAN])))


def test_a_mean_takes_one_pass(monkeypatch):
    """Looking for the ends of values of which some are NaN takes longer than the sum."""
    monkeypatch.setattr(ops, "finite_range", None)
    assert Totals().mean(torch.tensor([NAN, 1.0, 3.0, -INF, -1.0])) == 1
    largest = torch.finfo(torch.float32).max
    assert Totals().mean(torch.tensor([largest])) == largest
    assert Totals().mean(torch.tensor([-largest, NAN])) == -largest


# --- state ------------------------------------------------------------------------------------------------------------


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(rank, world, size=SIZE):
    ledger = ShardedLedger(size, ema=0.8)
    observe(rank, world, ledger)
    return through_file(ledger.state_dict())


def test_resharding_gives_the_whole_ledgers_bytes(threads):
    four = threads.run(4, saved, 4)
    whole = threads.run(4, lambda rank: observe(rank, 4, ledger := Ledger(SIZE, ema=0.8)) or ledger)[0]
    two = reshard(four[::-1], 2)
    three = reshard(two, 3)
    for states in (four, two, three, reshard(three, 1)):
        for rank, state in enumerate(states):
            assert torch.equal(bits(state["records"]), bits(whole.records[rank :: len(states)]))

    def load(rank, world, states):
        ledger = ShardedLedger(SIZE, ema=0.8)
        ledger.load_state_dict(through_file(states[rank]))
        assert (ledger.rejected, ledger.updates) == (whole.rejected, whole.updates)
        ledger.sync()
        assert (ledger.rejected, ledger.updates) == (whole.rejected, whole.updates)
        return ledger.records

    for states in (four, two, three):
        assert len(threads.run(len(states), load, len(states), states)) == len(states)
    with pytest.raises(ValueError, match=r"shard 0 of 4, and this process holds shard 0 of 1.*reshard\(states, 1\)"):
        Ledger(SIZE, ema=0.8).load_state_dict(four[0])
    with pytest.raises(ValueError, match=r"shard 0 of 4, and this process holds shard 1 of 2.*reshard\(states, 2\)"):
        threads.run(2, lambda rank: load(rank, 2, [two[0], four[0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states.pop(), "all shards of one ledger, each once, not 0 of 3, 1 of 3"),
        (lambda states: states.append(states[0]), "0 of 3, 0 of 3, 1 of 3, 2 of 3"),
        (lambda states: states[1].update(fingerprint="other"), "their fingerprint differ"),
        (lambda states: states[1].update(pending=[0]), r"sync\(\) on every rank"),
        (lambda states: states[1].update(counters=torch.tensor([0, 0, 99])), r"sync\(\) on every rank"),
        (lambda states: states.clear(), "not none"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(change, message, threads):
    states = threads.run(3, saved, 3)
    change(states)
    with pytest.raises(ValueError, match=message):
        reshard(states, 2)


def test_more_ranks_than_samples_are_refused():
    with pytest.raises(ValueError, match=r"world=5\): world is the number of ranks"):
        reshard([Ledger(4).state_dict()], 5)


def test_a_rank_keeps_its_own_unsynced_observations(threads):
    def unsynced(rank):
        ledger = ShardedLedger(4)
        ledger.update(torch.tensor([1, 2]), torch.ones(2))
        state = through_file(ledger.state_dict())
        restored = ShardedLedger(4)
        restored.load_state_dict(state)
        restored.sync()
        return restored.column("count").tolist()

    assert threads.run(2, unsynced) == [[0, 2], [2, 0]]
