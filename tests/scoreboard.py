"""Every training loop over every kind of data: who trains on what, where its losses land, and where a resumed run goes.

A sample is its own row's number, and its loss a function of that content, not of the id that comes with the batch.
Shards hold equally many planned samples, so that streams end at the same time on all ranks.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.multiprocessing as mp
import transformers
import webdataset as wds
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from lightning_support import SaveEveryStep
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from samplewise.callbacks import SamplingCallback
from samplewise.callbacks.huggingface import attach
from samplewise.loaders import Plan, PlannedSampler, with_ids
from samplewise.loaders.resumable import Resumable
from samplewise.loaders.streams import KeyIndex, keep
from support import loss_of

LOOPS = ("plain torch", "Lightning", "HF Trainer", "accelerate")
DATA = ("map-style", "HF dataset", "webdataset")
SHARDS, SHARD, KEPT, BATCH, EPOCHS = 8, 6, 4, 4, 2
SIZE = SHARDS * SHARD


class HardInEachShard(PlannedSampler):
    """All samples first, then the hardest of each shard, some of which weigh more."""

    def plan(self, epoch, rng):
        if not epoch:
            return Plan(range(self.size))
        losses = self.ledger.column("loss_last").numpy().reshape(SHARDS, SHARD) + epoch
        hardest = np.argsort(losses, axis=1)[:, -KEPT:] + np.arange(SHARDS)[:, None] * SHARD
        ids = np.sort(hardest.ravel())
        return Plan(ids, np.where(ids % 3, 1.0, 2.0).astype(np.float32))


class Rows:
    """Item i holds i."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return {"x": torch.tensor(float(index))}


