import numpy as np
import pytest
import torch

from samplewise.cuda_ext.elementary import ROUNDER, log1p_positive, log_positive, power_of_two, scaled_exp, square_root


def error(ours, exact):
    """Largest relative error of float32 values against longdouble ones."""
    return float(np.max(np.abs(ours.numpy().astype(np.longdouble) / exact - 1)))


def uniform(low, high, size=1_000_000):
    return torch.empty(size).uniform_(low, high, generator=torch.Generator().manual_seed(0))


def wide(x):
    return x.numpy().astype(np.longdouble)


@pytest.mark.parametrize(("low", "high"), [(-87, 88), (-1, 1), (-1e-4, 1e-4)])
def test_log(low, high):
    x = uniform(low, high).exp()
    x = x[x != 1]
    assert error(log_positive(x), np.log(wide(x))) < 2.5e-7
    assert log_positive(torch.ones(1)) == 0


@pytest.mark.parametrize("largest", [1e-30, 1e-7, 1e-3, 1, 4, 1e6, 1e30])
def test_log1p(largest):
    x = uniform(0.001, 1) * largest
    assert error(log1p_positive(x), np.log1p(wide(x))) < 5e-7
    assert log1p_positive(torch.zeros(1)) == 0


@pytest.mark.parametrize(("limit", "scale"), [(1, 0), (20, 3), (80, -40), (4096, 0)])
def test_exp(limit, scale):
    z = uniform(-limit, limit)
    k = (z.double() / np.log(2)).round().float() if limit == 4096 else torch.full_like(z, scale)
    z, k = (part[(z / np.log(2) - k).abs() < 29] for part in (z, k))
    exact = np.exp(wide(z) - wide(k) * np.log(np.longdouble(2)))
    assert error(scaled_exp(z, ROUNDER - k, 62), exact) < 2.6e-7


def test_exp_of_its_ends():
    z = torch.tensor([0.0, -0.0, -torch.inf, -3e38, -44.0, -42.0, -90.0, -86.0])
    origin = torch.tensor(ROUNDER)
    assert (scaled_exp(z, origin, 62) != 0).tolist() == [True, True, False, False, False, True, False, False]
    assert (scaled_exp(z, origin, 125) != 0).tolist() == [True, True, False, False, True, True, False, True]
    assert scaled_exp(z, origin, 62)[:2].tolist() == [1, 1]


def test_power_of_two():
    d = torch.arange(-300, 128, dtype=torch.int32)
    exact = torch.where(d < -126, 0.0, torch.exp2(d.double())).float()
    assert torch.equal(power_of_two(d), exact)


def test_square_root_is_the_nearest():
    x = uniform(1, 2).square() * uniform(1, 100)
    assert torch.equal(square_root(x), torch.from_numpy(np.sqrt(x.numpy())))
