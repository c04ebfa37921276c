"""A tiny retrieval problem and its Lightning model; importable in spawned processes too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from samplewise.loaders import CollateRetrieval, RetrievalDataset, Table, with_ids
from samplewise.plugins import Uniform, star_loss

WORDS, LENGTH = 30, 3


def texts(count: int, seed: int) -> list[str]:
    """``"3 17 5"``: words are numbers."""
    words = np.random.default_rng(seed).integers(0, WORDS, (count, LENGTH))
    return [" ".join(map(str, row)) for row in words]


def tokenize(items: list[str]) -> torch.Tensor:
    """int64 (b, LENGTH)."""
    return torch.tensor([[int(word) for word in item.split()] for item in items]).view(-1, LENGTH)


QUERIES, DOCUMENTS = texts(23, 0), texts(60, 1)
POSITIVES = [[row % 60, (row * 7 + 1) % 60] for row in range(23)]


def dataset(folder: Path, sampler, *, keep: int = 20) -> RetrievalDataset:
    """With a table that may be empty."""
    return RetrievalDataset(QUERIES, DOCUMENTS, POSITIVES, Table(folder, keep=keep), count=2, sampler=sampler, seed=3)


class Encoder(LightningModule):
    """The mean of word vectors; with dropout, which must be off while negatives are mined."""

    def __init__(self, sampler: Uniform):
        super().__init__()
        self.sampler = sampler
        self.words = nn.Embedding(WORDS, 8)
        self.frozen = nn.Dropout(0.5).eval()
        with torch.no_grad():
            self.words.weight.copy_(torch.from_numpy(np.random.default_rng(2).normal(size=(WORDS, 8))))
        self.seen: list[tuple[int, list[int], list[list[int]]]] = []  # epoch, queries, their negatives

    def encode(self, items: list[str]) -> torch.Tensor:
        """float32 (b, 8)."""
        assert not self.training
        return self.embed(tokenize(items).to(self.device))

    def embed(self, words):
        return nn.functional.normalize(self.words(words).mean(1), dim=1)

    def training_step(self, batch, batch_idx):
        assert self.training
        assert not self.frozen.training
        ids, size = batch["sample_id"], len(batch["sample_id"])
        self.seen.append((self.current_epoch, ids.tolist(), batch["negative_ids"].tolist()))
        queries, documents = self.embed(batch["queries"]), self.embed(batch["documents"])
        losses = star_loss(
            queries,
            documents[:size],
            documents[size:].unflatten(0, batch["negative_ids"].shape),
            positive_ids=batch["positive_ids"],
            negative_ids=batch["negative_ids"],
            known=batch["positives"],
            temperature=0.1,
            reduction="none",
        )
        return self.sampler.observe(ids, losses)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2.0)


def loader(data: RetrievalDataset, sampler, **settings) -> DataLoader:
    """Batches of 4."""
    return DataLoader(with_ids(data), 4, sampler=sampler, collate_fn=CollateRetrieval(tokenize), **settings)