class Net(nn.Module):
    """Its losses are those of the samples, whatever it has learnt."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        losses = loss_of(x.flatten()).detach() + 0 * self.weight
        return {"loss": losses.mean(), "losses": losses}


def write_shards(folder: Path) -> list[str]:
    """Real tar files."""
    paths = []
    for shard in range(SHARDS):
        paths.append(str(folder / f"{shard:03d}.tar"))
        with wds.TarWriter(paths[-1]) as writer:
            for row in range(shard * SHARD, (shard + 1) * SHARD):
                writer.write({"__key__": f"row-{row}", "x.npy": np.array([row], dtype=np.float32)})
    return paths


class Cell:
    """One run: its sampler and its data, and what it was trained on."""

    def __init__(self, data: str, workers: int, shards: list[str], world: int):
        self.sampler = HardInEachShard(SIZE)
        self.stream = data == "webdataset"
        self.workers, self.world = workers, world
        self.served: dict[int, list[list[int]]] = {}
        self.plans: dict[int, list[int]] = {}
        if self.stream:
            stage = keep(self.sampler, KeyIndex.from_shards(shards))
            pipeline = wds.WebDataset(shards, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False)
            pipeline = pipeline.compose(stage).decode(partial=True).rename(x="x.npy")
            self.data: Any = Resumable(pipeline, stage)
        else:
            self.data = Rows() if data == "map-style" else Dataset.from_dict({"x": [float(i) for i in range(SIZE)]})
            self.data = self.data if data == "map-style" else self.data.with_format("torch")

    def loader(self) -> DataLoader:
        settings = {"batch_size": BATCH, "num_workers": self.workers}
        if self.stream:
            return StatefulDataLoader(self.data, **settings)
        return DataLoader(with_ids(self.data), sampler=self.sampler, **settings)

    def note(self, x: torch.Tensor) -> None:
        """Write down what is trained on, by its content."""
        self.plans[self.sampler.epoch] = [int(i) for i in self.sampler.current_plan.ids]
        self.served.setdefault(self.sampler.epoch, []).append([int(i) for i in x.flatten()])

    def step(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.note(batch["x"])
        return self.sampler.observe(batch["sample_id"], model(batch["x"])["losses"])

    def result(self) -> dict[str, Any]:
        self.sampler.sync()
        records = self.sampler.ledger.records.view(torch.int32).clone()
        return {"served": self.served, "plans": self.plans, "records": records}


# --- the loops: each trains, saves after `stop` batches of epoch 1 and leaves, or goes on from what was saved ---------


def plain_torch(cell: Cell, folder: Path, *, stop: int | None = None, resume: bool = False) -> None:
    loader, model, file = cell.loader(), Net(), folder / f"state-{os.environ.get('RANK', 0)}.pt"
    if resume:
        state = torch.load(file, weights_only=False)
        cell.sampler.load_state_dict(state["sampler"])
        if cell.stream:
            loader.load_state_dict(state["loader"])
    for epoch in range(cell.sampler.epoch, EPOCHS):
        cell.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader, start=1):
            cell.step(model, batch).backward()
            if epoch == 1 and number == stop:
                cell.sampler.sync()
                states = {"loader": loader.state_dict()} if cell.stream else {}
                torch.save({"sampler": cell.sampler.state_dict(), **states}, file)
                return


class Module(pl.LightningModule):
    def __init__(self, cell: Cell):
        super().__init__()
        self.cell, self.net = cell, Net()

    def training_step(self, batch, batch_idx):
        return self.cell.step(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAndLeave(SaveEveryStep):
    """A checkpoint in the middle of epoch 1."""

    def __init__(self, folder: Path, stop: int):
        super().__init__(folder)
        self.stop = stop

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx + 1 == self.stop:
            trainer.save_checkpoint(self.folder / "middle.ckpt")
            trainer.should_stop = True


def lightning(cell: Cell, folder: Path, *, stop: int | None = None, resume: bool = False) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": cell.world, "max_epochs": EPOCHS}
    callbacks = [SamplingCallback(cell.sampler)] + ([] if stop is None else [SaveAndLeave(folder, stop)])
    trainer = pl.Trainer(callbacks=callbacks, strategy="ddp" if cell.world > 1 else "auto", **quiet)
    path = folder / "middle.ckpt" if resume else None
    trainer.fit(Module(cell), cell.loader(), ckpt_path=path, weights_only=False)


def hf_trainer(cell: Cell, folder: Path, *, stop: int | None = None, resume: bool = False) -> None:
    first, second = (count * SHARDS // (BATCH * cell.world) for count in (SHARD, KEPT))
    steps = first + second if stop is None else first + stop
    arguments = transformers.TrainingArguments(
        str(folder),
        **({"max_steps": first + second} if cell.stream else {"num_train_epochs": EPOCHS}),
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=cell.workers,
        save_strategy="steps" if stop is not None else "no",
        save_steps=steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = cell.data.pipeline if cell.stream else cell.data
    trainer = transformers.Trainer(Net(), arguments, train_dataset=data, callbacks=[_Leave(stop and steps)])

    def losses(outputs, inputs):
        cell.note(inputs["x"])
        return outputs["losses"]

    attach(trainer, cell.sampler, losses=losses)
    trainer.train(resume_from_checkpoint=True if resume else None)


class _Leave(transformers.TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def with_accelerate(cell: Cell, folder: Path, *, stop: int | None = None, resume: bool = False) -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    if cell.stream:  # its shards are divided already: the loader is not prepared, and so it is the plain loop
        return plain_torch(cell, folder, stop=stop, resume=resume)
    accelerator = Accelerator(cpu=True)
    model, loader = accelerator.prepare(Net(), cell.loader())
    attach(accelerator, loader)
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(cell.sampler.epoch, EPOCHS):
        cell.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader, start=1):
            accelerator.backward(cell.step(model, batch))
            if epoch == 1 and number == stop:
                return accelerator.save_state(str(folder))


RUN = dict(zip(LOOPS, (plain_torch, lightning, hf_trainer, with_accelerate), strict=True))


def play(rank: int, world: int, shards: list[str], folder: str) -> dict[str, Any]:
    """All cells on one rank: the whole run, and one that was interrupted and resumed."""
    if world > 1:
        mp.set_start_method("fork", force=True)  # of the loaders' workers: spawned ones import everything once more
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in {**names, "TORCHELASTIC_RUN_ID": "scoreboard"}.items()}
    results = {}
    for loop, data, workers in ((a, b, c) for a in LOOPS for b in DATA for c in (0, 2)):
        name = f"{loop}/{data}/{workers}"
        place = Path(folder) / name.replace("/", "-").replace(" ", "-")
        place.mkdir(exist_ok=True, parents=True)
        runs: dict[str, Any] = {}
        for kind, settings in {"whole": {}, "left": {"stop": 1}, "resumed": {"resume": True}}.items():
            cell = Cell(data, workers, shards, world)
            try:
                RUN[loop](cell, place, **settings)
                runs[kind] = cell.result()
            except RuntimeError as error:
                runs[kind] = {"served": None, "refused": str(error)}
        results[name] = runs
    return results


# --- what came out ----------------------------------------------------------------------------------------------------


def judge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one cell: are losses on their rows, is the union over ranks the plan, is the resumed run the rest."""
    whole = [rank["whole"] for rank in ranks]
    served = Counter(i for rank in whole for batches in rank["served"].values() for batch in batches for i in batch)
    records = whole[0]["records"]
    rows = all(torch.equal(rank["records"], records) for rank in whole)
    rows &= records[:, 4].tolist() == [served[row] for row in range(SIZE)]  # the count
    rows &= torch.equal(records[:, 0].view(torch.float32), loss_of(torch.arange(SIZE)).detach())
    plan = list(whole[0]["plans"]) == list(range(EPOCHS))
    for epoch, ids in whole[0]["plans"].items():
        plan &= Counter(i for rank in whole for batch in rank["served"][epoch] for i in batch) == Counter(ids)
    resume = all(rank["resumed"]["served"] == {1: rank["whole"]["served"].get(1, [])[1:]} for rank in ranks)
    resume = resume and all(torch.equal(rank["resumed"]["records"], records) for rank in ranks)
    refused = [rank["resumed"].get("refused", "") for rank in ranks]
    return {"rows": bool(rows), "plan": bool(plan), "resume": bool(resume), "refused": refused}


def table(cells: dict[str, dict[str, bool]]) -> str:
    """Markdown: for each loop and kind of data what holds with 1 and 2 ranks, 0 and 2 workers."""
    lines = ["| | " + " | ".join(DATA) + " |", "|---" * (len(DATA) + 1) + "|"]
    for loop in LOOPS:
        texts = []
        for data in DATA:
            mine = [result for name, result in cells.items() if name.startswith(f"{loop}/{data}/")]
            texts.append(", ".join(what for what in ("rows", "plan", "resume") if all(cell[what] for cell in mine)))
        lines.append(f"| {loop} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = play(0, 1, write_shards(Path(folder)), folder)
        cells = {name: judge([runs]) for name, runs in found.items()}
        print(json.dumps(cells, indent=1))
        print(table(cells))
