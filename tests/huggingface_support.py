"""A tiny Llama, trainers with a planned sampler, and runs on several ranks; importable in spawned processes too."""

from __future__ import annotations

import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bits_support import tiny_llama, token_ids

from samplewise.callbacks.huggingface import attach
from samplewise.loaders import Plan
from samplewise.loaders.key_index import KeyIndex
from samplewise.loaders.streams import keep
from support import Everything, HardHalf, Returns

ROWS, BATCH = 22, 2


def joined(lists):
    """One list of many."""
    return list(chain.from_iterable(lists))


class Noted(transformers.TrainerCallback):
    """The ids, losses and rates of a run, as the sampler and the optimizer get them."""

    def __init__(self, trainer, sampler):
        self.ids, self.losses, self.rates, self.batches = [], [], [], []
        self.trainer, observe = trainer, sampler.observe

        def observed(ids, losses, **kwargs):
            self.ids.append(ids.tolist())
            self.losses.append(losses.tolist())
            return observe(ids, losses, **kwargs)

        sampler.observe = observed

    def on_step_end(self, args, state, control, **kwargs):
        self.rates.append(self.trainer.lr_scheduler.get_last_lr()[0])


def items(rows=ROWS, length=9):
    """Rows of tokens, of which the first ``i % 4`` do not count and row i begins with token i; a column too many."""
    tokens = token_ids(rows, length)
    tokens[:, 0] = torch.arange(rows)
    labels = tokens.clone()
    for row in range(rows):
        labels[row, : row % 4] = -100
    return [{"input_ids": a, "labels": b, "unused": 1} for a, b in zip(tokens, labels, strict=True)]


def prepare(
    folder, sampler=None, *, model=None, data=None, kind=transformers.Trainer, losses=None, given=None, **settings
):
    """A trainer with the sampler, if there is one, and what is noted of it."""
    data = items() if data is None else data
    arguments = {
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **settings,
    }
    trainer = kind(
        tiny_llama() if model is None else model,
        transformers.TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        **(given or {}),
    )
    if sampler is None:
        return trainer, None
    attach(trainer, sampler, losses=losses)
    noted = Noted(trainer, sampler)
    trainer.add_callback(noted)
    return trainer, noted


def weights(trainer) -> bytes:
    """The model, bit for bit."""
    return b"".join(value.detach().cpu().numpy().tobytes() for value in trainer.model.state_dict().values())


def history(trainer, sampler, noted) -> dict[str, Any]:
    """What a run did and where it ended."""
    return {
        "ids": noted.ids,
        "losses": noted.losses,
        "rates": noted.rates,
        "weights": weights(trainer),
        "ledger": sampler.ledger.records.numpy().tobytes(),
        "position": (sampler.epoch, sampler.consumed, sampler.step),
    }


class Told(torch.nn.Module):
    """A model whose loss is the square of what it is given, whatever its one weight, which has a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        logits = x[:, None] + (self.weight - self.weight.detach())
        return {"loss": (logits[:, 0] - labels).square().mean(), "logits": logits}


def told_rows(rows=ROWS):
    """Row i has the loss ((i + 1) / 8)^2, exactly."""
    return [{"x": torch.tensor((row + 1) / 8), "labels": torch.tensor(0.0)} for row in range(rows)]


def join_ranks(rank: int, world: int) -> None:
    """What torchrun tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def rank_runs(rank: int, world: int, folder: Path, resumes: tuple[tuple[int, int], ...]) -> dict[Any, Any]:
    """A run on several ranks that saves each step, and what goes on from ``(accumulation, step)``."""
    join_ranks(rank, world)
    settings = {"model": Told(), "data": told_rows(), "save_steps": 1, "ddp_backend": "gloo"}
    results = {}
    for accumulation, step in resumes:
        sampler = HardHalf(ROWS)
        saves = {"save_strategy": "steps" if not step else "no", "gradient_accumulation_steps": accumulation}
        place = Path(folder) / f"runs-{accumulation}"
        trainer, noted = prepare(place, sampler, **{**settings, **saves, "model": Told()})
        plans = []
        sampler.on_plan = partial(note_plan, plans, sampler)
        trainer.train(resume_from_checkpoint=str(place / f"checkpoint-{step}") if step else None)
        seen = sampler.ledger.seen.numpy()
        results[accumulation, step] = {
            **history(trainer, sampler, noted),
            "plans": plans,
            "exact": (sampler.ledger.column("loss_last").numpy()[seen] == losses_told()[seen]).all(),
            "seen": seen.tolist(),
        }
    results["weighted"] = [weighted_loss(rank, folder, weight) for weight in (None, 2.0)]
    results["stream"] = stream_run(rank, world, Path(folder) / "stream")
    return results


def weighted_loss(rank: int, folder: Path, weight: float | None) -> list[float]:
    """The logged losses of a language model's two steps, each sample with this weight; its ranks' tokens differ."""
    weights = None if weight is None else np.full(ROWS, weight, np.float32)
    settings = {"max_steps": 2, "learning_rate": 0.0, "ddp_backend": "gloo"}
    trainer, _ = prepare(Path(folder) / "weighted", Returns(ROWS, Plan(range(ROWS), weights)), **settings)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def stream_run(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Two passes through a stream, of which each rank has half of every plan's 22 samples."""
    sampler = Everything(ROWS)
    settings = {"max_steps": 12, "gradient_accumulation_steps": 1, "ddp_backend": "gloo"}
    trainer, noted = prepare(folder, sampler, model=Told(), data=stream_of(sampler, rank, world), **settings)
    trainer.train()
    return {**history(trainer, sampler, noted), "exact": sampler.ledger.column("loss_last").tolist()}


class Keyed(torch.utils.data.IterableDataset):
    """The rows of :func:`told_rows` as samples with keys, dealt out to the ranks."""

    def __init__(self, rank=0, world=1, rows=ROWS):
        self.items = [{"__key__": f"k{row}", **item} for row, item in enumerate(told_rows(rows))][rank::world]

    def __iter__(self):
        return iter(self.items)


def stream_of(sampler, rank=0, world=1):
    """What the sampler plans of them."""
    return keep(sampler, KeyIndex.from_keys([f"k{row}" for row in range(sampler.size)])).wrap(Keyed(rank, world))


def note_plan(plans, sampler):
    plans.append(sorted(map(int, sampler.current_plan.ids)))


def losses_told(rows=ROWS):
    """float32 (rows,)."""
    return np.square((np.arange(rows, dtype=np.float32) + 1) / 8)
