"""SamplingReport: what the sampler did, epoch by epoch, as one self-contained HTML page and PNGs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from samplewise.callbacks.figures import Line, fans, heat, lines
from samplewise.callbacks.page import Page, Picture, Section, Table
from samplewise.loaders import PlannedSampler

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 10
LOOKED_AT = 200_000
OVER_EPOCHS = {
    "kept": ("share kept", True, "Samples planned for the epoch, of all samples."),
    "coverage": ("coverage", True, "Samples seen so far or planned, of all samples."),
    "ess": ("effective sample size", True, "Of the plan's loss weights: 100 % where all weigh the same."),
    "staleness": ("batches", False, "Mean age of the recorded losses when the epoch is planned, in training batches."),
}


@dataclass
class EpochRecord:
    """One epoch, as numbers and lists (JSON).

    Attributes:
        epoch: from 0.
        planned: samples in the plan.
        kept: `planned` over the data set's size.
        coverage, ess, max_weight, staleness: see `Plan.summary`.
        kept_by_loss: share kept of each tenth of the seen samples, ordered by last loss, lowest first; None before any.
        kept_by_class: share kept of each class; None without labels.
        samples: samples trained on, all ranks together.
        steps: optimizer steps.
        seconds: wall-clock without validation, planning and bookkeeping included.
        plan_seconds, observe_seconds: planning; bookkeeping (where a `Stopwatch` measured it, else 0).
        losses: quantiles 5, 25, 50, 75, 95 % of the last losses of all seen samples at the epoch's end.
        metrics: what validation logged in this epoch.
    """

    epoch: int
    planned: int
    kept: float
    coverage: float
    ess: float
    max_weight: float
    staleness: float
    kept_by_loss: list[float] | None = None
    kept_by_class: list[float] | None = None
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    observe_seconds: float = 0.0
    losses: list[float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Counts the seconds spent in a function: `observe = Stopwatch(sampler.observe)`, then call `observe` instead.

    On CUDA it is the time the host is busy: kernels run on.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.seconds = 0.0
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the function."""
        begin = perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += perf_counter() - begin
        self.calls += 1
        return result


