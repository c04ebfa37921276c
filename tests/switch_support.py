"""A small quantized model in Lightning and what its trainings do, for tests of switched bit widths.

``python switch_support.py JOB FOLDER`` runs one of JOBS, as ``lightning_support.py`` does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning_support import SaveEveryStep
from torch import nn
from torch.utils.data import DataLoader

from samplewise.callbacks import SwitchBits
from samplewise.plugins import BitSchedule, add_adapters, quantize_model
from samplewise.plugins.bit_adapters import find_layers, get_bits

WIDTH = 32
PERIOD = 4
BATCHES = 10
torch.set_num_threads(1)


def small(seed=0, bits=(2, 3, 4)):
    """Three quantized layers with adapters that do something, and the layers' names."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
        )
        layers = quantize_model(model, bits=bits, group_size=32)
        wrapped = add_adapters(model, rank=2, seed=seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return wrapped, layers


class Traced(BitSchedule):
    """Also writes down what is recorded: ``(step, loss, scores)``."""

    def __init__(self, **settings):
        super().__init__(**{"period": PERIOD, **settings})
        self.recorded: list[tuple[int, float | None, dict[str, float] | None]] = []

    def record(self, step, *, loss=None, scores=None):
        super().record(step, loss=loss, scores=scores)
        norms = None if scores is None else {name: float(value) for name, value in scores.items()}
        self.recorded.append((step, None if loss is None else float(loss), norms))


def adapters(model) -> dict[tuple[str, str], list[torch.Tensor]]:
    """Copies of all adapters by (layer, adapter)."""
    return {
        (name, adapter): [p.detach().clone() for p in parameters]
        for name, site in find_layers(model).items()
        for adapter, parameters in site.adapters.items()
    }


def moved(before, after) -> set[tuple[str, str]]:
    """The adapters that are not bit-identical."""
    return {key for key, values in before.items() if not all(map(torch.equal, values, after[key]))}


def in_use(config) -> set[tuple[str, str]]:
    """The adapters of a configuration."""
    return {(name, f"bits{width}") for name, width in config.items()}


class Module(LightningModule):
    """Its data depend on epoch, batch and rank alone; writes down what happens.

    Attributes:
        batches: (optimizer step, widths, loss) of each training batch.
        moved: the adapters that each optimizer step changed.
        pinned: (loop, loader, widths) of each batch of an evaluation.
    """

    def __init__(self, model, *, optimizer="adamw", set_to_none=True, bad=()):
        super().__init__()
        self.model, self.optimizer, self.set_to_none, self.bad = model, optimizer, set_to_none, bad
        self.batches: list[tuple[int, tuple[int, ...], float]] = []
        self.before: Any = None
        self.moved: list[set[tuple[str, str]]] = []
        self.pinned: list[tuple[str, int, tuple[int, ...]]] = []

    def widths(self):
        return tuple(get_bits(self.model).values())

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(1000 * self.current_epoch + 10 * batch_idx + self.global_rank)
        loss = self.model(torch.randn(4, WIDTH, generator=generator)).square().mean()
        if len(self.batches) in self.bad:
            loss = loss * float("nan")
        self.batches.append((self.global_step, self.widths(), float(loss.detach())))
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.before = adapters(self.model)

    def on_train_batch_end(self, *args):
        if self.before is not None:
            self.moved.append(moved(self.before, adapters(self.model)))
            self.before = None

    def _evaluate(self, batch, batch_idx, dataloader_idx=0):
        self.pinned.append((self.trainer.state.stage.value, dataloader_idx, self.widths()))

    validation_step = test_step = predict_step = _evaluate

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=self.set_to_none)


class Memory(Logger):
    """Keeps the metrics that are logged, by step."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)


def loader(batches: int = BATCHES) -> DataLoader:
    """Numbers: the data are the module's own."""
    return DataLoader(range(batches), batch_size=1)


def trainer(*callbacks: Callback, **settings) -> Trainer:
    """A quiet one."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **settings}, callbacks=list(callbacks))


def fit(*more: Callback, model=None, evaluate=None, val=None, batches=BATCHES, ckpt_path=None, **settings):
    """Train and give back the module and its schedule; settings of Module and Traced go to these."""
    own = {key: settings.pop(key) for key in ("optimizer", "set_to_none", "bad") if key in settings}
    drawn = {key: settings.pop(key) for key in ("mapping", "period", "seed", "ema") if key in settings}
    model, layers = model or small()
    module, schedule = Module(model, **own), Traced(layers=layers, **drawn)
    run = trainer(SwitchBits(schedule, evaluate=evaluate), *more, **settings)
    run.fit(module, loader(batches), val, ckpt_path=ckpt_path, weights_only=True)
    return module, schedule


def history(module: Module, schedule: Traced) -> dict[str, Any]:
    """What a run did and where it ended, for comparing runs bit for bit."""
    return {
        "batches": module.batches,
        "moved": module.moved,
        "recorded": schedule.recorded,
        "state": json.dumps(schedule.state_dict()),
        "weights": weights(module.model),
    }


def weights(model) -> bytes:
    """All adapters, bit for bit."""
    return b"".join(p.numpy().tobytes() for values in adapters(model).values() for p in values)


def by_step(batches) -> dict[int, list[float]]:
    """The losses of each optimizer step's batches."""
    steps: dict[int, list[float]] = {}
    for step, _, loss in batches:
        steps.setdefault(step, []).append(loss)
    return steps


def ddp(folder: Path) -> None:
    """Train under DDP with checkpoints, resume in the middle of the second epoch; also with draws by gradients."""
    settings: dict[str, Any] = {"devices": int(os.environ["WORLD"]), "strategy": "ddp_find_unused_parameters_true"}
    settings |= {"accumulate_grad_batches": 2, "max_epochs": 2, "batches": 5 * settings["devices"]}
    result = {}
    for mapping in ("maxent", "grad_norm"):
        save = SaveEveryStep(folder / mapping)
        result[mapping] = history(*fit(save, mapping=mapping, **settings))
        path = folder / mapping / "on_train_batch_end-007.ckpt"
        result[f"{mapping} resumed"] = history(*fit(mapping=mapping, ckpt_path=path, **settings))
    try:
        fit(**{**settings, "strategy": "ddp"})
    except RuntimeError as error:
        result["refused"] = str(error)
    torch.save(result, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


JOBS = {"ddp": ddp}

if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]))
