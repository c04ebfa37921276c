import numpy as np
import pytest
import torch

from samplewise.cuda_ext import Ledger
from samplewise.loaders import Plan
from samplewise.loaders.plan import write_weights


def checked(ids, weights=None, size=10):
    return Plan(ids, weights).check(size, "Test.plan")


def test_check_gives_exact_dtypes():
    plan = checked(np.array([3, 1], dtype=np.uint16), [1, 2])
    assert plan.ids.dtype == np.int64
    assert plan.weights.dtype == np.float32
    assert list(checked(range(9, 0, -2)).ids) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("ids", "weights", "error", "message"),
    [
        ([], None, TypeError, "int64"),
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
    ledger.update(torch.tensor([0, 1, 2]), torch.ones(3), step=4)
    ledger.update(torch.tensor([2]), torch.ones(1), step=7)
    summary = checked(np.array([2, 5]), [3, 1]).summary(ledger, step=9)
    assert summary["kept"] == 0.2
    assert summary["coverage"] == pytest.approx(0.4)
    assert summary["ess"] == pytest.approx(16 / 10 / 2)
    assert summary["max_weight"] == pytest.approx(1.5)
    assert summary["staleness"] == pytest.approx((5 + 5 + 2) / 3)
    empty = checked(range(0, 10, 2)).summary(Ledger(10), step=0)
    assert empty == {"kept": 0.5, "coverage": 0.5, "ess": 1.0, "max_weight": 1.0, "staleness": 0.0}


def test_repeated_ids_carry_the_mean_of_their_weights():
    ledger = Ledger(5)
    plans = [checked(np.array([0, 1, 1]), [1, 2, 4], 5), checked(range(1, 3), None, 5)]
    write_weights(ledger, plans)
    assert ledger.column("weight").tolist() == pytest.approx([1, 7 / 3, 1, 0, 0])
