"""T5, T6, T12: what would train on other samples than the plan is refused, at once, with the setting to change."""

import sys

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_support import BATCH, QUIET, Model, Rows, fit, loader, trainer, validation
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from samplewise import callbacks
from samplewise.callbacks import SamplingCallback
from samplewise.callbacks import lightning as module
from samplewise.loaders import DistinctBatches, with_ids
from support import Everything

pytestmark = QUIET
SIZE = 6 * BATCH


class OwnBatches(BatchSampler):
    """Some batch sampler of the user's."""


def of(**settings):
    return lambda sampler: DataLoader(with_ids(Rows(SIZE)), **settings)


def own_batches(sampler):
    return DataLoader(with_ids(Rows(SIZE)), batch_sampler=OwnBatches(SequentialSampler(range(SIZE)), BATCH, False))


def same_sampler_twice(sampler):
    return {"one": loader(sampler), "two": loader(sampler)}


class Swapped(Rows):
    """Something between the sampler and the data deals ids out anew."""

    def __getitem__(self, index):
        return super().__getitem__(SIZE - 1 - index)


def swapped_ids(sampler):
    def collate(items):
        return torch.tensor([SIZE - 1 - index for index, _ in items]), default_collate([item for _, item in items])

    return DataLoader(with_ids(Swapped(SIZE)), batch_size=BATCH, sampler=sampler, collate_fn=collate)


def test_other_samples_than_those_that_are_due():
    sampler = Everything(SIZE)
    model = Model(sampler)
    with pytest.raises(RuntimeError, match=r"SamplingCallback: the batch holds .* are due.*Let nothing stand between"):
        trainer(sampler, max_epochs=1).fit(model, swapped_ids(sampler))
    assert not model.batches


class Labelled(Rows):
    """Pairs that begin with an integer label."""

    def __getitem__(self, index):
        return index * 5 % 7, super().__getitem__(index)


class Labels(LightningModule):
    """Trains without ids."""

    def __init__(self):
        super().__init__()
        self.net, self.labels = torch.nn.Linear(1, 7), []

    def training_step(self, batch, batch_idx):
        self.labels += batch[0].tolist()
        return torch.nn.functional.cross_entropy(self.net(batch[0][:, None].float()), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_labels_are_not_taken_for_ids():
    sampler, model = Everything(SIZE), Labels()
    sampler.uses_losses = False
    trainer(sampler, max_epochs=1).fit(model, DataLoader(Labelled(SIZE), batch_size=BATCH, sampler=sampler))
    assert sorted(model.labels) == sorted(index * 5 % 7 for index in range(SIZE))


def test_a_stream_without_a_stage():
    sampler = Everything(SIZE)
    with pytest.raises(RuntimeError, match=r"Numbers, is a stream, which takes no sampler.*streams\.keep"):
        trainer(sampler, max_epochs=1).fit(Model(sampler), DataLoader(Numbers(), batch_size=BATCH))


class Numbers(IterableDataset):
    def __iter__(self):
        yield from range(SIZE)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (
            of(batch_size=BATCH, shuffle=True),
            RuntimeError,
            "it has a RandomSampler.*sampler=sampler.*instead of shuffle",
        ),
        (of(batch_size=BATCH), RuntimeError, "it has SequentialSampler. Pass DataLoader"),
        (lambda _: loader(Everything(SIZE)), RuntimeError, "another Everything object. Make the sampler once"),
        (own_batches, RuntimeError, "a batch_sampler of its own, OwnBatches"),
        (same_sampler_twice, RuntimeError, "2 training loaders have the same sampler"),
        (lambda sampler: DataLoader(with_ids(Rows(SIZE + 1)), sampler=sampler), ValueError, "24 samples.*has 25"),
        (lambda sampler: DataLoader(with_ids(Rows(SIZE - 1)), sampler=sampler), ValueError, "24 samples.*has 23"),
        (lambda _: [[0, 1], [2, 3]], RuntimeError, "it has list"),
    ],
    ids=["shuffle", "no sampler", "another one", "batch sampler", "two loaders", "longer", "shorter", "no DataLoader"],
)
def test_training_loader(train, error, message):
    sampler = Everything(SIZE)
    model = Model(sampler)
    with pytest.raises(error, match=message):
        trainer(sampler, max_epochs=1).fit(model, train(sampler))
    assert not model.batches


