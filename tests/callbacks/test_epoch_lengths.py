"""T8: each epoch is as long as its plan, whatever the trainer's settings."""

import itertools

import pytest
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from lightning_support import BATCH, LENGTHS, QUIET, Model, Rows, fit, loader, trainer, validation
from torch.utils.data import BatchSampler, DataLoader

from samplewise.loaders import with_ids
from support import Lengths

pytestmark = QUIET


def planned(lengths=LENGTHS, size=9 * BATCH, **common):
    return Lengths(size, lengths=[n * BATCH for n in lengths], **common)


def assert_plans_served(model, lengths):
    """Each epoch's ids are exactly the first ``lengths[epoch]`` batches of rows, each once."""
    for epoch, batches in model.batches.items():
        assert sorted(itertools.chain(*batches)) == list(range(lengths[epoch] * BATCH))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("lengths", [LENGTHS, [2, 9, 1, 6]], ids=["shrinks", "grows"])
def test_batches_optimizer_steps_and_validation(workers, persistent, lengths):
    model = fit(
        planned(lengths),
        max_epochs=4,
        accumulate_grad_batches=4,
        val=validation(),
        workers=workers,
        persistent=persistent,
    )
    assert model.served() == lengths
    assert model.count("step") == {8: [2, 2, 1, 2], 2: [1, 3, 1, 2]}[lengths[0]]
    assert model.count("val") == [1, 1, 1, 1]
    assert_plans_served(model, lengths)


@pytest.mark.parametrize(
    ("limit", "expected"), [(4, [4, 4, 3, 4]), (0.5, [4, 2, 1, 3]), (0.2, [1, 1, 1, 1]), (1.0, LENGTHS)]
)
def test_limit_train_batches(limit, expected):
    sampler = planned()
    model = fit(sampler, max_epochs=4, limit_train_batches=limit, accumulate_grad_batches=2, val=validation())
    assert model.served() == expected
    assert model.count("step") == [-(-n // 2) for n in expected]
    assert model.count("val") == [1, 1, 1, 1]
    assert sampler.consumed == expected[-1] * BATCH
    assert sampler.progress == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"val_check_interval": 2}, [4, 2, 1, 3]),
        ({"val_check_interval": 0.5}, [2, 2, 3, 2]),
        ({"val_check_interval": 0.1}, LENGTHS),
        ({"check_val_every_n_epoch": 2}, [0, 1, 0, 1]),
        ({"check_val_every_n_epoch": 2, "val_check_interval": 0.5}, [0, 2, 0, 2]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, [1, 1, 1, 1]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 6}, [1, 1, 0, 1]),
        ({"limit_val_batches": 0}, [0, 0, 0, 0]),
        ({"num_sanity_val_steps": 2}, [1, 1, 1, 1]),
        ({"val_check_interval": "00:00:00:01"}, [0, 0, 0, 0]),
    ],
    ids=str,
)
def test_validation(settings, expected):
    model = fit(planned(), max_epochs=4, val=validation(), **settings)
    assert model.served() == LENGTHS
    assert model.count("val") == expected
    assert model.events.count(("sanity", 0)) == bool(settings.get("num_sanity_val_steps"))


def test_an_interval_beyond_an_epoch_is_warned_of():
    with pytest.warns(UserWarning, match=r"epoch 2 has 3 batches, fewer than Trainer\(val_check_interval=5\)"):
        model = fit(planned(), max_epochs=4, val=validation(), val_check_interval=5)
    assert model.count("val") == [1, 1, 0, 1]


def test_validation_stays_after_the_last_batch_of_a_shorter_plan():
    model = fit(planned(), max_epochs=4, val=validation())
    order = [event for event, epoch in model.events if epoch == 2]
    assert order == ["step"] * 3 + ["val"]


def test_no_validation_loader_and_manual_optimisation():
    model = fit(planned(), max_epochs=4, manual=True)
    assert model.served() == model.count("step") == LENGTHS


def test_partial_batches_and_the_consumed_cursor():
    class Watch(Callback):
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, *args):
            self.seen.append((sampler.epoch, sampler.consumed))

    sampler = Lengths(30, lengths=[10, 9, 3])
    model = fit(sampler, Watch(), max_epochs=3)
    assert model.served() == [3, 3, 1]
    assert Watch.seen == [(0, 4), (0, 8), (0, 10), (1, 4), (1, 8), (1, 9), (2, 3)]


def test_drop_last_batch():
    sampler = Lengths(30, lengths=[10, 23, 9])
    train = DataLoader(with_ids(Rows(30)), batch_size=BATCH, sampler=sampler, drop_last=True)
    model = fit(sampler, max_epochs=3, train=train)
    assert model.served() == [2, 5, 2]
    assert sampler.progress == 3


def test_batches_that_were_not_observed_count():
    class Forgetful(Model):
        def training_step(self, batch, batch_idx):
            return self.losses(batch)[1].mean()

    sampler = planned()
    trainer(sampler, max_steps=6).fit(Forgetful(sampler), loader(sampler))
    assert (sampler.epoch, sampler.consumed) == (0, 6 * BATCH)


