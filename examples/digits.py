"""The data and the networks of the examples: images of digits, 8 x 8, which scikit-learn brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

TRAINED_ON = 1500


class Digits(Dataset):
    """Items are dicts: an image, float32 (1, 8, 8), and a label, 0 ... 9."""

    def __init__(self, *, train: bool):
        images, labels = load_digits(return_X_y=True)
        part = slice(TRAINED_ON) if train else slice(TRAINED_ON, None)
        self.images = torch.from_numpy(images[part]).float().unflatten(1, (1, 8, 8)) / 16
        self.labels = torch.from_numpy(labels[part])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": self.labels[index]}


def network() -> nn.Module:
    """From images (B, 1, 8, 8) to logits (B, 10)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def transformer() -> Any:
    """The same for the HF Trainer: a small vision transformer, not trained yet."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


def accuracy(model: nn.Module) -> float:
    """Share of the images held out that are classified rightly."""
    held_out = Digits(train=False)
    model.eval()
    with torch.no_grad():
        output = model(held_out.images)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return (logits.argmax(1) == held_out.labels).float().mean().item()


def write_shards(folder: str, shards: int = 6) -> list[str]:
    """Write the training data as tar files of webdataset, and give their paths."""
    import webdataset as wds

    data, paths = Digits(train=True), []
    for shard in range(shards):
        paths.append(str(Path(folder) / f"digits-{shard}.tar"))
        with wds.TarWriter(paths[-1]) as writer:
            for row in range(shard, len(data), shards):
                image, label = data[row]["image"].numpy(), int(data[row]["label"])
                writer.write({"__key__": f"digit-{row:05d}", "pixel_values.npy": image, "labels.cls": label})
    return paths
