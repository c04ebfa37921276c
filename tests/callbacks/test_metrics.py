"""What the callback logs, and that it never waits for the device in a step."""

import math

import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning_support import BATCH, LENGTHS, QUIET, Model, SaveEveryStep, fit, loader, trainer

from samplewise.callbacks import SamplingCallback
from support import HardHalf, Lengths

pytestmark = QUIET
SIZE = 8 * BATCH


class Book(Logger):
    """Keeps the metrics that a run logs."""

    name = version = "book"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({key: value for key, value in metrics.items() if key.startswith("samplewise/")})

    def log_hyperparams(self, *args, **kwargs):
        pass

    def column(self, name):
        return [row[f"samplewise/{name}"] for row in self.rows if row]


def test_figures_of_each_epoch():
    sampler, book = Lengths(SIZE, lengths=[n * BATCH for n in LENGTHS]), Book()
    fit(sampler, max_epochs=4, logger=book)
    kept = [n / 8 for n in LENGTHS]
    assert book.column("kept") == pytest.approx(kept)
    saved = [1 - sum(kept[: n + 1]) / (n + 1) for n in range(4)]
    assert book.column("saved") == pytest.approx(saved)
    assert book.column("coverage") == [1] * 4
    assert book.column("ess") == [1] * 4
    assert book.column("staleness")[:2] == pytest.approx([0, 8 - 3.5])  # steps 0..7 were recorded before step 8
    assert all(seconds >= 0 for seconds in book.column("plan_seconds"))
    assert "samplewise/rejected" not in book.rows[-1]


def test_a_callback_may_serve_another_run():
    sampler, books = Lengths(SIZE, lengths=[SIZE // 2]), [Book(), Book()]
    callback = SamplingCallback(sampler)
    for book in books:
        run = trainer(sampler, max_epochs=1, logger=book)
        run.callbacks = [callback]
        run.fit(Model(sampler), loader(sampler))
    assert [book.column("saved") for book in books] == [[0.5], [0.5]]
    assert callback.state_dict()["kept"] == [0.5]


def test_effective_sample_size_of_weighted_plans():
    sampler, book = HardHalf(SIZE), Book()
    fit(sampler, max_epochs=2, logger=book)
    weights = torch.from_numpy(sampler.current_plan.weights).double()
    assert weights.max() > 1
    assert book.column("ess")[1] == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum() / len(weights)))


def test_a_resumed_epoch_logs_its_plans_figures(tmp_path):
    def rows(*more, **settings):
        book = Book()
        fit(HardHalf(SIZE), *more, max_epochs=3, logger=book, **settings)
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in book.rows if row]

    whole = rows(SaveEveryStep(tmp_path))
    assert rows(ckpt_path=tmp_path / "on_train_batch_end-010.ckpt") == whole[1:]
    assert rows(ckpt_path=tmp_path / "on_train_batch_end-008.ckpt") == whole[1:]


def test_rejected_losses_are_warned_of():
    class Broken(Model):
        def losses(self, batch):
            ids, losses = super().losses(batch)
            return ids, torch.where(ids == 3, math.nan, losses)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    sampler, book = Lengths(SIZE, lengths=[SIZE]), Book()
    with pytest.warns(UserWarning, match="1 losses so far were not finite"):
        trainer(sampler, max_epochs=1, logger=book).fit(Broken(sampler), loader(sampler))
    assert book.column("rejected") == [1]
    assert torch.nonzero(~sampler.ledger.seen).flatten().tolist() == [3]


def test_no_figure_is_made_in_a_step(monkeypatch):
    calls = []

    class Counting(HardHalf):
        @property
        def current_plan(self):
            calls.append("plan")
            return super().current_plan

    sampler = Counting(SIZE)
    monkeypatch.setattr(type(sampler.ledger), "rejected", property(lambda self: calls.append("rejected")))
    fit(sampler, max_epochs=2)
    assert calls == ["plan", "rejected"] * 2
