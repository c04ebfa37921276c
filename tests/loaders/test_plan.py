import numpy as np
import pytest
import torch

from samplewise.cuda_ext import Ledger
from samplewise.loaders import Plan, PlannedSampler


def checked(ids, weights=None, size=10):
    return Plan(ids, weights).check(size, "Test.plan")


def test_check_gives_exact_dtypes():
    plan = checked(np.array([3, 1], dtype=np.uint16), [1, 2])
    assert plan.ids.dtype == np.int64
    assert plan.weights.dtype == np.float32
    assert list(checked(range(9, 0, -2)).ids) == [9, 7, 5, 3, 1]


@pytest.mark.parametrize(
    ("ids", "weights", "error", "message"),
    [
        ([], None, ValueError, "empty"),
        (np.array([], dtype=np.int64), None, ValueError, "empty"),
        (range(0), None, ValueError, "empty"),
        ([0.0, 1.0], None, TypeError, "int64"),
        ([[0, 1]], None, TypeError, "int64"),
        ([0, 10], None, ValueError, r"\[0, 10\)"),
        ([-1, 1], None, ValueError, r"\[0, 10\)"),
        (range(5, 12), None, ValueError, r"\[0, 10\)"),
        ([0, 1], [1.0], ValueError, "one weight an id"),
        ([0, 1], [1.0, np.nan], ValueError, "finite"),
        ([0, 1], [1.0, -1], ValueError, ">= 0"),
        ([0, 1], [0.0, 0.0], ValueError, "not all 0"),
    ],
)
def test_bad_plans(ids, weights, error, message):
    with pytest.raises(error, match=message):
        checked(ids, weights)


def test_summary():
    ledger = Ledger(10)
    ledger.update(torch.tensor([0, 1, 2]), torch.ones(3))
    ledger.update(torch.tensor([2]), torch.ones(1))
    ledger.update(torch.tensor([2]), torch.full((1,), torch.nan))
    summary = checked(np.array([2, 5]), [3, 1]).summary(ledger)
    assert summary["kept"] == 0.2
    assert summary["coverage"] == pytest.approx(0.4)
    assert summary["ess"] == pytest.approx(16 / 10 / 2)
    assert summary["max_weight"] == pytest.approx(1.5)
    assert summary["staleness"] == pytest.approx((3 + 3 + 2) / 3)
    empty = checked(range(0, 10, 2)).summary(Ledger(10))
    assert empty == {"kept": 0.5, "coverage": 0.5, "ess": 1.0, "max_weight": 1.0, "staleness": 0.0}


@pytest.mark.parametrize("ids", [range(9, -1, -1), range(8, 1, -3)])
def test_descending_ranges_keep_their_weights(ids):
    plan = checked(ids, np.arange(len(ids)) + 1)
    assert plan.take(np.arange(len(ids))).tolist() == list(ids)
    assert plan.summary(Ledger(10))["coverage"] == len(ids) / 10


class Two(PlannedSampler):
    """Plan 0 weighs 1, plan 1 weighs 3, plan 2 has no weights."""

    def plan(self, epoch, rng):
        weights = None if epoch == 2 else np.full(self.size, 1.0 + 2 * epoch, np.float32)
        return Plan(np.arange(self.size)[::-1].copy(), weights)


def test_a_sample_that_an_epoch_shows_twice_carries_the_mean_of_its_weights():
    sampler = Two(100, epoch_length=150)
    shown = np.fromiter(sampler, np.int64)
    weights = sampler.ledger.weights(torch.from_numpy(shown)).numpy()
    twice = np.bincount(shown)[shown] == 2
    assert weights[twice].tolist() == [2] * 100  # once in plan 0, once in plan 1
    assert weights[~twice].tolist() == [1] * 50
    assert sampler.current_plan.weights.sum() == 100 + 50 * 3


def test_weights_follow_the_epoch():
    sampler = Two(10)
    for epoch, weight in enumerate([1, 3, 0]):
        sampler.set_epoch(epoch)
        len(sampler)
        assert sampler.ledger.column("weight").tolist() == [weight] * 10
    loss = sampler.observe(torch.tensor([4]), torch.tensor([5.0], requires_grad=True))
    assert loss.item() == 5
