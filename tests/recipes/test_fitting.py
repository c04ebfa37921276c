"""What the fine-tuning recipes' scripts share."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning_support import QUIET
from torch.utils.data import DataLoader

from samplewise.recipes.fitting import fit, warmed_adamw

pytestmark = QUIET
OPTIONS = SimpleNamespace(accelerator="cpu", precision="32-true")


class Line(LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.steps, self.rates = steps, []
        self.layer = torch.nn.Linear(1, 1)
        self.frozen = torch.nn.Linear(1, 1).requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        assert not self.frozen.training
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return warmed_adamw(self, lr=2.0, weight_decay=0.5, steps=self.steps)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_and_their_rates(accumulate):
    module = Line(20)
    fit(module, DataLoader(torch.ones(6, 1)), OPTIONS, 20, [], accumulate_grad_batches=accumulate)
    assert module.trainer.global_step == 20
    steps = module.rates[accumulate - 1 :: accumulate]
    assert steps == pytest.approx([1.0, 2.0, *(2 * (20 - step) / 18 for step in range(2, 20))])
    (group,) = module.optimizers().param_groups
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in module.layer.parameters()]
    assert group["weight_decay"] == 0.5


def test_a_single_step():
    module = Line(1)
    fit(module, DataLoader(torch.ones(6, 1)), OPTIONS, 1, [])
    assert module.rates == [2.0]
