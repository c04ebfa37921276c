"""BudgetSchedule against tables worked out by hand, in plain loops and in Lightning."""

import copy
import math
import warnings

import pytest
import torch
from lightning_support import BATCH, LENGTHS, QUIET, fit
from torch.utils.data import DataLoader

from samplewise.callbacks import BudgetSchedule
from support import Everything, Lengths, loss_of

pytestmark = QUIET
HALF = math.sqrt(0.5)
TABLE = {  # z: 0, 1/4, 1/2, 3/4, 1
    ("cosine", 0.0): [1, (1 + HALF) / 2, 1 / 2, (1 - HALF) / 2, 0],
    ("linear", 0.0): [1, 3 / 4, 1 / 2, 1 / 4, 0],
    ("rex", 0.0): [1, 6 / 7, 2 / 3, 2 / 5, 0],
    ("linear", 0.5): [0, 1 / 2, 1, 1 / 2, 0],
    ("rex", 0.5): [0, 1 / 2, 1, 2 / 3, 0],
    ("cosine", 0.25): [0, 1, 3 / 4, 1 / 4, 0],
}


def optimizer_of(*rates):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def epoch_of(sampler, optimizer=None, schedule=None, stop=None, **settings):
    """One epoch of a plain loop; the rates with which the optimizer stepped."""
    used = []
    for number, ids in enumerate(DataLoader(range(sampler.size), batch_size=BATCH, sampler=sampler, **settings)):
        if number == stop:
            break
        sampler.observe(ids, loss_of(ids))
        if optimizer is not None:
            used.append(rates(optimizer))
            optimizer.step()
            schedule.step()
    return used


@pytest.mark.parametrize(("shape", "warmup"), TABLE)
def test_by_epochs(shape, warmup):
    sampler = Everything(2 * BATCH)
    optimizer = optimizer_of(3.0, 0.1)
    schedule = BudgetSchedule(optimizer, sampler, epochs=2, shape=shape, warmup=warmup)
    used = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        used += epoch_of(sampler, optimizer, schedule)
    used.append(rates(optimizer))
    for group, rate in enumerate((3.0, 0.1)):
        assert [row[group] for row in used] == pytest.approx([rate * factor for factor in TABLE[shape, warmup]])
    assert rates(optimizer) == [0, 0]
    assert schedule.share == 1


@pytest.mark.parametrize(("shape", "warmup"), TABLE)
def test_by_steps(shape, warmup):
    optimizer = optimizer_of(3.0)
    schedule = BudgetSchedule(optimizer, Everything(8), steps=4, shape=shape, warmup=warmup)
    used = []
    for _ in range(4):
        used += rates(optimizer)
        optimizer.step()
        schedule.step()
    assert used + rates(optimizer) == pytest.approx([3 * factor for factor in TABLE[shape, warmup]])


def test_beyond_the_budget_it_stays_at_the_end():
    optimizer = optimizer_of(1.0)
    schedule = BudgetSchedule(optimizer, Everything(8), steps=1, shape="linear")
    optimizer.step()
    for _ in range(3):
        schedule.step()
        assert rates(optimizer) == [0]


def test_epochs_of_changing_length_share_the_budget_equally():
    sampler = Lengths(8 * BATCH, lengths=[n * BATCH for n in LENGTHS])
    optimizer = optimizer_of(1.0)
    schedule = BudgetSchedule(optimizer, sampler, epochs=4, shape="linear")
    for epoch, length in enumerate(LENGTHS):
        sampler.set_epoch(epoch)
        used = [row[0] for row in epoch_of(sampler, optimizer, schedule)]
        assert used == pytest.approx([1 - (epoch + n / length) / 4 for n in range(length)])
    assert rates(optimizer) == [0]


