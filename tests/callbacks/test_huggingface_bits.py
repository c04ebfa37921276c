"""`attach`: the HF Trainer with one configuration of bit widths for each optimizer step."""

import json
import shutil

import pytest
import torch
import transformers
from bits_support import tiny_quantized, token_ids
from switch_support import Traced, adapters, in_use, moved, weights

from samplewise.callbacks.huggingface import attach
from samplewise.callbacks.huggingface_bits import STATE_FILE
from samplewise.plugins import ArmSchedule
from samplewise.plugins.bit_adapters import get_bits, gradient_norms

pytestmark = [
    pytest.mark.filterwarnings("error:attach"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]
ROWS = 10  # 5 batches of 2: steps of 2, 2 and 1
STEPS = 6


class Recorded(transformers.TrainerCallback):
    """The configurations, the adapters that each step changes, and the norms, as the optimizer gets them."""

    def __init__(self, model):
        self.model, self.batches, self.moved, self.norms, self.between = model, [], [], [], []
        model.register_forward_pre_hook(self.forward)

    def forward(self, *args):
        self.batches.append((self.model.training, get_bits(self.model)))

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.before = adapters(self.model)
        self.norms.append({name: float(norm) for name, norm in gradient_norms(self.model).items()})

    def on_step_end(self, *args, **kwargs):
        self.moved.append(moved(self.before, adapters(self.model)))
        self.between.append(get_bits(self.model))


def prepare(folder, *, evaluate=None, schedule=None, drawn=None, **settings):
    """A trainer, its schedule and what is written down."""
    model, layers = tiny_quantized()
    schedule = schedule or Traced(layers=layers, **(drawn or {}))
    rows = [{"input_ids": row, "labels": row} for row in token_ids(ROWS)]
    arguments = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = transformers.TrainingArguments(str(folder), **{**arguments, **settings})
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    attach(trainer, schedule, evaluate=evaluate)
    recorded = Recorded(model)
    trainer.add_callback(recorded)
    return trainer, schedule, recorded


def logged(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_one_configuration_for_each_step(tmp_path):
    trainer, schedule, recorded = prepare(tmp_path)
    trainer.train()
    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]
    assert recorded.batches == [(True, schedule.draw(step)) for step in steps]
    assert recorded.moved == [in_use(schedule.draw(step)) for step in range(STEPS)]
    assert [step for step, _, _ in schedule.recorded] == list(range(STEPS))
    assert [loss for _, loss, _ in schedule.recorded] == pytest.approx(logged(trainer))
    assert len(logged(trainer)) == STEPS


def test_gradients_of_zeros_move_no_adapter(tmp_path):
    trainer, schedule, recorded = prepare(tmp_path)
    trainer.model.zero_grad = lambda: torch.nn.Module.zero_grad(trainer.model, set_to_none=False)
    trainer.train()
    assert recorded.moved == [in_use(schedule.draw(step)) for step in range(STEPS)]


def test_losses_are_means_for_models_that_do_not_count_tokens(tmp_path):
    """Then the Trainer itself divides by the batches of a step."""
    trainer, schedule, _ = prepare(tmp_path)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert [loss for _, loss, _ in schedule.recorded] == pytest.approx(logged(trainer))


@pytest.mark.parametrize(("evaluate", "widths"), [(None, {4}), (2, {2})])
def test_pinned_between_steps_and_in_evaluations(tmp_path, evaluate, widths):
    trainer, schedule, recorded = prepare(tmp_path, evaluate=evaluate, eval_strategy="steps", eval_steps=2)
    assert set(get_bits(trainer.model).values()) == widths
    trainer.train()
    assert all(set(config.values()) == widths for config in recorded.between)
    evaluated = [config for training, config in recorded.batches if not training]
    assert len(evaluated) == 3 * 2  # 10 rows in batches of 8
    assert all(set(config.values()) == widths for config in evaluated)
    assert [config for training, config in recorded.batches if training][::5] == [schedule.draw(0), schedule.draw(3)]
    trainer.evaluate()
    assert set(recorded.batches[-1][1].values()) == widths


def test_activation_checkpointing_changes_nothing(tmp_path):
    ends = []
    for settings in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        trainer, _, _ = prepare(tmp_path, max_steps=4, **settings)
        trainer.train()
        ends.append(weights(trainer.model))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("mapping", "evaluate"), [("maxent", 2), ("loss", None), ("grad_norm", None)])
