"""Everything else a run can be: stopped early, in bfloat16, tuned; what it records, and what it leaves alone."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning_support import BATCH, LENGTHS, QUIET, Model, Rows, fit, ledger_bytes, loader, trainer, validation
from torch.utils.data import DataLoader, SequentialSampler

from samplewise.callbacks import SamplingCallback
from samplewise.loaders import Plan, PlannedSampler, with_ids
from support import Everything, HardHalf, Lengths

pytestmark = QUIET
SIZE = 6 * BATCH


def planned(**common):
    return Lengths(8 * BATCH, lengths=[n * BATCH for n in LENGTHS], **common)


def test_max_steps_in_the_middle_of_an_epoch():
    sampler = planned()
    model = fit(sampler, max_steps=10, val=validation())
    assert (model.served(), sampler.epoch, sampler.consumed) == ([8, 2], 1, 2 * BATCH)


def test_early_stopping():
    sampler = planned()
    stop = EarlyStopping("val_loss", patience=1, mode="max", min_delta=10)
    model = fit(sampler, stop, max_epochs=20, val=validation())
    assert model.served() == LENGTHS[:2]
    assert sampler.progress == 2


def test_metrics_of_the_plan_can_be_monitored():
    stop = EarlyStopping("samplewise/saved", mode="max", stopping_threshold=0.3)
    model = fit(planned(), stop, max_epochs=20)
    assert model.served() == LENGTHS[:3]  # saved: 0, 3/16, 1/3


@pytest.mark.parametrize("where", ["sanity check", "validation", "inside epochs"])
def test_only_training_steps_are_recorded(where):
    """T26. The model's validation_step calls observe, with gradients on."""
    settings = {"sanity check": {"num_sanity_val_steps": 2}, "inside epochs": {"val_check_interval": 1}}.get(where, {})
    plain, validated = HardHalf(SIZE), HardHalf(SIZE)
    fit(plain, max_epochs=2)
    fit(validated, max_epochs=2, val=validation(SIZE), **settings)
    assert ledger_bytes(validated) == ledger_bytes(plain)
    assert validated.step == plain.step
    assert validated.recording


def test_recording_that_the_user_switched_off_stays_off():
    sampler = Everything(SIZE)
    sampler.recording = False
    fit(sampler, max_epochs=1, val=validation())
    assert not sampler.recording
    assert not sampler.ledger.seen.any()


def test_recording_comes_back_after_a_failed_validation():
    class Fails(Model):
        def validation_step(self, batch, batch_idx):
            raise ArithmeticError("no")

    sampler = Everything(SIZE)
    with pytest.raises(ArithmeticError):
        trainer(sampler, max_epochs=1).fit(Fails(sampler), loader(sampler), validation())
    assert sampler.recording


def global_states():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002


def test_global_generators_are_left_alone():
    """T19: what a model draws is the same with the callback as in a plain run of equally many batches."""

    class Draws(Model):
        def training_step(self, batch, batch_idx):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
            return super().training_step(batch, batch_idx)

    def run(sampler, train, *callbacks):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        train_ = trainer(sampler, max_epochs=3)
        train_.callbacks = [*callbacks]
        train_.fit(Draws(sampler), train, validation())
        return global_states()

    drawn = []
    sampler = Everything(SIZE)
    with_callback = run(sampler, loader(sampler), SamplingCallback(sampler))
    ours, drawn = drawn, []
    data = with_ids(Rows(SIZE))
    plain = run(Everything(SIZE), DataLoader(data, batch_size=BATCH, sampler=SequentialSampler(data)))
    assert (with_callback, ours) == (plain, drawn)


