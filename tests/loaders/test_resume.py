"""Exact resume of plain loops: `state_dict` with a DataLoader, and torchdata's StatefulDataLoader."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from samplewise.loaders import with_ids
from samplewise.loaders.testing import train_epoch
from support import Everything, HardHalf, Lengths, loss_of, run_ranks

SIZE, BATCH, EPOCHS = 60, 8, 3


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bits(sampler):
    return sampler.ledger.records.view(torch.int32).clone()


def assert_same_ledger(resumed, sampler):
    if resumed.epoch > sampler.epoch:  # resumed at the very end: it has made the next plan already
        sampler = copy.deepcopy(sampler)
        sampler.set_epoch(resumed.epoch)
    assert torch.equal(bits(resumed), bits(sampler))


def run(loader, sampler, after_batch=lambda: None):
    """The plain loop of the README, from wherever the sampler stands to the last epoch."""
    seen = []
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for ids, _ in loader:
            sampler.observe(ids, loss_of(ids, sampler.step))
            seen.append(ids.tolist())
            after_batch()
    return seen


def make(kind, loader_kind, workers, **common):
    sampler = kind(SIZE, **common)
    loader = loader_kind(with_ids(range(SIZE)), batch_size=BATCH, sampler=sampler, num_workers=workers)
    return loader, sampler


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("common", [{}, {"epoch_length": 50}], ids=str)
def test_t10_t13_exact_at_every_step_with_a_plain_loader(workers, common):
    loader, sampler = make(HardHalf, DataLoader, workers, **common)
    states = []
    whole = run(loader, sampler, lambda: states.append(saved(sampler.state_dict())))
    for step, state in enumerate(states if workers == 0 else states[::4], start=1):
        done = step if workers == 0 else 1 + 4 * (step - 1)
        loader, resumed = make(HardHalf, DataLoader, workers, **common)
        resumed.load_state_dict(state)
        assert resumed.step == done
        assert run(loader, resumed) == whole[done:]
        assert_same_ledger(resumed, sampler)


def test_twice_in_a_row():
    loader, sampler = make(HardHalf, DataLoader, 0)
    whole = run(loader, sampler)
    seen = []
    _, current = make(HardHalf, DataLoader, 0)
    for stop in (3, 2, 4, 1):  # batches between one interruption and the next
        twin = HardHalf(SIZE)
        twin.load_state_dict(saved(current.state_dict()))
        left = stop
        while left:
            taken = train_epoch_in_batches(twin, left)
            left -= len(taken)
            seen += taken
        current = twin
    assert seen == whole[: len(seen)]


def train_epoch_in_batches(sampler, most):
    ids = []
    loader = DataLoader(with_ids(range(SIZE)), batch_size=BATCH, sampler=sampler)
    for _, (batch, _) in zip(range(most), loader, strict=False):
        sampler.observe(batch, loss_of(batch, sampler.step))
        ids.append(batch.tolist())
    return ids


def test_a_state_of_the_last_batch_is_the_next_epochs_start():
    sampler = HardHalf(SIZE)
    train_epoch(sampler)
    resumed = HardHalf(SIZE)
    resumed.load_state_dict(saved(sampler.state_dict()))
    assert (resumed.epoch, resumed.consumed) == (1, 0)
    sampler.set_epoch(1)
    assert list(resumed) == list(sampler)


def test_an_epoch_that_the_loop_ends_early():
    sampler = Everything(SIZE)
    sampler.epoch_samples = 16
    train_epoch(sampler, batch_size=8, stop=2)
    resumed = Everything(SIZE)
    resumed.load_state_dict(saved(sampler.state_dict()))
    assert (resumed.epoch, resumed.consumed) == (1, 0)


def test_the_iterator_can_be_made_often_after_a_resume():
    sampler = Everything(SIZE)
    train_epoch(sampler, batch_size=8, stop=2)
    resumed = Everything(SIZE)
    resumed.load_state_dict(saved(sampler.state_dict()))
    rest = list(Everything(SIZE))[16:]
    assert next(iter(resumed)) == rest[0]
    assert list(resumed) == rest
    assert len(resumed) == SIZE
    resumed.advance_to(0)
    assert list(resumed) == list(Everything(SIZE))


def test_the_length_stays_that_of_the_epoch():
    sampler = Lengths(SIZE, lengths=[40, 24])
    train_epoch(sampler, batch_size=8, stop=2)
    resumed = Lengths(SIZE, lengths=[40, 24])
    resumed.load_state_dict(saved(sampler.state_dict()))
    assert len(resumed) == 40
    assert len(list(resumed)) == 24


def test_states_are_live_like_a_modules():
    sampler = HardHalf(SIZE)
    live, copied = sampler.state_dict(), copy.deepcopy(sampler.state_dict())
    train_epoch(sampler, stop=1)
    assert live["cursor"].tolist() == [7, 1, 7, -1]
    assert copied["cursor"].tolist() == [0, 0, 0, -1]


def test_t10_in_a_new_process(tmp_path):
    """Save at every step, resume each in one new process, and compare ids and ledgers bit for bit."""
    loader, sampler = make(HardHalf, DataLoader, 0)
    states = []
    whole = run(loader, sampler, lambda: states.append(saved(sampler.state_dict())))
    torch.save(states, tmp_path / "states.pt")
    script = tmp_path / "resume.py"
    script.write_text(
        f"""
