"""A tiny Llama, trainers with a planned sampler, and runs on several ranks; importable in spawned processes too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from bits_support import tiny_llama, token_ids
from samplewise.callbacks.huggingface import attach
from support import HardHalf

ROWS, BATCH = 22, 2


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
