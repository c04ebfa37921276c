"""PlannedSampler.observe: losses into the ledger, weights onto the losses."""

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler

from samplewise.loaders import Plan
from samplewise.loaders.testing import train_epoch
from support import Everything, HardHalf, Lengths, Returns


def weighted(size=4):
    sampler = Returns(size, Plan(np.arange(size), np.arange(1, size + 1, dtype=np.float32)))
    len(sampler)
    return sampler


def test_observe_weighs_before_the_mean():
    losses = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = weighted().observe(torch.tensor([3, 0, 1]), losses)
    assert loss.item() == pytest.approx((4 * 1 + 1 * 2 + 2 * 3) / 3)
    loss.backward()
    assert losses.grad.tolist() == pytest.approx([4 / 3, 1 / 3, 2 / 3])


@pytest.mark.parametrize("function", [torch.exp, torch.sigmoid, torch.sqrt])
def test_t22_the_users_losses_are_never_changed(function):
    raw = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    losses = function(raw)
    before = losses.detach().clone()
    weighted().observe(torch.tensor([3, 0, 1]), losses).backward()
    assert torch.equal(losses.detach(), before)
    assert torch.isfinite(raw.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype):
    losses = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    assert weighted().observe(torch.tensor([0, 1]), losses).item() == pytest.approx(2.5)


def test_t20_a_nan_loss_is_counted_and_planning_goes_on():
    sampler = HardHalf(50)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in BatchSampler(sampler, 10, False):
            ids = torch.tensor(batch)
            losses = torch.where(ids % 10 == 0, torch.nan, ids.float())
            sampler.observe(ids, losses.requires_grad_())
    assert sampler.ledger.rejected > 0
    assert len(sampler) < 50  # it prunes still
    assert sampler.current_plan.summary(sampler.ledger)["kept"] < 1


def test_t26_evaluation_leaves_no_trace():
    sampler = weighted()
    ids, losses = torch.tensor([3, 1]), torch.tensor([1.0, 3.0], requires_grad=True)
    with torch.no_grad():
        assert sampler.observe(ids, losses).item() == 2.0
        assert sampler.observe(torch.tensor([99]), torch.ones(1)).item() == 1.0  # another data set's ids
    with torch.inference_mode():
        sampler.observe(ids, losses)
    sampler.recording = False
    assert sampler.observe(ids, losses).item() == 2.0
    assert not sampler.ledger.seen.any()
    assert (sampler.consumed, sampler.step) == (0, 0)
    sampler.recording = True
    sampler.observe(ids, losses)
    assert int(sampler.ledger.seen.sum()) == 2


def test_an_id_that_comes_again_is_no_new_beginning_after_a_look_at_the_epoch():
    sampler = Returns(5, Plan(np.array([3, 1, 3, 2, 0])), shuffle=False)
    for batch in ([3, 1], [3, 2], [0]):
        next(iter(sampler))
        sampler.observe(torch.tensor(batch), torch.ones(len(batch)))
    assert sampler.consumed == 5


def test_detached_losses_may_be_recorded_after_backward():
    sampler = weighted()
    sampler.observe(torch.tensor([3, 1]), torch.tensor([1.0, 3.0]))
    assert int(sampler.ledger.seen.sum()) == 2


def test_t25_observe_beside_a_compiled_model():
    sampler = Everything(8)
    model = torch.nn.Linear(2, 1)

    @torch.compile(backend="aot_eager")
    def forward(x):
        return model(x).squeeze(1).square()

    ids, x = torch.tensor([1, 5]), torch.ones(2, 2)
    sampler.observe(ids, forward(x)).backward()
    assert model.weight.grad is not None
    assert sampler.ledger.seen.nonzero().flatten().tolist() == [1, 5]


def test_ids_that_are_not_planned_weigh_1():
    sampler = Returns(4, Plan(np.array([0, 1]), np.array([2, 4], dtype=np.float32)))
    loss = sampler.observe(torch.tensor([1, 3]), torch.tensor([1.0, 1.0], requires_grad=True))
    assert loss.item() == 2.5


def test_progress_counts_epochs_and_their_share():
    sampler = Lengths(40, lengths=[40, 8])
    assert sampler.progress == 0
    train_epoch(sampler, batch_size=10, stop=3)
    assert sampler.progress == 0.75
    sampler.set_epoch(1)
    train_epoch(sampler, batch_size=4, stop=1)
    assert sampler.progress == 1.5
    sampler.epoch_samples = 4
    assert sampler.progress == 2.0


@pytest.mark.parametrize(
    ("ids", "losses", "error", "message"),
    [
        (torch.tensor([0, 1]), torch.tensor(1.0), ValueError, r"reduction='none'"),
        (torch.tensor([0, 1]), torch.ones(2, 5), ValueError, r"losses.mean\(dim=1\)"),
        (torch.tensor([0, 1]), torch.ones(3), ValueError, "one value an id"),
        (torch.tensor([0, 1]), np.ones(2), TypeError, "floating-point tensor"),
        (torch.tensor([0, 1]), torch.ones(2, dtype=torch.long), TypeError, "floating-point"),
        (torch.tensor([0.0, 1.0]), torch.ones(2), TypeError, "integer"),
        (torch.tensor([0, 4]), torch.ones(2), IndexError, r"\[0, 4\)"),
        ([0, 1], torch.ones(2), TypeError, "integer"),
    ],
)
def test_bad_observations(ids, losses, error, message):
    sampler = weighted()
    with pytest.raises(error, match=message):
        sampler.observe(ids, losses)
    assert sampler.step == 0
