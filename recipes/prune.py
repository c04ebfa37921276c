"""Curriculum pruning in a Lightning training run: fewer samples for the same result, or not, with the controls to tell.

    python -m samplewise.recipes.prune                       # Fashion-MNIST, 3 seeds, about 3 minutes on 2 CPU cores
    samplewise run prune --accelerator gpu --train_size 0 --epochs 30 --batch_size 512 --lr 0.2

Trains the same network with each method (uniform sampling of everything, RS2, InfoBatch, SeTa) from the same initial
weights, seed by seed, and then controls: uniform sampling and RS2 for as many optimizer steps as each pruning method
took, at the same learning rates step for step. Writes `results.json`, `runs.csv`, `summary.csv`, `report.html` and
`plots/*.png` into `--out`, and prints a table: accuracy (mean, sd), samples and steps used, seconds, with planning and
bookkeeping apart.

`Classifier` and `train` are an ordinary training script: delete the lines marked `# samplewise` and it still is one.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from typing_extensions import override

from samplewise.callbacks import SamplingCallback  # samplewise
from samplewise.callbacks.report import SamplingReport, Stopwatch
from samplewise.cuda_ext import sample_losses  # samplewise
from samplewise.loaders import collate_with_ids, with_ids  # samplewise
from samplewise.plugins.clustering import BINS
from samplewise.recipes.arms import Arm, make_sampler, make_schedule, plan_arms
from samplewise.recipes.common import Rule, check_options, surroundings
from samplewise.recipes.data import Task, as_is, load_task
from samplewise.recipes.models import build
from samplewise.recipes.progress import Bars
from samplewise.recipes.results import Run, write_results

Method = Literal["uniform", "rs2", "infobatch", "seta"]
Control = Literal["uniform", "rs2"]


@dataclass
class PruneOptions:
    """What to compare, on what, and how.

    Args:
        data: auto (fashion_mnist, else nycflights), fashion_mnist, nycflights, digits, a folder, or a hub name
        train_size: training samples to use, drawn by class share; 0 uses all
        label_noise: share of the training labels that are made wrong, in [0, 1)
        methods: what is compared
        controls: methods that train again for as many optimizer steps as each pruning method; [] for none
        epochs: epochs of each run
        seeds: number of repeats; repeat s uses seed s for every method's weights and order
        batch_size: samples in a batch, on each device
        lr: highest learning rate, of SGD with momentum and gradients clipped at norm 1 (without, one of some 80 runs
            collapsed at the end of the warm-up); warm-up over 5 % of the budget, then a cosine down to 0
        model: auto (small CNN for images, MLP with embeddings for tables), cnn or mlp
        rs2_ratio: RS2: share of the data in an epoch, in (0, 1]
        infobatch_prune: InfoBatch: chance of dropping a sample below the mean loss, in [0, 1)
        seta_prune: SeTa: share dropped at random before grouping, in [0, 1)
        seta_groups: SeTa: number of groups of equal difficulty
        seta_window: SeTa: share of the groups that an epoch trains on, in (0, 1]
        anneal_from: InfoBatch, SeTa: share of the epochs after which nothing is chosen by loss any more, in [0, 1]
        accelerator: cpu, gpu, mps or auto
        devices: number of devices; several train together (DDP)
        precision: as Lightning calls it, for example 32-true or bf16-mixed
        workers: processes that load data; the data is in memory, so that 0 is fastest on a CPU
        threads: threads of torch on the CPU; 0 leaves torch's choice. More than 1 pay for large models on an idle
            machine; small ones spend the time waiting for each other as soon as anything else runs
        out: folder for the results
    """

    data: str = "auto"
    train_size: int = 20_000
    label_noise: float = 0.0
    methods: list[Method] = field(default_factory=lambda: list(get_args(Method)))
    controls: list[Control] = field(default_factory=lambda: list(get_args(Control)))
    epochs: int = 10
    seeds: int = 3
    batch_size: int = 128
    lr: float = 0.1
    model: Literal["auto", "cnn", "mlp"] = "auto"
    rs2_ratio: float = 0.5
    infobatch_prune: float = 0.5
    seta_prune: float = 0.1
    seta_groups: int = 10
    seta_window: float = 0.9
    anneal_from: float = 0.875
    accelerator: Literal["cpu", "gpu", "mps", "auto"] = "cpu"
    devices: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    workers: int = 0
    threads: int = 1
    out: str = "runs/prune"

    def validate(self) -> None:
        """Check all options.

        Raises:
            ValueError: one line for each option that breaks its rule.
        """
        rules: list[Rule] = [
            ("train_size", self.train_size >= 0, "is a number of samples, 0 for all"),
            ("label_noise", 0 <= self.label_noise < 1, "is a share and must be in [0, 1)"),
            ("methods", bool(self.methods), f"needs at least one of {', '.join(get_args(Method))}"),
            ("methods", len(set(self.methods)) == len(self.methods), "names a method twice"),
            ("controls", len(set(self.controls)) == len(self.controls), "names a method twice"),
            ("methods", set(self.methods) <= set(get_args(Method)), f"there are {', '.join(get_args(Method))}"),
            ("controls", set(self.controls) <= set(get_args(Control)), f"there are {', '.join(get_args(Control))}"),
            ("epochs", self.epochs >= 1, "must be >= 1"),
            ("batch_size", self.batch_size >= 1, "must be >= 1"),
            ("lr", self.lr > 0, "must be > 0"),
            ("model", self.model != "cnn" or self.data != "nycflights", "a table needs auto or mlp"),
            ("rs2_ratio", 0 < self.rs2_ratio <= 1, "is the share of the data in an epoch and must be in (0, 1]"),
            ("infobatch_prune", 0 <= self.infobatch_prune < 1, "is a chance of being dropped and must be in [0, 1)"),
            ("seta_prune", 0 <= self.seta_prune < 1, "is a share of the data and must be in [0, 1)"),
            ("seta_groups", 1 <= self.seta_groups <= BINS, f"must be in [1, {BINS}]"),
            ("seta_window", 0 < self.seta_window <= 1, "is a share of the groups and must be in (0, 1]"),
            ("anneal_from", 0 <= self.anneal_from <= 1, "is a share of the epochs and must be in [0, 1]"),
            ("devices", self.devices >= 1, "must be >= 1"),
            ("workers", self.workers >= 0, "must be >= 0"),
            ("threads", self.threads >= 0, "must be >= 0; 0 leaves torch's choice"),
        ]
        check_options(self, rules)


class Classifier(LightningModule):
    """Cross-entropy, SGD with momentum, and a metric over the whole test set."""

    def __init__(
        self,
        network: nn.Module,
        options: PruneOptions,
        metric: str,
        sampler: Any,
        observe: Callable[..., Tensor],
        ends: Sequence[int],
    ):
        super().__init__()
        self.network, self.options, self.metric = network, options, metric
        self.sampler, self.observe = sampler, observe  # samplewise
        self.ends = ends  # samplewise
        self.outputs: list[tuple[Tensor, Tensor]] = []

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, batch = batch  # samplewise
        x, y = batch
        logits = self.network(x)
        loss = F.cross_entropy(logits, y)
        losses, norms = sample_losses(logits, y)  # samplewise
        loss = self.observe(ids, losses, scores=norms)  # samplewise
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.outputs.append((self.network(x).float(), y))

    @override
    def on_validation_epoch_end(self) -> None:
        gathered: Any = self.all_gather([torch.cat(parts) for parts in zip(*self.outputs, strict=True)])
        logits, y = (part.cpu() for part in gathered)
        self.outputs.clear()
        score = accuracy if self.metric == "accuracy" else auc
        self.log(f"val_{self.metric}", score(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), self.options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule: Any = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        schedule = make_schedule(optimizer, self.sampler, self.options.epochs, self.ends)  # samplewise
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    task: Task,
    options: PruneOptions,
    seed: int,
    *,
    ends: Sequence[int] = (),
    callbacks: Sequence[Callback] = (),
    sampler: Any = None,
    observe: Any = None,
) -> float:
    """Train one network for `options.epochs` epochs and give the metric at the end.

    With `ends`, the steps that a method had taken at the end of each epoch, train a control: for as many steps, at the
    same learning rates; the metric is then measured at the end only.
    """
    steps = ends[-1] if ends else 0
    torch.manual_seed(seed)
    network = build(task, options.model)
    loading: dict[str, Any] = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    train_loader: Any = DataLoader(task.train, options.batch_size, shuffle=True, collate_fn=as_is, **loading)
    loading |= {"sampler": sampler, "collate_fn": collate_with_ids(as_is)}  # samplewise
    train_loader = DataLoader(with_ids(task.train), options.batch_size, **loading)  # samplewise
    test_loader: Any = DataLoader(task.test, 1000, collate_fn=as_is)
    callbacks = list(callbacks)
    callbacks.insert(0, SamplingCallback(sampler))  # samplewise
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,
        max_epochs=-1 if steps else options.epochs,
        max_steps=steps or -1,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = Classifier(network, options, task.metric, sampler, observe, ends)
    trainer.fit(module, train_loader, None if steps else test_loader)
    return float(trainer.validate(module, test_loader, verbose=False)[0][f"val_{task.metric}"])


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows of logits `(B, C)` whose largest is at `y`, int64 `(B,)`."""
    return (logits.argmax(1) == y).float().mean()


