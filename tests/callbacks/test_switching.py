"""What SwitchBits and attach check before they train, and the adapters that must be trainable when they do."""

import numpy as np
import pytest
import torch
import transformers
from bits_support import tiny_llama, tiny_quantized, token_ids
from lightning.pytorch import LightningModule, Trainer
from lightning_support import QUIET
from torch.utils.data import DataLoader

from samplewise.callbacks import SwitchBits
from samplewise.callbacks.huggingface import attach
from samplewise.plugins import BitSchedule, quantize_model
from samplewise.plugins.bit_adapters import get_bits

pytestmark = QUIET


class Tuner(LightningModule):
    """An ordinary module: the optimizer has what is trainable when it is made."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def fit(model, callback, steps=4):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=steps, enable_model_summary=False, callbacks=[callback], **settings)
    trainer.fit(Tuner(model), DataLoader(token_ids(8), 2))


def hf_trainer(folder, model, **settings):
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True, **settings)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4)]
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def test_adapters_that_peft_froze_are_trained_all_the_same():
    model, layers = tiny_quantized()
    model.set_adapter("bits3")  # as loading does: freezes the others
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    fit(model, SwitchBits(BitSchedule(layers=layers, mapping="uniform")), steps=8)
    for width in (2, 3, 4):
        own = [name for name in before if f"bits{width}" in name]
        assert any(not torch.equal(before[name], dict(model.named_parameters())[name]) for name in own)


def test_layers_without_adapters_are_warned_of():
    model = tiny_llama()
    layers = quantize_model(model, group_size=32)
    with pytest.warns(UserWarning, match="have no adapters"):
        fit(model, SwitchBits(BitSchedule(layers=layers, mapping="uniform")), steps=1)


@pytest.mark.parametrize("evaluate", ["2", 2.5, [2, "3"], [[2]]])
def test_evaluations_are_at_widths_or_configurations(evaluate):
    with pytest.raises(TypeError, match=r"SwitchBits\(evaluate\): must be widths"):
        SwitchBits(BitSchedule(layers=["a"]), evaluate=evaluate)


def test_numbers_of_numpy_are_widths():
    model, layers = tiny_quantized()
    callback = SwitchBits(BitSchedule(layers=layers), evaluate=np.int64(2))
    callback.switch.find(model)
    callback.switch.pin()
    assert {site.linear.width for site in callback.switch.sites.values()} == {2}


def test_a_trainer_gets_one_schedule_and_keeps_its_last_weights(tmp_path):
    model, layers = tiny_quantized()
    trainer = hf_trainer(tmp_path, model)
    attach(trainer, BitSchedule(layers=layers))
    with pytest.raises(RuntimeError, match="has a schedule already"):
        attach(trainer, BitSchedule(layers=layers))
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        attach(hf_trainer(tmp_path, tiny_quantized()[0], **best), BitSchedule(layers=layers))


def test_a_training_that_stops_within_a_step_is_left_at_the_evaluations_configuration(tmp_path):
    model, layers = tiny_quantized()
    callback = attach(hf_trainer(tmp_path, model), BitSchedule(layers=layers, period=2), evaluate=3)
    for hook in (callback.on_epoch_end, callback.on_train_end):
        callback.switch.begin(1)
        assert set(get_bits(model).values()) == {2}
        hook(None, None, None)
        assert set(get_bits(model).values()) == {3}