import runpy, sys, torch
from torch.utils.data import DataLoader
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
test = runpy.run_path({__file__!r})
out = []
for state in torch.load({str(tmp_path / "states.pt")!r}, weights_only=True):
    loader, sampler = test["make"](test["HardHalf"], DataLoader, 0)
    sampler.load_state_dict(state)
    rest = test["run"](loader, sampler)
    sampler.set_epoch({EPOCHS})
    out.append((rest, test["bits"](sampler)))
torch.save(out, {str(tmp_path / "out.pt")!r})
"""
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    sampler.set_epoch(EPOCHS)
    for done, (rest, ledger) in enumerate(torch.load(tmp_path / "out.pt", weights_only=True), start=1):
        assert rest == whole[done:]
        assert torch.equal(ledger, bits(sampler))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Everything, HardHalf])
def test_t11_stateful_dataloader(kind, workers):
    """The loader's own state is enough: it carries the sampler's."""
    loader, sampler = make(kind, StatefulDataLoader, workers)
    states = []
    whole = run(loader, sampler, lambda: states.append(saved(loader.state_dict())))
    for done in range(1, len(states), 1 if workers == 0 else 5):
        loader, resumed = make(kind, StatefulDataLoader, workers)
        loader.load_state_dict(states[done - 1])
        seen, length = [], len(whole) - done
        for _ in range(EPOCHS):
            if len(seen) == length:
                break
            for ids, _ in loader:
                resumed.observe(ids, loss_of(ids, resumed.step))
                seen.append(ids.tolist())
        assert seen == whole[done:]
        assert_same_ledger(resumed, sampler)


@pytest.mark.parametrize("workers", [0, 2])
def test_t11_stateful_dataloader_with_rare_snapshots(workers):
    def build():
        sampler = Everything(SIZE)
        data = with_ids(range(SIZE))
        return sampler, StatefulDataLoader(
            data, batch_size=BATCH, sampler=sampler, num_workers=workers, snapshot_every_n_steps=3
        )

    sampler, loader = build()
    whole, states = [], []
    for ids, _ in loader:
        sampler.observe(ids, loss_of(ids, sampler.step))
        whole.append(ids.tolist())
        states.append(saved(loader.state_dict()))
    second_epoch = [ids.tolist() for ids, _ in loader]
    assert sampler.epoch == 1
    for done in range(1, len(whole) + 1):
        resumed, loader = build()
        loader.load_state_dict(states[done - 1])
        rest = [ids.tolist() for ids, _ in loader]
        if rest != second_epoch:  # at the end of the epoch: the next one, at once or after an empty rest
            assert rest == whole[done:]
            resumed.set_epoch(1)
            assert [ids.tolist() for ids, _ in loader] == second_epoch
        else:
            assert done == len(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_t11_the_plain_loop_with_both_states(workers):
    """As the README says: the loop reads the sampler's epoch before the loader restores anything."""
    loader, sampler = make(HardHalf, StatefulDataLoader, workers)
    states = []
    whole = run(loader, sampler, lambda: states.append(saved((loader.state_dict(), sampler.state_dict()))))
    for done in range(1, len(states), 1 if workers == 0 else 5):
        loader, resumed = make(HardHalf, StatefulDataLoader, workers)
        loader.load_state_dict(states[done - 1][0])
        resumed.load_state_dict(states[done - 1][1])
        assert run(loader, resumed) == whole[done:]


def test_t11_a_loader_that_drops_its_last_batch():
    """Saved behind the last whole batch of an epoch and resumed in a loop without set_epoch: it goes on for ever."""

    def build():
        sampler = Everything(40)
        data = with_ids(range(40))
        return sampler, StatefulDataLoader(data, batch_size=7, sampler=sampler, drop_last=True, num_workers=2)

    sampler, loader = build()
    for ids, _ in loader:
        sampler.observe(ids, loss_of(ids))
        state = saved(loader.state_dict())
    resumed, loader = build()
    loader.load_state_dict(state)
    passes = []
    for _ in range(3):
        passes.append(0)
        for ids, _ in loader:
            resumed.observe(ids, loss_of(ids))
            passes[-1] += 1
    assert passes[1:] == [5, 5]
    assert resumed.epoch == 2


