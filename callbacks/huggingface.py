"""The HF Trainer's side: `attach` gives a trainer a schedule of bit widths."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from typing_extensions import override

from samplewise.callbacks.switching import Config, Switch
from samplewise.cuda_ext.checks import optional_import
from samplewise.cuda_ext.ranks import rank, world_size
from samplewise.loaders.schedule import Schedule

transformers: Any = optional_import("samplewise.callbacks.huggingface", "transformers", "hf")
STATE_FILE = "samplewise_schedule.json"


def attach(trainer: Any, schedule: Schedule, *, evaluate: Config | Sequence[Config] | None = None) -> SwitchBits:
    """Let a ``transformers.Trainer`` train its model at several bit widths, one configuration per optimizer step.

    See :class:`~samplewise.callbacks.SwitchBits`, the same for Lightning. Between optimizer steps the model has the
    configuration of evaluations, so that these, predictions and what is saved are made with it.

    Args:
        trainer: before ``train()``; its model has quantized layers and adapters.
        schedule: draws ``{layer: width}``.
        evaluate: the configuration of evaluations; layers that it does not name, and None: the layer's largest width.
            To evaluate at another after the training, call ``set_bits(trainer.model, config)`` first.

    Returns:
        The callback that the trainer has now.

    Raises:
        TypeError: ``trainer`` is no Trainer, or ``schedule`` no Schedule with slots.
        ValueError: layers or widths that the model does not have, or more than one configuration for evaluations.

    Example::

        trainer = Trainer(model, TrainingArguments(..., ddp_find_unused_parameters=True), train_dataset=data)
        attach(trainer, BitSchedule(layers=layers, period=500))
        trainer.train()
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"attach(trainer={type(trainer).__name__}): a transformers.Trainer is needed.")
    if any(isinstance(other, SwitchBits) for other in trainer.callback_handler.callbacks):
        raise RuntimeError("attach(trainer): it has a schedule already; make a new Trainer for another one.")
    callback = SwitchBits(schedule, evaluate=evaluate)
    callback.switch.find(trainer.model)
    if trainer.args.load_best_model_at_end:
        raise ValueError(
            "attach(trainer): load_best_model_at_end=True looks for a single adapter, and keeps the last weights where "
            "there are several; set it to False, and load the best checkpoint by train(resume_from_checkpoint=...)."
        )
    callback.switch.pin()
    train, create_optimizer, train_batch = trainer.train, trainer.create_optimizer, trainer.training_step

    def train_from(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback.given = resume_from_checkpoint
        return train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer_for_all(*args: Any, **kwargs: Any) -> Any:
        callback.switch.find(trainer.model)
        callback.switch.unfreeze()  # a Trainer that has loaded a checkpoint leaves one adapter trainable
        return create_optimizer(*args, **kwargs)

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = train_batch(*args, **kwargs)  # its share of the step's, over the batches that are accumulated
        callback.switch.add_loss(loss)
        return loss

    trainer.train, trainer.create_optimizer, trainer.training_step = train_from, create_optimizer_for_all, training_step
    trainer.add_callback(callback)
    return callback


class SwitchBits(transformers.TrainerCallback):  # type: ignore[misc]
    """Switches bit widths for a ``transformers.Trainer``; :func:`attach` makes one."""

    def __init__(self, schedule: Schedule, *, evaluate: Config | Sequence[Config] | None = None):
        self.switch = Switch("attach", schedule, evaluate)
        self.schedule = schedule
        self.given: Any = None  # what `train` was told to resume from
        if len(self.switch.pins) > 1:
            raise ValueError(
                "attach(evaluate): must be one configuration; a Trainer does not tell where loaders begin."
            )

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.find(kwargs["model"])
        self.switch.forget()
        self.switch.check_adapters()
        if world_size() > 1:
            finds = args.ddp_find_unused_parameters  # transformers takes None for "unless there is checkpointing"
            self.switch.check_ddp(not args.gradient_checkpointing if finds is None else finds)
        self.schedule.check_steps(state.max_steps)
        if not state.global_step:
            if self.schedule.step:
                warnings.warn(
                    "attach: training begins anew; what the schedule has recorded is forgotten.", stacklevel=2
                )
                self.schedule.reset(0)
            return
        file = checkpoint_of(self.given, args, state) / STATE_FILE
        if file.is_file():
            self.schedule.load_state_dict(json.loads(file.read_text()))
        elif self.schedule.step != state.global_step:
            warnings.warn(
                f"attach: there is no {file}, so that the schedule's statistics begin at step {state.global_step}; its "
                f"draws are the same, but for those that depend on what was recorded.",
                stacklevel=2,
            )
            self.schedule.reset(state.global_step)

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.begin(state.global_step)

    @override
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.before_optimizer()

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.end(state.global_step - 1, shares=True)
        self.switch.pin()

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.pin()  # training may stop within a step

    on_train_end = on_epoch_end

    @override
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if rank() == 0:
            write_state(args, state, STATE_FILE, self.schedule.state_dict())


def write_state(args: Any, state: Any, name: str, content: dict[str, Any]) -> None:
    """Put a file of JSON into the checkpoint that is being saved."""
    folder = checkpoint_of(None, args, state)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}"
    temporary.write_text(json.dumps(content))
    temporary.replace(folder / name)


def checkpoint_of(given: Any, args: Any, state: Any) -> Path:
    """The folder that training is resumed from: the one that was given, or the output folder's of that step."""
    if isinstance(given, str | PathLike):
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
