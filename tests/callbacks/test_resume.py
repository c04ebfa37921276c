"""T10, T13: resume from any checkpoint is exact, in the ids, in the ledger and in the model, bit for bit."""

import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_support import (
    BATCH,
    QUIET,
    Model,
    Rows,
    SaveEveryStep,
    fit,
    history,
    ledger_bytes,
    loader,
    resume_all,
    run_job,
    trainer,
    validation,
)

from samplewise.callbacks import SamplingCallback
from samplewise.cuda_ext import reference
from samplewise.loaders import with_ids
from support import Everything, HardHalf, Lengths

pytestmark = QUIET
SIZE = 7 * BATCH - 1
HOOKS = ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"]


def assert_goes_on(resumed, whole, step):
    """``resumed`` is what is left of ``whole`` after ``step`` batches."""
    assert resumed["ids"] == whole["ids"][step:]
    if resumed["position"] == (whole["position"][0] + 1, 0, step):  # saved on the run's last batch: it stands at the
        assert len(whole["ids"]) == step  # start of an epoch that never came, and has written that plan's weights
        whole = {**whole, "position": resumed["position"], "ledger": without_weights(whole["ledger"])}
        resumed = {**resumed, "ledger": without_weights(resumed["ledger"])}
    for key in ("ledger", "position", "weight"):
        assert resumed[key] == whole[key], key
    steps = [event for event in whole["events"] if event[0] == "step"]
    assert [event for event in resumed["events"] if event[0] == "step"] == steps[len(steps) - len(resumed["rates"]) :]
    assert resumed["rates"] == whole["rates"][len(whole["rates"]) - len(resumed["rates"]) :]


def without_weights(ledger: bytes) -> bytes:
    records = np.frombuffer(ledger, np.float32).reshape(SIZE, -1).copy()
    records[:, reference.WEIGHT] = 0
    return records.tobytes()


def step_of(path) -> int:
    return int(re.search(r"-(\d+)\.ckpt$", str(path)).group(1))


def run_and_resume_all(folder, hooks=HOOKS, *, process=False, **settings):
    """Train once with checkpoints everywhere, resume from each, compare."""
    settings = {"max_epochs": 3, **settings}
    whole = history(fit(HardHalf(SIZE), *(SaveEveryStep(folder, hook) for hook in hooks), val=validation(), **settings))
    torch.save({"size": SIZE, "fit": settings}, folder / "settings.pt")
    if process:
        run_job("resume_all", folder)
    else:
        resume_all(folder)
    resumed = torch.load(folder / "resumed.pt")
    assert len(resumed) >= len(whole["ids"])
    for name, rest in resumed.items():
        try:
            assert_goes_on(rest, whole, step_of(name))
        except AssertionError as error:
            raise AssertionError(f"resumed from {name} of {len(whole['ids'])} batches") from error
    return whole


def test_every_step_in_a_new_process(tmp_path):
    whole = run_and_resume_all(tmp_path, process=True)
    assert len(set(whole["served"])) > 1  # the plans' lengths do change


def test_every_step_with_workers(tmp_path):
    run_and_resume_all(tmp_path, HOOKS[:1], workers=2, persistent=True)


def test_every_step_with_validation_inside_epochs(tmp_path):
    run_and_resume_all(tmp_path, val_check_interval=0.4)


def test_every_step_with_accumulation(tmp_path):
    whole = run_and_resume_all(tmp_path, fixed=True, accumulate_grad_batches=3)
    assert whole["served"][0] % 3  # the last window is an incomplete one


def test_every_step_of_limited_epochs(tmp_path):
    whole = run_and_resume_all(tmp_path, limit_train_batches=0.6)
    assert whole["served"][0] == 4


def test_every_step_by_max_steps(tmp_path):
    run_and_resume_all(tmp_path, max_epochs=-1, max_steps=15)


def test_every_step_with_manual_optimisation_and_a_schedule(tmp_path):
    run_and_resume_all(tmp_path, HOOKS[:1], schedule={"epochs": 3, "shape": "rex", "warmup": 0.2})