def test_overfit_batches():
    with pytest.raises(RuntimeError, match=r"overfit_batches=3\).*limit_train_batches=3"):
        fit(Everything(SIZE), max_epochs=1, overfit_batches=3)


def test_fast_dev_run():
    model = fit(Everything(SIZE), fast_dev_run=2, val=validation())
    assert (model.served(), model.count("val")) == ([2], [1])


@pytest.mark.parametrize("sanity", [0, 1])
def test_validation_loader_with_the_training_sampler(sanity):
    sampler = Everything(SIZE)
    with pytest.raises(RuntimeError, match="a validation loader has the training sampler"):
        fit(sampler, max_epochs=1, val=loader(sampler), num_sanity_val_steps=sanity)


def test_a_reloaded_loader_with_a_new_sampler():
    class Data(LightningDataModule):
        fresh = False

        def train_dataloader(self):
            mine, self.fresh = (Everything(SIZE) if self.fresh else sampler), True
            return loader(mine)

    sampler = Everything(SIZE)
    with pytest.raises(RuntimeError, match=r"Make the sampler once, outside train_dataloader\(\)"):
        fit(sampler, train=Data(), max_epochs=2, reload_dataloaders_every_n_epochs=1)


def test_two_callbacks():
    sampler = Everything(SIZE)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SamplingCallback`"):
        trainer(sampler, SamplingCallback(sampler))  # Lightning's own check

    class Mine(SamplingCallback):
        """Its key among the callbacks' states differs."""

    with pytest.raises(RuntimeError, match="two of them have the same sampler"):
        fit(sampler, Mine(sampler), max_epochs=1)


def test_ranks_that_are_not_the_trainers():
    with pytest.raises(RuntimeError, match=r"the sampler serves rank 1 of 2.*rank 0 of 1"):
        fit(Everything(SIZE, num_replicas=2, rank=1), max_epochs=1)


@pytest.mark.parametrize("wrong", [None, RandomSampler(range(3)), range(3)])
def test_no_planned_sampler(wrong):
    with pytest.raises(TypeError, match=r"SamplingCallback\(sampler=\w+\): a PlannedSampler is needed"):
        SamplingCallback(wrong)


def test_a_lightning_without_a_field_that_is_used(monkeypatch):
    monkeypatch.setitem(module._PRIVATE, "fit_loop.limits_of_tomorrow", "none yet")
    with pytest.raises(RuntimeError, match=r"has no trainer\.fit_loop\.limits_of_tomorrow.*pip install"):
        fit(Everything(SIZE), max_epochs=1)


@pytest.mark.parametrize(("name", "part"), [("SamplingCallback", "lightning"), ("SamplingReport", "report")])
def test_a_missing_extra_is_named(monkeypatch, name, part):
    monkeypatch.delitem(sys.modules, f"samplewise.callbacks.{part}", raising=False)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=rf"{name} needs lightning.*pip install 'samplewise\[lightning"):
        getattr(callbacks, name)
    assert callbacks.BudgetSchedule


class Forgetful(Model):
    """Takes the mean of the losses itself."""

    def training_step(self, batch, batch_idx):
        return self.losses(batch)[1].mean()


class Named(Everything):
    """A method that anneals by its own number of epochs."""

    epochs = 5


def test_a_run_that_records_no_loss_is_warned_of():
    with pytest.warns(UserWarning, match=r"no loss was recorded in epoch 0.*sampler\.observe"):
        fit(Everything(SIZE), kind=Forgetful, max_epochs=1)


def test_other_epochs_than_the_methods_are_warned_of():
    with pytest.warns(UserWarning, match=r"Named\(epochs=5\), but Trainer\(max_epochs=1\)"):
        fit(Named(SIZE), max_epochs=1)


def test_batches_of_another_size_than_arranged():
    sampler = Everything(12, arrange=DistinctBatches(range(12), BATCH + 1))
    with pytest.raises(ValueError, match=f"arranges batches of {BATCH + 1}, the training loader makes them of {BATCH}"):
        fit(sampler, max_epochs=1)