def test_resume_is_exact():
    def start():
        sampler, optimizer = Everything(5 * BATCH), optimizer_of(1.0, 2.0)
        return sampler, optimizer, BudgetSchedule(optimizer, sampler, epochs=2, shape="rex", warmup=0.3)

    whole = start()
    used = epoch_of(*whole)
    whole[0].set_epoch(1)
    used += epoch_of(*whole)
    for stop in range(1, 5):
        first = start()
        epoch_of(*first, stop=stop)
        states = copy.deepcopy([part.state_dict() for part in first])
        second = start()
        for part, state in zip(second, states, strict=True):
            part.load_state_dict(state)
        assert rates(second[1]) == rates(first[1])
        rest = epoch_of(*second)
        second[0].set_epoch(1)
        assert rest + epoch_of(*second) == used[stop:]
    assert "sampler" not in states[2]


def test_tensor_rates():
    optimizer = optimizer_of(torch.tensor(2.0))
    schedule = BudgetSchedule(optimizer, Everything(8), steps=2, shape="linear")
    optimizer.step()
    schedule.step()
    assert isinstance(rates(optimizer)[0], torch.Tensor)
    assert rates(optimizer)[0].item() == 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_in_lightning(accumulate):
    sampler = Lengths(8 * BATCH, lengths=[n * BATCH for n in LENGTHS])
    model = fit(sampler, max_epochs=4, accumulate_grad_batches=accumulate, schedule={"epochs": 4, "shape": "linear"})
    expected = [
        0.1 * (1 - (epoch + n / length) / 4)
        for epoch, length in enumerate(LENGTHS)
        for n in range(0, length, accumulate)
    ]
    assert model.rates == pytest.approx(expected)
    assert model.optimizers().param_groups[0]["lr"] == 0


def test_in_lightning_by_epoch_and_with_limited_epochs():
    sampler = Lengths(8 * BATCH, lengths=[n * BATCH for n in LENGTHS])
    schedule = {"epochs": 4, "shape": "linear", "interval": "epoch"}
    model = fit(sampler, max_epochs=4, schedule=schedule)
    assert model.rates == pytest.approx([0.1 * (1 - e / 4) for e, length in enumerate(LENGTHS) for _ in range(length)])
    sampler = Lengths(8 * BATCH, lengths=[n * BATCH for n in LENGTHS])
    model = fit(sampler, max_epochs=4, limit_train_batches=0.5, schedule={"epochs": 4, "shape": "linear"})
    expected = [0.1 * (1 - (e + n / length) / 4) for e, length in enumerate([4, 2, 1, 3]) for n in range(length)]
    assert model.rates == pytest.approx(expected)
    assert model.optimizers().param_groups[0]["lr"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"epochs=None, steps=None\): give the budget once"),
        ({"epochs": 1, "steps": 1}, "give the budget once"),
        ({"epochs": 0}, r"BudgetSchedule\(epochs=0\): epochs is the budget"),
        ({"steps": -3}, r"BudgetSchedule\(steps=-3\)"),
        ({"epochs": math.nan}, "epochs is the budget"),
        ({"epochs": math.inf}, "epochs is the budget"),
        ({"epochs": 1, "shape": "sine"}, r"shape='sine'\): there are 'cosine', 'linear', 'rex'"),
        ({"epochs": 1, "warmup": 1.0}, r"warmup=1.0\): warmup is a share of the budget and must be in \[0, 1\)"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BudgetSchedule(optimizer_of(1.0), Everything(8), **settings)


def test_bad_sampler():
    with pytest.raises(TypeError, match=r"BudgetSchedule\(sampler=int\)"):
        BudgetSchedule(optimizer_of(1.0), 3, epochs=1)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_by_steps("rex", 0.0)


def test_a_run_resumed_with_a_longer_budget_goes_on_at_its_rate():
    sampler = Everything(8)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = BudgetSchedule(optimizer, sampler, steps=4, shape="linear")
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0
    longer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    resumed = BudgetSchedule(longer, sampler, steps=8, shape="linear")
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    longer.step()
    resumed.step()
    assert longer.param_groups[0]["lr"] == pytest.approx(1 - 5 / 8)