def assert_same(one, other, where=""):
    """Equal trees, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    elif "plan_seconds" not in where:
        assert one == other, where


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_saves_what_the_whole_run_saves(tmp_path, workers):
    """So that resuming twice, or any number of times, is exact too."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    settings = {"max_epochs": 3, "workers": workers}
    fit(HardHalf(SIZE), SaveEveryStep(whole), **settings)
    for first in (1, 6, 7, 8, 12):
        sampler = HardHalf(SIZE)
        fit(sampler, SaveEveryStep(resumed), ckpt_path=whole / f"on_train_batch_end-{first:03d}.ckpt", **settings)
        later = [path for path in sorted(whole.glob("*.ckpt")) if step_of(path) > first]
        assert later
        for path in later:
            pair = [torch.load(folder / path.name, weights_only=True) for folder in (whole, resumed)]
            for key in ("epoch", "global_step", "callbacks", "state_dict", "optimizer_states"):
                assert_same(pair[0][key], pair[1][key], f"{first} -> {path.name}: {key}")
            one, other = (saved["loops"]["fit_loop"] for saved in pair)
            for key in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"):
                assert_same(one[key], other[key], f"{first} -> {path.name}: {key}")
            (path.parent.parent / "resumed" / path.name).unlink()


def test_a_run_cut_short_goes_on_in_the_same_epoch(tmp_path):
    """By max_steps: the checkpoint of the 'epoch end' is one of an epoch's middle."""
    whole = history(fit(HardHalf(SIZE), max_steps=15))
    last = None
    pieces = []
    for stop in (3, 7, 9, 13, 15):
        save = ModelCheckpoint(
            tmp_path, filename=f"to-{stop}", save_on_train_epoch_end=True, enable_version_counter=False
        )
        piece = history(fit(HardHalf(SIZE), save, ckpt_path=last, max_steps=stop, enable_checkpointing=True))
        last = tmp_path / f"to-{stop}.ckpt"
        pieces += piece["ids"]
    assert pieces == whole["ids"]
    for key in ("ledger", "position", "weight"):
        assert piece[key] == whole[key]