class SamplingReport(Callback):
    """Collects one `EpochRecord` an epoch and writes the report when training ends.

    Args:
        sampler: the training loader's sampler.
        path: the HTML file; its pictures go as PNGs into `plots/` beside it. None writes nothing.
        labels: the samples' classes, int `(N,)`: adds what was kept of each class.
        observe: the `Stopwatch` around `sampler.observe`, if bookkeeping is to be timed.
        title: of the page.

    Attributes:
        records: the epochs so far; they are saved in and restored from checkpoints.

    Raises:
        ImportError: matplotlib is missing, and something is to be written.
        TypeError: `sampler` is no PlannedSampler.
        ValueError: `labels` has another length than the data set.
    """

    def __init__(
        self,
        sampler: PlannedSampler,
        path: str | Path | None = "samplewise-report/report.html",
        *,
        labels: Tensor | np.ndarray | Sequence[int] | None = None,
        observe: Stopwatch | None = None,
        title: str = "What the sampler did",
    ):
        if not isinstance(sampler, PlannedSampler):
            raise TypeError(f"SamplingReport(sampler={type(sampler).__name__}): a PlannedSampler is needed")
        if path is not None and find_spec("matplotlib") is None:
            raise ImportError("SamplingReport's plots need matplotlib: pip install 'samplewise[report]'")
        self.sampler, self.path, self.observe, self.title = sampler, path, observe, title
        self.labels = None if labels is None else np.asarray(labels).astype(np.int64)
        if self.labels is not None and self.labels.shape != (sampler.size,):
            raise ValueError(
                f"SamplingReport(labels={self.labels.shape}): one label a sample, ({sampler.size},), is needed"
            )
        self.records: list[EpochRecord] = []
        self._open: EpochRecord | None = None
        self._validated = False
        self._mark = self._paused = self._paused_at = 0.0
        self._observed = 0.0
        self._steps = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark, self._paused, self._steps = perf_counter(), 0.0, trainer.global_step
        self._observed = self.observe.seconds if self.observe else 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._open is not None and self._open.epoch != self.sampler.epoch:  # resumed from an epoch's last batch
            self.records.append(self._open)
            self._open = None
        if self._open is None:  # not in on_train_epoch_start: by now every callback has settled the epoch's plan
            begin = perf_counter()
            self._open = plan_record(self.sampler, self.labels)
            self._paused += perf_counter() - begin

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._open is not None:
            self._open.samples = self.sampler.consumed
            self._count(self._open, trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused += perf_counter() - self._paused_at
        self._validated = self._open is not None

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record, self._open = self._open, None
        if record is None:
            return
        self._count(record, trainer)
        if self._validated:
            metrics = trainer.callback_metrics.items()
            record.metrics = {key: float(value) for key, value in metrics if not key.startswith("samplewise")}
        record.losses = loss_quantiles(self.sampler)
        self.records.append(record)
        self._validated, self._mark = False, perf_counter()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path is not None and trainer.is_global_zero and self.records:
            self.page().write(self.path)

    @override
    def state_dict(self) -> dict[str, Any]:
        records = [asdict(record) for record in self.records]
        return {"version": 1, "records": records, "open": self._open and asdict(self._open)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [EpochRecord(**record) for record in state_dict["records"]]
        self._open = state_dict["open"] and EpochRecord(**state_dict["open"])

    def _count(self, record: EpochRecord, trainer: Trainer) -> None:
        """Add the time, steps and bookkeeping since it was last called."""
        now, observed = perf_counter(), self.observe.seconds if self.observe else 0.0
        record.seconds += now - self._mark - self._paused
        record.observe_seconds += observed - self._observed
        record.steps += trainer.global_step - self._steps
        self._mark, self._paused, self._observed, self._steps = now, 0.0, observed, trainer.global_step

    def page(self) -> Page:
        """The report on the epochs so far."""
        table = Section("Epoch by epoch", [epoch_table(self.records)])
        sections = run_sections({type(self.sampler).__name__: self.records})
        return Page(self.title, [savings(self.records, self.sampler.size)], [table, *sections])


def plan_record(sampler: PlannedSampler, labels: np.ndarray | None = None) -> EpochRecord:
    """The record of the current epoch before it is trained on."""
    plan, ledger = sampler.current_plan, sampler.ledger
    summary = plan.summary(ledger)
    kept = np.zeros(sampler.size, dtype=bool)
    ids = plan.ids
    kept[slice(ids.start, ids.stop, ids.step) if isinstance(ids, range) else ids] = True
    by_class = None
    if labels is not None:
        by_class = (np.bincount(labels, weights=kept) / np.maximum(np.bincount(labels), 1)).tolist()
    return EpochRecord(
        epoch=sampler.epoch,
        planned=len(plan),
        kept=summary["kept"],
        coverage=summary["coverage"],
        ess=summary["ess"],
        max_weight=summary["max_weight"],
        staleness=summary["staleness"],
        kept_by_loss=kept_by_loss(*_seen_losses(sampler, kept)),
        kept_by_class=by_class,
        plan_seconds=sampler.plan_seconds,
    )


def kept_by_loss(losses: np.ndarray, kept: np.ndarray, bins: int = BINS) -> list[float] | None:
    """Share kept of each of `bins` equal parts of the samples, ordered by loss; None with fewer samples than bins.

    Args:
        losses: `(M,)`.
        kept: bool `(M,)`.
        bins: number of parts.
    """
    if len(losses) < bins:
        return None
    ranks = np.argsort(np.argsort(losses, kind="stable"))
    part = ranks * bins // len(losses)
    shares: list[float] = (np.bincount(part, weights=kept) / np.bincount(part)).tolist()
    return shares


def loss_quantiles(sampler: PlannedSampler) -> list[float] | None:
    """The `QUANTILES` of the last losses of all seen samples (of every n-th one in large data sets)."""
    losses, _ = _seen_losses(sampler, np.ones(sampler.size, dtype=bool))
    return np.quantile(losses, QUANTILES).tolist() if len(losses) else None


def _seen_losses(sampler: PlannedSampler, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    every = -(-sampler.size // LOOKED_AT)
    losses = sampler.ledger.column("loss_last")[::every].cpu().numpy()
    seen = np.isfinite(losses)
    return losses[seen], kept[::every][seen]


def savings(records: Sequence[EpochRecord], size: int) -> str:
    """In a sentence: samples, steps and seconds saved against training on everything in as many epochs, net."""
    full, used = size * len(records), sum(record.samples for record in records)
    seconds = sum(record.seconds for record in records)
    planning, bookkeeping = (sum(getattr(r, key) for r in records) for key in ("plan_seconds", "observe_seconds"))
    whole = (seconds - planning - bookkeeping) * full / max(used, 1)
    net = whole - seconds
    return (
        f"Trained on {used:,} of {full:,} samples ({1 - used / full:.0%} fewer) in {len(records)} epochs and "
        f"{sum(record.steps for record in records):,} steps. At this run's speed the full epochs would have taken "
        f"about {whole:.1f} s; this run took {seconds:.1f} s, of which planning {planning:.2f} s and bookkeeping "
        f"{f'{bookkeeping:.2f} s' if bookkeeping else '(not measured: no Stopwatch was given)'}: "
        f"{'a net saving' if net >= 0 else 'a net loss'} of {abs(net):.1f} s."
    )


def epoch_table(records: Sequence[EpochRecord]) -> Table:
    """The records as rows."""
    metrics = sorted({key for record in records for key in record.metrics})
    header = ["epoch", "kept", "samples", "steps", "coverage", "ESS", "max weight", "staleness", "s", "planning (ms)"]
    rows = [
        [
            str(r.epoch), f"{r.kept:.1%}", f"{r.samples:,}", f"{r.steps:,}", f"{r.coverage:.1%}", f"{r.ess:.3f}",
            f"{r.max_weight:.2f}", f"{r.staleness:.1f}", f"{r.seconds:.2f}", f"{1e3 * r.plan_seconds:.1f}",
            *(f"{r.metrics[key]:.4f}" if key in r.metrics else "" for key in metrics),
        ]
        for r in records
    ]  # fmt: skip
    return Table([*header, *metrics], rows)


def run_sections(runs: Mapping[str, Sequence[EpochRecord]], note: str = "") -> list[Section]:
    """The sections on what was kept, covered, weighted and learnt, in one run or in several side by side.

    Args:
        runs: name -> its epochs.
        note: said under each picture.
    """
    kept, coverage, ess, staleness = (_over_epochs(runs, key, note) for key in OVER_EPOCHS)
    return [
        Section("Kept share by epoch", [kept]),
        _losses(runs, note),
        Section("Coverage", [coverage]),
        _dropped(runs, note),
        Section("Weights and staleness", [ess, staleness]),
    ]


def _over_epochs(runs: Mapping[str, Sequence[EpochRecord]], key: str, note: str) -> Picture:
    label, share, caption = OVER_EPOCHS[key]
    curves = [
        Line(name, [r.epoch for r in records], [getattr(r, key) for r in records], colour=index)
        for index, (name, records) in enumerate(runs.items())
    ]
    png = lines(curves, x="epoch", y=label, epochs=True, share=share)
    return Picture(key, png, f"{caption} {note}".strip())


def _losses(runs: Mapping[str, Sequence[EpochRecord]], note: str) -> Section:
    panels = {}
    for name, records in runs.items():
        known = [(record.epoch, record.losses) for record in records if record.losses]
        panels[name] = ([epoch for epoch, _ in known], [losses for _, losses in known])
    caption = "Last loss of every sample seen so far, at each epoch's end; a dropped sample keeps its old one."
    png = fans(panels, y="loss")
    return Section("Loss distribution by epoch", [Picture("losses", png, f"{caption} {note}".strip())])


def _dropped(runs: Mapping[str, Sequence[EpochRecord]], note: str) -> Section:
    tenths = [f"{low}-{low + BINS} %" for low in range(0, 100, BINS)]
    by_loss = {name: [record.kept_by_loss for record in records] for name, records in runs.items()}
    png = heat(by_loss, y="samples by last loss, lowest first", ticks=tenths, bar="share kept")
    caption = "Share kept of each tenth of the samples, ordered by last loss; the first epoch has no losses to go by."
    parts = [Picture("dropped-by-loss", png, f"{caption} {note}".strip())]
    by_class = {name: [record.kept_by_class for record in records] for name, records in runs.items()}
    counts = [len(row) for table in by_class.values() for row in table if row is not None]
    if counts:
        png = heat(by_class, y="class", ticks=[str(label) for label in range(max(counts))], bar="share kept")
        parts.append(Picture("dropped-by-class", png, f"Share kept of each class. {note}".strip()))
    return Section("What was dropped", parts)