def test_the_iterators_state_is_small_and_jsonable():
    sampler = HardHalf(SIZE)
    it = iter(sampler)
    taken = [next(it) for _ in range(5)]
    state = json.loads(json.dumps(it.state_dict()))
    assert state == {"version": 1, "epoch": 0, "position": 5}
    other = iter(sampler)
    other.load_state_dict(state)
    assert taken + list(other) == list(sampler)
    sampler.set_epoch(1)
    with pytest.raises(ValueError, match=r"sampler\.load_state_dict"):
        iter(sampler).load_state_dict(state)


@pytest.mark.parametrize(
    ("make_other", "message"),
    [
        (lambda: HardHalf(61), "data set of 60 samples, this one has 61"),
        (lambda: HardHalf(60, seed=1), "seed=0"),
        (lambda: HardHalf(60, shuffle=False), "shuffle=True"),
        (lambda: HardHalf(60, drop_last=True), "drop_last=False"),
        (lambda: HardHalf(60, epoch_length=20), "epoch_length='plan'"),
        (lambda: HardHalf(60, ema=0.5), "ema=0.9"),
        (lambda: HardHalf(60, fingerprint="other"), "fingerprint"),
        (lambda: Everything(60), "sampler='HardHalf'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(make_other, message):
    sampler = HardHalf(SIZE)
    train_epoch(sampler, stop=2)
    other = make_other()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved(sampler.state_dict()))
    assert not other.ledger.seen.any()
    assert (other.epoch, other.consumed) == (0, 0)


# --- ranks ------------------------------------------------------------------------------------------------------------


def two_ranks(rank, world, interrupt):
    """Train with real ranks and unequal division; optionally save in the middle and go on in new objects."""
    sampler = HardHalf(SIZE + 1)
    history = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = DataLoader(with_ids(range(SIZE + 1)), batch_size=5, sampler=sampler)
        for number, (ids, _) in enumerate(batches):
            sampler.observe(ids, loss_of(ids, sampler.step))
            history.append(ids.tolist())
            if interrupt == (epoch, number):
                sampler.sync()
                state = saved(sampler.state_dict())
                sampler = HardHalf(SIZE + 1)
                sampler.load_state_dict(state)
                break
        if interrupt is not None and interrupt[0] == epoch:
            if sampler.epoch == epoch:
                for ids, _ in DataLoader(with_ids(range(SIZE + 1)), batch_size=5, sampler=sampler):
                    sampler.observe(ids, loss_of(ids, sampler.step))
                    history.append(ids.tolist())
            interrupt = None
    sampler.sync()
    return history, bits(sampler), [int(i) for i in sampler.current_plan.ids], sampler.epoch


def alone(rank):
    """num_replicas=1 in a process group: each process trains on everything and keeps its own ledger."""
    sampler = HardHalf(SIZE, num_replicas=1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = train_epoch(sampler)
    return order, bits(sampler), sampler.rank


def test_processes_that_train_on_everything_agree_with_a_single_one():
    expected = alone(0)
    for order, ledger, rank in run_ranks(2, alone):
        assert order == expected[0]
        assert torch.equal(ledger, expected[1])
        assert rank == 0


def own_state_of_a_whole_epoch(rank):
    """Each rank saves and loads its own state, unsynced, behind the last batch."""
    sampler = HardHalf(SIZE + 1)
    train_epoch(sampler)
    resumed = HardHalf(SIZE + 1)
    resumed.load_state_dict(saved(sampler.state_dict()))
    sampler.set_epoch(1)
    return torch.equal(bits(resumed), bits(sampler)), list(resumed) == list(sampler), int(resumed.ledger.seen.sum())


def test_ranks_may_each_restore_their_own_unsynced_end_of_an_epoch():
    assert run_ranks(2, own_state_of_a_whole_epoch) == [(True, True, SIZE + 1)] * 2


@pytest.mark.parametrize("world", [2, 3])
def test_real_ranks_share_the_plan_hold_equal_ledgers_and_resume_exactly(world):
    results = run_ranks(world, two_ranks, world, None)
    assert all(torch.equal(result[1], results[0][1]) for result in results)
    assert all(result[2:] == results[0][2:] for result in results)
    assert len({len(result[0]) for result in results}) == 1
    first_epoch = [i for result in results for batch in result[0] for i in batch][:]
    assert set(first_epoch) == set(range(SIZE + 1))
    again = run_ranks(world, two_ranks, world, (1, 1))
    for result, other in zip(results, again, strict=True):
        assert result[0] == other[0]
        assert torch.equal(result[1], other[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("cursor"), "it lacks cursor"),
        (lambda state: state["segments"][0].update(ids=[0, 1000, 1]), r"must lie in \[0, 60\)"),
        (lambda state: state["ledger"].pop("records"), "it lacks records"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_is_changed(damage, message):
    sampler, other = Everything(SIZE), Everything(SIZE)
    train_epoch(sampler, stop=3)
    state = copy.deepcopy(sampler.state_dict())
    damage(state)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert not other.ledger.seen.any()
    assert (other.epoch, other.consumed) == (0, 0)