def test_a_stopped_epoch_goes_on_when_trained_by_epochs(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = (trainer.current_epoch, batch_idx) == (1, 1)

        def on_train_epoch_end(self, trainer, *args):
            if trainer.should_stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    whole = history(fit(HardHalf(SIZE), max_epochs=3))
    first = history(fit(HardHalf(SIZE), Stop(), max_epochs=3))
    assert len(first["ids"]) == whole["served"][0] + 2
    rest = history(fit(HardHalf(SIZE), max_epochs=3, ckpt_path=tmp_path / "stopped.ckpt"))
    assert_goes_on(rest, whole, len(first["ids"]))
    assert rest["served"] == [whole["served"][1] - 2, whole["served"][2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_failed_is_trained_on_again(tmp_path, workers):
    class Plug(Callback):
        def on_after_backward(self, trainer, *args):
            if (trainer.current_epoch, trainer.fit_loop.batch_idx) == (1, 2):
                raise RuntimeError("pulled the plug")

    whole = history(fit(HardHalf(SIZE), max_epochs=3, workers=workers))
    save = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(HardHalf(SIZE), Plug(), save, max_epochs=3, enable_checkpointing=True)
    rest = history(fit(HardHalf(SIZE), max_epochs=3, workers=workers, ckpt_path=tmp_path / "failed.ckpt"))
    assert rest["ids"] == whole["ids"][whole["served"][0] + 2 :]


def test_a_resumed_epoch_that_is_started_again(tmp_path):
    """Lightning begins an interrupted epoch at its first batch when fit is called again without a checkpoint."""

    class Plug(Callback):
        pulled = False

        def on_train_batch_end(self, *args):
            if not self.pulled:
                self.pulled = True
                raise RuntimeError("pulled the plug")

    whole = fit(HardHalf(SIZE), SaveEveryStep(tmp_path), max_epochs=3)
    sampler = HardHalf(SIZE)
    model, run = Model(sampler), trainer(sampler, Plug(), max_epochs=3)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run.fit(model, loader(sampler), ckpt_path=tmp_path / "on_train_batch_end-009.ckpt")
    model.batches.clear()
    run.fit(model, loader(sampler))
    assert model.batches[1] == whole.batches[1]
    assert len(model.batches) == 2


@pytest.mark.parametrize("lengths", [[3, 9, 5], [9, 3, 5], [4, 4, 4]])
def test_on_the_last_batch_when_the_next_epoch_is_longer_or_shorter(tmp_path, lengths):
    def sampler():
        return Lengths(9 * BATCH, lengths=[n * BATCH for n in lengths])

    saves = [SaveEveryStep(tmp_path, hook) for hook in HOOKS]
    whole = fit(sampler(), *saves, max_epochs=3, val=validation(), accumulate_grad_batches=2)
    for hook in HOOKS:
        path = tmp_path / f"{hook}-{lengths[0]:03d}.ckpt"
        state = torch.load(path, weights_only=True)["callbacks"]["SamplingCallback"]["sampler"]
        restored = sampler()
        restored.load_state_dict(state)
        assert (restored.epoch, restored.consumed) == (1, 0)
        rest = fit(sampler(), ckpt_path=path, max_epochs=3, val=validation(), accumulate_grad_batches=2)
        assert rest.batches == {1: whole.batches[1], 2: whole.batches[2]}
        assert rest.events == [event for event in whole.events if event[1] > 0]


def test_a_checkpoint_of_another_run_without_the_callback(tmp_path):
    sampler = Everything(SIZE)
    save = SaveEveryStep(tmp_path)
    fit(sampler, save, max_epochs=2)
    path = tmp_path / "on_train_batch_end-009.ckpt"
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"]["SamplingCallback"]
    torch.save(saved, path)
    sampler = Everything(SIZE)
    with pytest.warns(UserWarning, match="holds no state of it"):
        model = fit(sampler, ckpt_path=path, max_epochs=2)
    assert model.served() == [7]
    assert sorted(i for batch in model.batches[1] for i in batch) == list(range(SIZE))


def test_what_does_not_fit_is_refused(tmp_path):
    fit(HardHalf(SIZE), SaveEveryStep(tmp_path), max_epochs=1)
    path = tmp_path / "on_train_batch_end-003.ckpt"
    with pytest.raises(ValueError, match="data set of 27 samples, this one has 28"):
        fit(HardHalf(SIZE + 1), ckpt_path=path, max_epochs=2)
    sampler = HardHalf(SIZE)
    with pytest.raises(RuntimeError, match="Resume with the same batch_size"):
        fit(sampler, ckpt_path=path, max_epochs=2, train=loader(sampler, batch=5))
    with pytest.raises(ValueError, match="version 0 was saved"):
        SamplingCallback(HardHalf(SIZE)).load_state_dict({"version": 0})


def test_testing_a_checkpoint_leaves_the_sampler_alone(tmp_path):
    class Tested(Model):
        def test_step(self, batch, batch_idx):
            self.losses(batch)

    sampler = HardHalf(SIZE)
    model, run = Tested(sampler), trainer(sampler, SaveEveryStep(tmp_path), max_epochs=2)
    run.fit(model, loader(sampler))
    before = ledger_bytes(sampler), sampler.epoch, sampler.consumed
    run.test(model, validation(), ckpt_path=tmp_path / "on_train_batch_end-003.ckpt", weights_only=True)
    assert (ledger_bytes(sampler), sampler.epoch, sampler.consumed) == before


def test_strategies_that_restore_late(tmp_path):
    """Sharded strategies restore after configure_optimizers, which may have made and iterated the loader."""

    class Late(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    class Asks(Model):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    whole = history(fit(HardHalf(SIZE), SaveEveryStep(tmp_path), max_epochs=3))
    for step in (3, 7, 9):
        for workers in (0, 2):
            sampler = HardHalf(SIZE)
            model = Asks(sampler)
            run = trainer(sampler, max_epochs=3, strategy=Late("cpu"))
            path = tmp_path / f"on_train_batch_end-{step:03d}.ckpt"
            run.fit(model, loader(sampler, workers=workers), ckpt_path=path)
            assert_goes_on(history(model), whole, step)


def test_torchdatas_loader_with_a_state_of_its_own(tmp_path):
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")

    def train(sampler):
        data = with_ids(Rows(sampler.size))
        return stateful_dataloader.StatefulDataLoader(data, batch_size=BATCH, sampler=sampler)

    sampler = HardHalf(SIZE)
    whole = history(fit(sampler, SaveEveryStep(tmp_path), train=train(sampler), max_epochs=3))
    for path in sorted(tmp_path.glob("*.ckpt"))[:-1]:
        sampler = HardHalf(SIZE)
        assert_goes_on(history(fit(sampler, train=train(sampler), max_epochs=3, ckpt_path=path)), whole, step_of(path))
