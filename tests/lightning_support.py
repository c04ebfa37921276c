"""A tiny Lightning model, trainers, and runs in processes of their own; importable in spawned processes too.

``python lightning_support.py JOB FOLDER`` runs one of JOBS; under ``strategy="ddp"`` Lightning starts it again for
each further rank.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from samplewise.callbacks import BudgetSchedule, SamplingCallback
from samplewise.loaders import PlannedSampler, with_ids
from support import HardHalf, loss_of

LENGTHS = [8, 5, 3, 7]
BATCH = 4

QUIET = [
    pytest.mark.filterwarnings(f"ignore:.*{message}")
    for message in (
        "LeafSpec",
        "no `val_dataloader`",
        "dataloader is not resumable",
        "smaller than the logging interval",
        "Checkpoint directory .* exists",
        r"`.fit\(ckpt_path=None\)`",
        r"\.fit\(ckpt_path=\"last\"\) is set",
        "'set_vital' is deprecated",
    )
]
"""``pytestmark`` for tests that train: what Lightning and torchdata warn of in so small runs."""

torch.set_num_threads(1)


class Figures(Logger):
    """Keeps the metrics whose names begin with ``prefix``, without it, as (step, metrics)."""

    name, version = "figures", 0

    def __init__(self, prefix: str = ""):
        super().__init__()
        self.prefix, self.rows = prefix, []

    def log_metrics(self, metrics, step=None):
        found = {
            name.removeprefix(self.prefix): value for name, value in metrics.items() if name.startswith(self.prefix)
        }
        if found:
            self.rows.append((step, found))

    def log_hyperparams(self, *args):
        pass


class Rows(Dataset):
    """Row i is ((x_i, y_i)), all its own."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([float(np.sin(index)), 1.0]), torch.tensor(float(np.cos(3 * index)))