def test_fixed_epoch_length():
    model = fit(planned([2, 3, 1], epoch_length=5 * BATCH), max_epochs=3, accumulate_grad_batches=2)
    assert model.served() == [5, 5, 5]
    assert model.count("step") == [3, 3, 3]


@pytest.mark.parametrize("first", [True, False], ids=["callback first", "bar first"])
def test_progress_bar_totals(first):
    class Bar(TQDMProgressBar):
        totals: list[float] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer, *args):
            super().on_train_epoch_start(trainer, *args)
            self.totals.append(self.train_progress_bar.total)

    Bar.totals = []
    bar = Bar()
    more, before = ((bar,), ()) if first else ((), (bar,))
    fit(planned(), *more, before=before, max_epochs=4, enable_progress_bar=True)
    assert Bar.totals == LENGTHS


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_reloaded_dataloaders(workers, every):
    class Data(LightningDataModule):
        made = 0

        def train_dataloader(self):
            self.made += 1
            return loader(sampler, workers=workers)

        def val_dataloader(self):
            return validation()

    sampler, data = planned(), Data()
    model = fit(sampler, max_epochs=4, train=data, reload_dataloaders_every_n_epochs=every, accumulate_grad_batches=4)
    assert data.made == 4 // every
    assert (model.served(), model.count("step"), model.count("val")) == (LENGTHS, [2, 2, 1, 2], [1, 1, 1, 1])
    assert_plans_served(model, LENGTHS)


def test_second_fit_goes_on_with_the_next_epoch():
    sampler = planned()
    model, run = Model(sampler), trainer(sampler, max_epochs=2)
    run.fit(model, loader(sampler))
    run.fit_loop.max_epochs = 4
    run.fit(model, loader(sampler))
    assert model.served() == LENGTHS
    assert_plans_served(model, LENGTHS)


def test_a_sampler_may_serve_another_run():
    sampler = planned()
    fit(sampler, max_epochs=1)
    model = fit(sampler, max_epochs=4)
    assert model.served() == LENGTHS


def test_an_interrupted_epoch_starts_again():
    class Plug(Callback):
        pulled = False

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2) and not self.pulled:
                self.pulled = True
                raise RuntimeError("pulled the plug")

    sampler = planned()
    model, run = Model(sampler), trainer(sampler, Plug(), max_epochs=4)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run.fit(model, loader(sampler))
    run.fit(model, loader(sampler))
    assert len(model.batches[1]) == 3 + 5
    assert (model.served()[2:], sampler.epoch, sampler.consumed) == (LENGTHS[2:], 3, 7 * BATCH)


def test_a_step_that_skips_the_rest_of_the_epoch():
    class Skips(Model):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    sampler = planned()
    model = Skips(sampler)
    trainer(sampler, max_epochs=4).fit(model, loader(sampler))
    assert model.served() == [2, 2, 2, 2]
    assert sampler.progress == 4


def test_combined_loaders():
    sampler = planned()
    other = DataLoader(Rows(100), batch_size=BATCH)

    class Two(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["planned"], batch_idx)

    model = Two(sampler)
    both = CombinedLoader({"planned": loader(sampler), "other": other}, "min_size")
    trainer(sampler, max_epochs=4, accumulate_grad_batches=4).fit(model, both)
    assert (model.served(), model.count("step")) == (LENGTHS, [2, 2, 1, 2])
    with pytest.raises(RuntimeError, match="mode='min_size'"):
        trainer(sampler, max_epochs=4).fit(Two(sampler), {"planned": loader(sampler), "other": other})


class Growing:
    """A batch sampler without a batch size: batches of 1, 2, 3, ... samples."""

    def __init__(self, sampler):
        self.sampler = sampler

    def sizes(self):
        total, sizes = len(self.sampler), []
        while sum(sizes) < total:
            sizes.append(min(len(sizes) + 1, total - sum(sizes)))
        return sizes

    def __iter__(self):
        ids = iter(self.sampler)
        for size in self.sizes():
            yield list(itertools.islice(ids, size))

    def __len__(self):
        return len(self.sizes())


@pytest.mark.parametrize("kind", [Growing, lambda sampler: BatchSampler(sampler, BATCH, drop_last=False)])
def test_batch_samplers_on_one_rank(kind):
    sampler = planned()
    batches = kind(sampler)
    model = fit(sampler, max_epochs=4, train=DataLoader(with_ids(Rows(sampler.size)), batch_sampler=batches))
    assert [sum(map(len, model.batches[epoch])) for epoch in range(4)] == [n * BATCH for n in LENGTHS]
    assert sampler.consumed == LENGTHS[-1] * BATCH
    assert sampler.progress == 4


def test_estimated_stepping_batches_takes_the_first_epoch_for_all():
    """Which is why schedules take the share of the budget instead: BudgetSchedule."""

    class Asks(Model):
        def configure_optimizers(self):
            self.estimate = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    sampler = planned()
    model = Asks(sampler)
    trainer(sampler, max_epochs=4).fit(model, loader(sampler))
    assert model.estimate == LENGTHS[0] * 4
    assert model.served() == LENGTHS  # asking made the loader early, which does no harm