class Weighted(PlannedSampler):
    """Sample i weighs i + 1."""

    def plan(self, epoch, rng):
        return Plan(np.arange(self.size), np.arange(1, self.size + 1, dtype=np.float32))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_before_the_mean_under_accumulation(precision):
    """T25: the step is that of the weighted mean over each batch, averaged over the window."""
    sampler = Weighted(SIZE)
    model = fit(sampler, max_epochs=1, accumulate_grad_batches=3, precision=precision)
    weight = torch.full((1, 2), 0.1, requires_grad=True)
    velocity = torch.zeros(1, 2)
    for window in (model.batches[0][:3], model.batches[0][3:]):
        loss = torch.zeros(())
        for ids in window:
            x, y = (torch.stack(part) for part in zip(*(Rows(SIZE)[i] for i in ids), strict=True))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                out = (x @ weight.T if precision == "32-true" else torch.nn.functional.linear(x, weight)).squeeze(-1)
                losses = (out - y) ** 2
            loss = loss + (torch.tensor(ids) + 1.0).mul(losses).mean() / 3
        (gradient,) = torch.autograd.grad(loss, weight)
        velocity = 0.5 * velocity + gradient
        weight = (weight - 0.1 * velocity).detach().requires_grad_()
    torch.testing.assert_close(model.net.weight, weight, rtol=1e-6, atol=1e-6)


def test_losses_of_half_precision_are_recorded():
    sampler = Everything(SIZE)
    fit(sampler, max_epochs=1, precision="bf16-true")
    assert sampler.ledger.seen.all()
    assert sampler.ledger.column("loss_last").dtype == torch.float32


@pytest.mark.filterwarnings("error:SamplingCallback")
@pytest.mark.parametrize("as_callback", [True, False])
def test_learning_rate_finder_leaves_the_run_alone(tmp_path, as_callback):
    """Its trial runs without callbacks, records losses, and restores a checkpoint in the end."""

    class Tunable(Model):
        lr = 0.1

    sampler = HardHalf(SIZE)
    model, train = Tunable(sampler), loader(sampler)
    settings = {"num_training": 8, "early_stop_threshold": None, "update_attr": False}
    finder = LearningRateFinder(num_training_steps=8, early_stop_threshold=None, update_attr=False)
    more = [finder] if as_callback else []
    run = trainer(sampler, *more, max_epochs=2, default_root_dir=tmp_path)
    if not as_callback:
        Tuner(run).lr_find(model, train, **settings)
    else:
        finder.on_fit_start = _clearing(model, finder.on_fit_start)
    model.batches.clear()
    run.fit(model, train)
    reference = HardHalf(SIZE)
    expected = fit(reference, max_epochs=2)
    assert model.batches[0] == expected.batches[0]
    assert sampler.step == reference.step
    assert ledger_bytes(sampler) == ledger_bytes(reference)


def _clearing(model, hook):
    def then_clear(*args):
        hook(*args)
        model.batches.clear()

    return then_clear


def test_no_callback_no_cure():
    """What the callback is for: the same run without it trains on other samples."""

    class Count(Callback):
        batches = 0

        def on_train_batch_end(self, *args):
            self.batches += 1

    sampler, count = planned(), Count()
    run = trainer(sampler, count, max_epochs=4, accumulate_grad_batches=4)
    run.callbacks = [count]
    run.fit(Model(sampler), loader(sampler), validation())
    assert count.batches == sum(LENGTHS)  # Lightning stops where the loader ends, but
    assert run.fit_loop.max_batches == LENGTHS[0]  # takes each epoch for as long as the first


class Shared(Model):
    """Its test and predict steps call observe with gradients on, as a shared step would."""

    def test_step(self, batch, batch_idx):
        with torch.enable_grad():
            self.sampler.observe(*self.losses(batch))

    predict_step = test_step


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_t26_testing_and_predicting_leave_no_trace(stage):
    sampler = Everything(4 * BATCH)
    run, model = trainer(sampler, max_epochs=1, inference_mode=False), Shared(sampler)
    run.fit(model, loader(sampler))
    before = ledger_bytes(sampler), sampler.step
    getattr(run, stage)(model, validation())
    assert (ledger_bytes(sampler), sampler.step) == before
    assert sampler.recording
