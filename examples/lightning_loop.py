"""A Lightning module and its trainer, with samplewise; lightning_loop_plain.py is the same without."""

import torch
import torch.nn.functional as F
from digits import Digits, accuracy, network
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from samplewise.callbacks import SamplingCallback
from samplewise.loaders import with_ids
from samplewise.plugins import InfoBatch

EPOCHS = 10
train_set = Digits(train=True)
loader = DataLoader(with_ids(train_set), batch_size=32, sampler=InfoBatch(len(train_set), epochs=EPOCHS))


class Classifier(LightningModule):
    """A network that learns to read digits."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        losses = F.cross_entropy(self.net(batch["image"]), batch["label"], reduction="none")
        return loader.sampler.observe(batch["sample_id"], losses)

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


model = Classifier()
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
trainer = Trainer(max_epochs=EPOCHS, callbacks=[SamplingCallback(loader.sampler)], **settings)
trainer.fit(model, loader)

print(f"accuracy {accuracy(model.net):.3f}")