def test_resume_is_exact(tmp_path, mapping, evaluate):
    """From the newest checkpoint, from a named one, and from one that was moved away."""
    settings = {"drawn": {"mapping": mapping}, "evaluate": evaluate, "save_strategy": "steps", "save_steps": 2}
    trainer, schedule, recorded = prepare(tmp_path / "runs", **settings)
    trainer.train()
    whole = weights(trainer.model), schedule.state_dict(), recorded.moved, schedule.recorded
    if mapping == "grad_norm":
        assert [norms for _, _, norms in schedule.recorded] == recorded.norms
    shutil.rmtree(tmp_path / "runs" / "checkpoint-6")
    moved_away = shutil.copytree(tmp_path / "runs" / "checkpoint-2", tmp_path / "moved")
    places = [("runs", str(tmp_path / "runs" / "checkpoint-2"), 2), ("runs", True, 4), ("other", str(moved_away), 2)]
    for folder, given, step in places:
        shutil.rmtree(tmp_path / "runs" / "checkpoint-6", ignore_errors=True)
        trainer, schedule, recorded = prepare(tmp_path / folder, **settings)
        trainer.train(resume_from_checkpoint=given)
        assert recorded.moved == whole[2][step:]
        assert schedule.recorded == whole[3][step:]
        assert schedule.state_dict() == whole[1]
        assert weights(trainer.model) == whole[0]


def test_a_checkpoint_without_the_schedules_state(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    trainer, _, whole = prepare(tmp_path, **settings)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)
    file = tmp_path / "checkpoint-4" / STATE_FILE
    assert json.loads(file.read_text())["step"] == 4
    file.unlink()
    trainer, schedule, recorded = prepare(tmp_path, **settings)
    with pytest.warns(UserWarning, match=f"there is no .*{STATE_FILE}.*statistics begin at step 4"):
        trainer.train(resume_from_checkpoint=True)
    assert recorded.moved == whole.moved[4:]
    assert (schedule.step, schedule.counts.sum()) == (6, 2 * 14)


def test_a_schedule_that_was_used_begins_anew(tmp_path):
    trainer, schedule, _ = prepare(tmp_path, max_steps=4)
    trainer.train()
    with pytest.warns(UserWarning, match="attach: training begins anew"):
        trainer.train()
    assert (schedule.step, schedule.counts.sum()) == (4, 4 * 14)


def test_a_period_longer_than_the_training(tmp_path):
    trainer, _, _ = prepare(tmp_path, drawn={"period": 50})
    with pytest.warns(UserWarning, match="the training has 6 optimizer steps"):
        trainer.train()


def test_what_is_refused(tmp_path):
    model, layers = tiny_quantized()
    with pytest.raises(TypeError, match=r"attach\(target=PeftModel.*\): a transformers.Trainer is needed"):
        attach(model, Traced(layers=layers))
    for settings, error, message in (
        ({"schedule": ArmSchedule(arms=[2, 3])}, TypeError, r"attach\(schedule=ArmSchedule\): a Schedule with a slot"),
        ({"schedule": Traced(layers=["x"])}, ValueError, "the model does not have, such as 'x'"),
        ({"schedule": Traced(layers=layers[1:])}, ValueError, "leaves out 1 quantized layers"),
        ({"schedule": Traced(layers=layers, bits=(2, 5))}, ValueError, "it draws 5 bits"),
        ({"evaluate": [2, 3]}, ValueError, r"attach\(evaluate\): must be one configuration"),
        ({"evaluate": 5}, ValueError, "to have 5 bits"),
    ):
        with pytest.raises(error, match=message):
            prepare(tmp_path, **settings)