class Model(LightningModule):
    """Writes down what happens: the ids of each batch by epoch, and events such as ``val`` and ``step``.

    ``fixed``: losses are a function of id and step, not of the model (Lightning does not save accumulated gradients).
    """

    def __init__(
        self,
        sampler: PlannedSampler,
        *,
        manual: bool = False,
        fixed: bool = False,
        schedule: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.sampler, self.schedule, self.fixed = sampler, schedule, fixed
        self.net = nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.net.weight, 0.1)
        self.automatic_optimization = not manual
        self.batches: dict[int, list[list[int]]] = {}
        self.events: list[tuple[Any, ...]] = []
        self.rates: list[float] = []

    def losses(self, batch):
        ids, (x, y) = batch
        return ids, (self.net(x).squeeze(-1) - y) ** 2

    def training_step(self, batch, batch_idx):
        ids, losses = self.losses(batch)
        if self.fixed:
            losses = losses * 0 + loss_of(ids, self.sampler.step)
        self.batches.setdefault(self.current_epoch, []).append(ids.tolist())
        loss = self.sampler.observe(ids, losses)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.events.append(("step", self.current_epoch))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():  # so that only `recording` keeps the ledger clean
            loss = self.sampler.observe(*self.losses(batch)).detach()
        self.log("val_loss", loss, batch_size=BATCH, sync_dist=True)

    def on_validation_start(self):
        self.events.append(("sanity" if self.trainer.sanity_checking else "val", self.current_epoch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        if self.schedule is None:
            return optimizer
        settings = dict(self.schedule)
        interval = settings.pop("interval", "step")
        schedule = BudgetSchedule(optimizer, self.sampler, **settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    def count(self, event: str) -> list[int]:
        """How often it happened in each epoch that was trained on."""
        return [self.events.count((event, epoch)) for epoch in sorted(self.batches)]

    def served(self) -> list[int]:
        """Batches of each epoch."""
        return [len(self.batches[epoch]) for epoch in sorted(self.batches)]


class SaveEveryStep(Callback):
    """A checkpoint at every turn of the given hook."""

    def __init__(self, folder: Path, hook: str = "on_train_batch_end"):
        self.folder, self.hook = folder, hook

    def _save(self, trainer):
        trainer.save_checkpoint(self.folder / f"{self.hook}-{trainer.fit_loop.total_batch_idx + 1:03d}.ckpt")

    def on_train_batch_end(self, trainer, *args):
        if self.hook == "on_train_batch_end":
            self._save(trainer)

    def on_validation_end(self, trainer, *args):
        if self.hook == "on_validation_end" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer, *args):
        if self.hook == "on_train_epoch_end":
            self._save(trainer)


def loader(sampler: PlannedSampler, *, workers: int = 0, persistent: bool = False, batch: int = BATCH) -> DataLoader:
    """The training loader."""
    return DataLoader(
        with_ids(Rows(sampler.size)),
        batch_size=batch,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=persistent,
    )


def validation(size: int = 2 * BATCH) -> DataLoader:
    """A validation loader of two batches."""
    return DataLoader(with_ids(Rows(size)), batch_size=BATCH)


def trainer(sampler: PlannedSampler, *more: Callback, before: tuple[Callback, ...] = (), **settings) -> Trainer:
    """A quiet trainer with the callback."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**quiet, **settings}, callbacks=[*before, SamplingCallback(sampler), *more])


def fit(
    sampler: PlannedSampler, *more: Callback, kind=Model, train=None, val=None, ckpt_path=None, **settings
) -> Model:
    """Train a Model and give it back; settings that the Model takes go to it, the others to the Trainer."""
    own = {key: settings.pop(key) for key in ("manual", "fixed", "schedule") if key in settings}
    of_loader = {key: settings.pop(key) for key in ("workers", "persistent") if key in settings}
    model = kind(sampler, **own)
    run = trainer(sampler, *more, **settings)
    run.fit(
        model, loader(sampler, **of_loader) if train is None else train, val, ckpt_path=ckpt_path, weights_only=True
    )
    return model


def ledger_bytes(sampler: PlannedSampler) -> bytes:
    """The ledger, bit for bit."""
    return sampler.ledger.records.numpy().tobytes()


def history(model: Model) -> dict[str, Any]:
    """What a run did and where it ended, for comparing runs bit for bit."""
    sampler = model.sampler
    return {
        "ids": [batch for epoch in sorted(model.batches) for batch in model.batches[epoch]],
        "served": model.served(),
        "events": model.events,
        "ledger": ledger_bytes(sampler),
        "position": (sampler.epoch, sampler.consumed, sampler.step),
        "weight": model.net.weight.detach().numpy().tobytes(),
        "rates": model.rates,
    }


def resume_all(folder: Path) -> None:
    """Resume from each checkpoint in the folder in turn and save the histories."""
    settings = torch.load(folder / "settings.pt")
    results = {}
    for path in sorted(folder.glob("*.ckpt")):
        model = fit(HardHalf(settings["size"]), ckpt_path=path, val=validation(), **settings["fit"])
        results[path.name] = history(model)
    torch.save(results, folder / "resumed.pt")


def run_job(job: str, folder: Path, *, world: int = 1, timeout: float = 240, script: str = __file__) -> str:
    """Run a script's job in a new process (under DDP, in ``world`` of them) and give what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD": str(world)}
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, script, job, str(folder)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{job} hung: {process.communicate()[0][-4000:]}") from None
    assert process.returncode == 0, output[-6000:]
    return output


class Traced(Model):
    """Also writes down each epoch's plan, what is recorded, and the ledger that each rank would save at each step."""

    def __init__(self, sampler: PlannedSampler, **settings):
        super().__init__(sampler, **settings)
        self.plans: dict[int, list[int]] = {}
        self.pairs: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.saved: list[bytes] = []

    def training_step(self, batch, batch_idx):
        self.plans[self.current_epoch] = self.sampler.current_plan.ids.tolist()
        ids, losses = self.losses(batch)
        self.pairs.append((self.sampler.step, ids, losses.detach().clone()))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        (callback,) = (one for one in self.trainer.callbacks if isinstance(one, SamplingCallback))
        self.saved.append(callback.state_dict()["sampler"]["ledger"]["records"].numpy().tobytes())


class OwnBatches(BatchSampler):
    """Some batch sampler of the user's."""


def ddp(folder: Path) -> None:
    """Under DDP: train with checkpoints at every step, resume from them, try a loader that Lightning rebuilds."""
    world, size = int(os.environ["WORLD"]), 29
    settings = {"strategy": "ddp", "devices": world, "max_epochs": 3, "val_check_interval": 0.5}
    sampler = HardHalf(size)
    model = fit(sampler, SaveEveryStep(folder), kind=Traced, val=validation(), **settings)
    result = {"whole": history(model), "plans": model.plans, "pairs": model.pairs, "saved": model.saved, "resumed": {}}
    result["batches"] = model.batches
    for path in sorted(folder.glob("*.ckpt"))[:: 2 * world - 3]:
        again = fit(HardHalf(size), val=validation(), ckpt_path=path, **settings)
        result["resumed"][path.name] = history(again)
    for path in sorted(folder.glob("alone/*.ckpt")):
        result["resumed alone"] = fit(HardHalf(size), val=validation(), ckpt_path=path, **settings).batches
    sampler = HardHalf(size)
    rebuilt = DataLoader(with_ids(Rows(size)), batch_sampler=OwnBatches(sampler, BATCH, False))
    try:
        fit(sampler, train=rebuilt, **settings)
    except RuntimeError as error:
        result["error"] = str(error)
    torch.save(result, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


class Sharded(Traced):
    """Its parameters are sharded over the ranks (FSDP2, the one that runs without a GPU)."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self.net, "unshard"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fsdp(folder: Path) -> None:
    """Under FSDP: train with checkpoints at every step, and resume from some."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def run(*more: Callback, ckpt_path: Path | None = None) -> Model:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        settings = {"strategy": strategy, "devices": 2, "max_epochs": 3}
        return fit(HardHalf(29), *more, kind=Sharded, ckpt_path=ckpt_path, **settings)

    model = run(SaveEveryStep(folder))
    result = {"whole": sharded_history(model), "plans": model.plans, "batches": model.batches, "resumed": {}}
    for step in (2, 5):
        again = run(ckpt_path=folder / f"on_train_batch_end-{step:03d}.ckpt")
        result["resumed"][step] = sharded_history(again)
    torch.save(result, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


def sharded_history(model: Model) -> dict[str, Any]:
    """As :func:`history`, of a model whose parameters are in parts."""
    model.net.weight = torch.nn.Parameter(model.net.weight.full_tensor().detach())
    return history(model)


def negatives(folder: Path) -> None:
    """Under DDP: hard negatives that are mined anew each epoch, then a run resumed in the middle."""
    import negatives_support as retrieval

    from samplewise.callbacks import RefreshHardNegatives
    from samplewise.plugins import Uniform

    def run(table: Path, *more: Callback, ckpt_path: Path | None = None) -> tuple[Any, RefreshHardNegatives]:
        sampler = Uniform(len(retrieval.QUERIES), seed=1)
        data = retrieval.dataset(table, sampler)
        model = retrieval.Encoder(sampler)
        callback = RefreshHardNegatives(data, model.encode, every_n_epochs=1, top_k=5, progress=False)
        settings = {"strategy": "ddp", "devices": int(os.environ["WORLD"]), "max_epochs": 2}
        trainer(sampler, callback, *more, **settings).fit(
            model, retrieval.loader(data, sampler), ckpt_path=ckpt_path, weights_only=True
        )
        return model, callback

    model, callback = run(folder / "table", SaveEveryStep(folder))
    weights = model.words.weight.detach().clone()
    again, _ = run(folder / "table", ckpt_path=folder / "on_train_batch_end-002.ckpt")
    result = {"versions": [row["version"] for row in callback.history], "weights": weights.numpy().tobytes()}
    result |= {"resumed": again.words.weight.detach().numpy().tobytes(), "ids": [ids for _, ids, _ in model.seen[:3]]}
    torch.save(result, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


JOBS = {"resume_all": resume_all, "ddp": ddp, "fsdp": fsdp, "negatives": negatives}

if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]))
