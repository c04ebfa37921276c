"""SamplingReport in a real Trainer run, and the pure parts below it."""

import builtins
import json
import re
from dataclasses import asdict
from html import unescape

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from samplewise.callbacks import SamplingCallback, SamplingReport, figures
from samplewise.callbacks.figures import Line
from samplewise.callbacks.page import Page, Picture, Section, Table
from samplewise.callbacks.report import EpochRecord, Stopwatch, kept_by_loss, savings
from samplewise.loaders import with_ids
from support import Everything, HardHalf

SIZE, BATCH = 60, 8
DATA = TensorDataset(torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0)), torch.arange(SIZE) % 3)
PNG = b"\x89PNG"


class Model(LightningModule):
    def __init__(self, observe):
        super().__init__()
        self.layer, self.observe = torch.nn.Linear(4, 3), observe

    def training_step(self, batch, batch_idx):
        ids, (x, y) = batch
        return self.observe(ids, torch.nn.functional.cross_entropy(self.layer(x), y, reduction="none"))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(sampler, report, *, observe=None, epochs=3, callbacks=(), first=(), ckpt_path=None, root=None, **settings):
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[*first, SamplingCallback(sampler), report, *callbacks],
        **settings,
    )
    loader = DataLoader(with_ids(DATA), BATCH, sampler=sampler)
    trainer.fit(Model(observe or sampler.observe), loader, DataLoader(DATA, 20), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("report_first", [True, False])
def test_records_each_epochs_own_plan(report_first):
    sampler = HardHalf(SIZE)
    observe = Stopwatch(sampler.observe)
    report = SamplingReport(sampler, None, labels=DATA.tensors[1], observe=observe)
    plans = []

    class Plans(Model):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                plans.append(sampler.current_plan)

    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[report, SamplingCallback(sampler)][:: 1 if report_first else -1],
    )
    trainer.fit(Plans(observe), DataLoader(with_ids(DATA), BATCH, sampler=sampler), DataLoader(DATA, 20))
    assert [record.epoch for record in report.records] == [0, 1, 2]
    for record, plan in zip(report.records, plans, strict=True):
        kept = np.zeros(SIZE, dtype=bool)
        kept[plan.ids] = True
        assert record.planned == record.samples == len(plan)
        assert record.kept == len(plan) / SIZE
        assert record.steps == -(-len(plan) // BATCH)
        by_class = [kept[DATA.tensors[1].numpy() == label].mean() for label in range(3)]
        assert record.kept_by_class == pytest.approx(by_class)
        assert list(record.metrics) == ["val_loss"]
        assert record.losses == sorted(record.losses)
        assert record.seconds > record.observe_seconds > 0
    assert report.records[0].kept_by_loss is None
    assert report.records[1].kept < 1
    assert report.records[1].kept_by_loss[-1] == 1  # HardHalf drops easy samples only
    assert min(report.records[1].kept_by_loss) < 1
    assert observe.calls == sum(record.steps for record in report.records)
    assert sum(record.observe_seconds for record in report.records) == pytest.approx(observe.seconds)


def test_writes_one_self_contained_page_and_its_pictures(tmp_path):
    sampler = HardHalf(SIZE)
    report = SamplingReport(sampler, tmp_path / "a" / "r.html", labels=DATA.tensors[1], title="A <b> & c")
    fit(sampler, report)
    html = (tmp_path / "a" / "r.html").read_text()
    pictures = {path.stem for path in (tmp_path / "a" / "plots").iterdir()}
    assert pictures == {"kept", "losses", "coverage", "dropped-by-loss", "dropped-by-class", "ess", "staleness"}
    assert html.count("data:image/png;base64,") == len(pictures)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", html)
    assert not re.findall(r"https?:|//|<script|<link|@import|url\(", rest)
    assert "A &lt;b&gt; &amp; c" in rest
    assert savings(report.records, SIZE) in unescape(rest)
    assert all((tmp_path / "a" / "plots" / f"{name}.png").read_bytes().startswith(PNG) for name in pictures)
    assert not list((tmp_path / "a").glob(".*"))


def test_stopping_inside_an_epoch_counts_what_was_trained():
    sampler = Everything(SIZE)
    report = SamplingReport(sampler, None)
    fit(sampler, report, epochs=-1, max_steps=10)
    assert [(record.steps, record.samples) for record in report.records] == [(8, 60), (2, 16)]


@pytest.mark.parametrize("stop", [8, 11, 16])
def test_resumed_run_has_all_epochs(tmp_path, stop):
    def count(records):
        return [(record.epoch, record.planned, record.steps, record.samples) for record in records]

    whole = SamplingReport(HardHalf(SIZE), None)
    fit(whole.sampler, whole)
    sampler = HardHalf(SIZE)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(sampler, SamplingReport(sampler, None), callbacks=[saver])
    sampler = HardHalf(SIZE)
    resumed = SamplingReport(sampler, None)
    fit(sampler, resumed, ckpt_path=tmp_path / f"step={stop}.ckpt", callbacks=[ModelCheckpoint(tmp_path / "other")])
    assert count(resumed.records) == count(whole.records)


def test_state_is_json():
    report = SamplingReport(Everything(SIZE), None)
    fit(report.sampler, report, epochs=2)
    state = json.loads(json.dumps(report.state_dict()))
    other = SamplingReport(Everything(SIZE), None)
    other.load_state_dict(state)
    assert [asdict(record) for record in other.records] == [asdict(record) for record in report.records]


def test_arguments():
    with pytest.raises(TypeError, match=r"SamplingReport\(sampler=list\): a PlannedSampler is needed"):
        SamplingReport([1])
    with pytest.raises(ValueError, match=r"SamplingReport\(labels=\(2,\)\): one label a sample, \(60,\)"):
        SamplingReport(Everything(SIZE), labels=[0, 1])


def test_missing_matplotlib_is_said_at_construction(monkeypatch):
    monkeypatch.setattr("samplewise.callbacks.report.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'samplewise\[report\]'"):
        SamplingReport(Everything(SIZE))
    SamplingReport(Everything(SIZE), None)


def test_missing_matplotlib_is_said_by_a_plot(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'samplewise\[report\]'"):
        figures.lines([Line("a", [0], [1])], x="x", y="y")


def test_kept_by_loss_goes_by_rank():
    losses = np.array([0.0, 0.0, 0.0, 5.0, 1e9, 1.0])
    kept = np.array([False, False, True, True, True, False])
    assert kept_by_loss(losses, kept, bins=3) == [0.0, 0.5, 1.0]
    assert kept_by_loss(losses[:2], kept[:2], bins=3) is None


@pytest.mark.parametrize(("overhead", "words"), [(1.0, "a net saving of 2.0 s"), (6.0, "a net loss of 3.0 s")])
def test_savings_are_net_of_overhead(overhead, words):
    record = EpochRecord(0, 50, 0.5, 1, 1, 1, 0, samples=50, steps=5, seconds=3 + overhead)
    record.plan_seconds = record.observe_seconds = overhead / 2
    text = savings([record], 100)  # 3 s without overhead for half of the samples: 6 s for all of them
    assert "50 of 100 samples (50% fewer)" in text
    assert words in text


def test_plots_leave_the_users_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert figures.dots(["a", "b"], [[1.0, 2.0], [3.0]], [0, 1], x="x").startswith(PNG)
    assert figures.bars(["a"], {"p": [1.0], "q": [2.0]}, x="x").startswith(PNG)
    assert figures.fans({"a": ([], []), "b": ([0], [[0.0, 1, 2, 3, 4]])}, y="y").startswith(PNG)
    assert figures.heat({"a": [None, [0.5, None]]}, y="y", ticks=["1", "2"], bar="b").startswith(PNG)
    curves = [Line("a", [0, 1], [0.1, 0.2], spread=[0.1, 0.1]), Line("b", [1], [0.2], 9, marker="s")]
    assert figures.lines(curves, x="x", y="y", late=True).startswith(PNG)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("x", "labels"),
    [
        ([2, 4], ["2", "2.4", "2.8", "3.2", "3.6", "4"]),
        ([0, 50_000], ["0", "10,000", "20,000"]),
        ([-1, 0.1], ["-0.25", "0"]),
    ],
)
def test_ticks_are_told_apart(monkeypatch, x, labels):
    def texts(figure):
        figure.draw_without_rendering()
        return [label.get_text() for label in figure.axes[0].get_xticklabels()]

    monkeypatch.setattr(figures, "_png", texts)
    found = figures.lines([Line("a", x, [0.1, 0.2])], x="x", y="y")
    assert set(labels) <= set(found)
    assert len(set(found)) == len(found)


def test_a_picture_is_described_by_its_captions_first_sentence():
    html = Page("t", [], [Section("s", [Picture("p", b"x", "At 2.5 bits. More.")])]).html()
    assert 'alt="At 2.5 bits"' in html


def test_page_escapes_all_text():
    bad = '<i>&"'
    parts = [bad, Table([bad], [[bad]]), Picture("p", b"x", bad)]
    html = Page(bad, [bad], [Section(bad, parts)]).html()
    assert "<i>" not in html
    assert html.count("&lt;i&gt;&amp;&quot;") >= 8
