"""SwitchBits: one configuration of bit widths for each optimizer step of a Lightning training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from samplewise.callbacks.switching import Config, Switch
from samplewise.loaders.schedule import Schedule
from samplewise.plugins.multi_bit import MultiBitLinear

VERSION = 1


class SwitchBits(Callback):
    """Trains a model at several bit widths: each optimizer step has the configuration that a schedule draws for it.

    The configuration is drawn from the number of optimizer steps, so that it is the same for all batches accumulated
    for a step, on all ranks, in the recomputation of checkpointed activations and after a resume. The adapters that a
    step does not use have no gradient when the optimizer comes, so that momentum and weight decay leave them alone.
    Validation, test and prediction run at configurations of their own, after which training goes on with its own. Each
    step's configuration and loss are recorded in the schedule, which is saved in checkpoints; ``samplewise/bits``, the
    average width, is logged.

    With DDP: ``Trainer(strategy="ddp_find_unused_parameters_true")``.

    Args:
        schedule: draws ``{layer: width}``, such as a :class:`~samplewise.plugins.BitSchedule`.
        evaluate: the configuration of evaluations (a width for all layers, or ``{layer: width}``), or a list of them,
            one for each loader of an evaluation; layers that it does not name, and None: the layer's largest width.

    Raises:
        TypeError: ``schedule`` is no Schedule with slots.
        ValueError: when training begins: layers or widths that the model does not have.

    Example::

        layers = quantize_model(model, bits=(2, 3, 4))
        module = MyLightningModule(add_adapters(model))
        schedule = BitSchedule(layers=layers, period=500)
        trainer = Trainer(max_steps=2000, callbacks=[SwitchBits(schedule, evaluate=[2, 3, 4])])
        trainer.fit(module, train_loader, val_dataloaders=[val_loader] * 3)  # at 2, at 3, and at 4 bits
    """

    def __init__(self, schedule: Schedule, *, evaluate: Config | Sequence[Config] | None = None):
        self.switch = Switch(type(self).__name__, schedule, evaluate)
        self.schedule = schedule
        self._step: int | None = None  # the one whose configuration the model has
        self._refuse_state = self._restored = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and any(isinstance(module, MultiBitLinear) for module in pl_module.modules()):
            self.switch.find(pl_module)
            self.switch.unfreeze()  # before configure_optimizers asks which parameters are trainable

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refuse_state = trainer.state.fn != TrainerFn.FITTING  # `trainer.test(ckpt_path=...)` is no resume

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._refuse_state:
            return
        if state_dict.get("version") != VERSION:
            raise ValueError(
                f"SwitchBits state: version {state_dict.get('version')} was saved, this release reads {VERSION}."
            )
        self.schedule.load_state_dict(state_dict["schedule"])
        self._restored = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": VERSION, "schedule": self.schedule.state_dict()}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.switch.find(pl_module)
        model: Any = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            self.switch.check_ddp(model.find_unused_parameters and not model.static_graph)
        self.switch.forget()
        self.switch.check_adapters()
        self._step = None
        if trainer.global_step != self.schedule.step:
            warnings.warn(
                f"SwitchBits: training begins at step {trainer.global_step}, and the schedule has recorded "
                f"{self.schedule.step}"
                + (" in its checkpoint." if self._restored else "; what was recorded is forgotten."),
                stacklevel=2,
            )
            self.schedule.reset(trainer.global_step)
        self._restored = False
        steps = trainer.estimated_stepping_batches
        if steps != float("inf"):
            self.schedule.check_steps(int(steps))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step != trainer.global_step:
            self._step = trainer.global_step
            self.switch.begin(self._step)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.switch.before_optimizer()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided it by this number, also where an epoch's last step has fewer batches
            self.switch.add_loss(loss * trainer.accumulate_grad_batches)
        if self._step is not None and trainer.global_step > self._step:
            pl_module.log(
                "samplewise/bits", self.schedule.average(self._step), on_step=True, on_epoch=False, batch_size=1
            )
            self.switch.end(self._step, shares=False)

    # --- evaluation ---

    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.switch.find(pl_module)
        self._step = None  # the next training batch sets its configuration again
        pins, loaders = len(self.switch.pins), _loaders(trainer)
        if pins not in (1, loaders):
            raise ValueError(
                f"SwitchBits(evaluate): has {pins} configurations, and this evaluation {loaders} loaders; give one for "
                f"each loader, or one for all: val_dataloaders=[loader] * {pins} evaluates on the same data at each."
            )
        self.switch.pin()

    on_validation_start = on_test_start = on_predict_start = _begin_evaluation

    def _begin_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and len(self.switch.pins) > 1:
            self.switch.pin(dataloader_idx)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch


def _loaders(trainer: Trainer) -> int:
    batches: Any = {
        TrainerFn.FITTING: trainer.num_val_batches,
        TrainerFn.VALIDATING: trainer.num_val_batches,
        TrainerFn.TESTING: trainer.num_test_batches,
        TrainerFn.PREDICTING: trainer.num_predict_batches,
    }[trainer.state.fn or TrainerFn.FITTING]
    if trainer.sanity_checking:
        batches = trainer.num_sanity_val_batches
    return len(batches) if isinstance(batches, list) else 1
