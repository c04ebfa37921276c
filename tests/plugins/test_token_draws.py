"""``choose``: a token for each row of logits, by its lot."""

import numpy as np
import pytest
import torch
from token_support import tolerance

from samplewise.plugins.token_rollouts import choose

ALMOST_ONE = 1 - 2.0**-53


def test_the_likeliest_token():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    lots = torch.rand(50, dtype=torch.float64)
    assert torch.equal(choose(logits, lots, 0), logits.argmax(-1))
    assert torch.equal(choose(logits, lots, 1e-4), logits.argmax(-1))
    assert torch.equal(choose(logits.half(), lots, 0), logits.half().argmax(-1))
    assert choose(logits, lots, 1.0).dtype == torch.int64
    assert choose(logits[:0], lots[:0], 1.0).shape == choose(logits[:0], lots[:0], 0).shape == (0,)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_of_three_tokens(temperature):
    count = 40_000
    logits = torch.tensor([[0.0, 1.5, 0.7]])
    lots = torch.from_numpy(np.random.default_rng(1).random(count))
    weights = np.exp(np.array([0.0, 1.5, 0.7]) / temperature)
    p = weights / weights.sum()
    shares = np.bincount(choose(logits.expand(count, 3), lots, temperature).numpy(), minlength=3) / count
    assert (abs(shares - p) < [tolerance(one, count) for one in p]).all()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_frequencies_of_a_large_vocabulary(temperature):
    count, size, groups = 256, 200_000, 16
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(size=(1, size)).astype(np.float32))
    weights = np.exp(logits[0].double().numpy() / temperature)
    p = weights / weights.sum()
    lots = rng.random(count)
    drawn = choose(logits.expand(count, size), torch.from_numpy(lots), temperature).numpy()
    expected = p.reshape(groups, -1).sum(1) * count
    chi = ((np.bincount(drawn * groups // size, minlength=groups) - expected) ** 2 / expected).sum()
    assert abs(chi - (groups - 1)) < 5 * np.sqrt(2 * (groups - 1))  # the mean and the variance of chi-square
    ends = np.cumsum(p)
    assert (ends[drawn] > lots - 1e-12).all()  # min {k: p_0 + ... + p_k > lot}
    assert (ends[drawn] - p[drawn] < lots + 1e-12).all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_tokens_of_probability_0_are_never_drawn(temperature):
    no = -torch.inf
    rows = [[no, 0, 1, no], [no, no, no, 0], [0, no, no, no], [no, 0, no, 0, no][:4], [0, -800, -800, -9000]]
    logits = torch.tensor(rows, dtype=torch.float32)
    some = torch.softmax(logits.double() / temperature, -1) > 0
    for lot in (0.0, 2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-52, ALMOST_ONE):
        drawn = choose(logits, torch.full((len(rows),), lot, dtype=torch.float64), temperature)
        assert some[torch.arange(len(rows)), drawn].all()
    first = choose(logits, torch.zeros(len(rows), dtype=torch.float64), temperature)
    assert torch.equal(first, some.int().argmax(-1))


def test_the_last_lot_is_never_beyond_a_large_vocabulary():
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(3))
    logits[:, -100:] = -torch.inf
    drawn = choose(logits, torch.full((40,), ALMOST_ONE, dtype=torch.float64), 1.0)
    assert int(drawn.max()) < 4900


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [[0.0, torch.nan, 1.0], [torch.nan] * 3, [torch.inf, 0, 0], [-torch.inf] * 3])
def test_logits_without_a_likeliest_token(wrong, temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0], wrong])
    with pytest.raises(ValueError, match="the model's logits are NaN or infinite; nothing was written"):
        choose(logits, torch.zeros(2, dtype=torch.float64), temperature)
