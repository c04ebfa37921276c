"""SwitchBits for the HF Trainer: one configuration of bit widths for each optimizer step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from samplewise.callbacks.huggingface_state import checkpoint_of, note_checkpoint, transformers, write_state
from samplewise.callbacks.switching import Config, Switch
from samplewise.cuda_ext.ranks import rank, world_size
from samplewise.loaders.schedule import Schedule

STATE_FILE = "samplewise_schedule.json"


def attach_schedule(trainer: Any, schedule: Schedule, evaluate: Config | Sequence[Config] | None = None) -> SwitchBits:
    """See :func:`samplewise.callbacks.huggingface.attach`; ``trainer`` is a Trainer."""
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
    create_optimizer, train_batch = trainer.create_optimizer, trainer.training_step

    def create_optimizer_for_all(*args: Any, **kwargs: Any) -> Any:
        callback.switch.find(trainer.model)
        callback.switch.unfreeze()  # a Trainer that has loaded a checkpoint leaves one adapter trainable
        return create_optimizer(*args, **kwargs)

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = train_batch(*args, **kwargs)  # its share of the step's, over the batches that are accumulated
        callback.switch.add_loss(loss)
        return loss

    note_checkpoint(trainer, callback)
    trainer.create_optimizer, trainer.training_step = create_optimizer_for_all, training_step
    trainer.add_callback(callback)
    return callback


class SwitchBits(transformers.TrainerCallback):  # type: ignore[misc]
    """Switches bit widths for a ``transformers.Trainer``; :func:`samplewise.callbacks.huggingface.attach` makes one."""

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