def auc(logits: Tensor, y: Tensor) -> Tensor:
    """Area under the ROC curve of two-class logits `(B, 2)`: the rank statistic, ties counted half; NaN for one class.

    >>> float(auc(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 1, 0])))
    0.75
    """
    _, group, count = np.unique((logits[:, 1] - logits[:, 0]).numpy(), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[group]
    positive = y.numpy() == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return torch.tensor(float("nan"))
    return torch.tensor((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros), dtype=torch.float32)


def run(options: PruneOptions) -> dict[str, Any]:
    """Train all arms with all seeds, write the results, print the table; gives what `results.json` holds.

    Raises:
        ValueError: wrong options, all of them at once.
        AssetError: the data could not be had.
    """
    options.validate()
    with surroundings(options.threads):
        begin, first = perf_counter(), getattr(rank_zero_only, "rank", 0) == 0
        task = load_task(
            options.data,
            train_size=options.train_size,
            label_noise=options.label_noise,
            say=print if first else lambda line: None,
        )
        arms = plan_arms(options.methods, options.controls)
        runs: list[Run] = []
        with Bars(len(arms) * options.seeds, quiet=not first) as bars:
            bars.say(f"{task.name}: {len(task.train):,} samples to train on, {len(task.test):,} to test on")
            for seed in range(options.seeds):
                for arm in arms:
                    runs.append(_run(arm, seed, task, options, runs, bars))
                    bars.finish(runs[-1].line(options.epochs * len(task.train), task.metric))
        return write_results(runs, arms, task, options, perf_counter() - begin, console=bars.console, write=first)


def _run(arm: Arm, seed: int, task: Task, options: PruneOptions, before: Sequence[Run], bars: Bars) -> Run:
    ends = next((run.ends for run in before if (run.arm.name, run.seed) == (arm.equal_to, seed)), [])
    sampler = make_sampler(arm, len(task.train), seed, options, ends[-1] if ends else 0)
    observe = Stopwatch(sampler.observe)
    report = SamplingReport(sampler, None, labels=task.train.y, observe=observe)
    callbacks = [report, bars.begin(f"seed {seed}: {arm.label}")]
    score = train(task, options, seed, ends=ends, callbacks=callbacks, sampler=sampler, observe=observe)
    return Run(arm, seed, score, report.records)


if __name__ == "__main__":
    from samplewise.recipes.cli import run_command

    sys.exit(run_command(["prune", *sys.argv[1:]]))
