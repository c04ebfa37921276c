"""SamplingCallback for the HF Trainer: a planned sampler in its loader, and each sample's loss in the ledger."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from samplewise.callbacks.huggingface import Losses
from samplewise.callbacks.huggingface_loader import (
    LENGTHS,
    PassedBatches,
    check_size,
    is_stream,
    passed_batches,
    planned_loader,
)
from samplewise.callbacks.huggingface_losses import Step, StepLosses
from samplewise.callbacks.huggingface_state import checkpoint_of, note_checkpoint, transformers, write_file
from samplewise.cuda_ext.ranks import rank
from samplewise.loaders import SAMPLE_ID, PlannedSampler
from samplewise.loaders.guard import BATCHES, check_batch

STATE_FILE = "samplewise_sampler.pt"
VERSION = 1


def attach_sampler(trainer: Any, sampler: PlannedSampler, losses: Losses | None = None) -> SamplingCallback:
    """See :func:`samplewise.callbacks.huggingface.attach`; ``trainer`` is a Trainer."""
    _check_trainer(trainer, sampler)
    callback = SamplingCallback(trainer, sampler, losses)
    build, train_batch, compute = trainer.get_train_dataloader, trainer.training_step, trainer.compute_loss

    def get_train_dataloader() -> Any:
        stream = is_stream(trainer.train_dataset)
        sampler.sharding = "sampler" if stream else "loader"
        sampler.watch.done = True  # the callback looks itself, in each epoch
        if sampler.epoch_length == "plan" and not stream:
            sampler.epoch_length = len(sampler.current_plan)  # a Trainer counts its steps beforehand
        return planned_loader(trainer, sampler, build)

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        callback.begin_batch(inputs)
        try:
            loss = train_batch(model, inputs, *args, **kwargs)
        finally:
            callback.take_ids()
        callback.end_batch()
        return loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = callback.take_ids()  # None in evaluations
        if ids is None:
            return compute(model, inputs, *args, **kwargs)
        step, batch = Step(), dict(inputs)
        with step.watched(model, *callback.losses.watch()):
            result = compute(model, inputs, *args, **kwargs)
        loss, *rest = result if isinstance(result, tuple) else (result,)
        loss = callback.observe(ids, loss, step, batch, kwargs.get("num_items_in_batch"))
        return (loss, *rest) if rest else loss

    note_checkpoint(trainer, callback)
    trainer.get_train_dataloader, trainer.training_step = get_train_dataloader, training_step
    trainer.compute_loss = compute_loss
    trainer.add_callback(callback)
    return callback


class SamplingCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Follows a ``transformers.Trainer`` with a sampler; :func:`samplewise.callbacks.huggingface.attach` makes one.

    Attributes:
        sampler: what the Trainer trains on.
        losses: what tells the samples' losses.
        given: what ``train`` was told to resume from.
    """

    def __init__(self, trainer: Any, sampler: PlannedSampler, losses: Losses | None = None):
        self.trainer, self.sampler = trainer, sampler
        self.losses = StepLosses(trainer, losses)
        self.given: Any = None
        self._batches: PassedBatches | None = None  # None for streams
        self._length = 0  # of the loader, in batches
        self._in_order = True  # whether its batches come in the sampler's order
        self._epoch = 0  # the one in progress, or that begins next
        self._seen = 0  # batches of this epoch, in this process
        self._step_before = 0  # batches observed before this epoch
        self._before = 0  # samples consumed before the batch in progress
        self._samples = 0  # of the batch in progress
        self._ids: Tensor | None = None
        self._lengths: Tensor | None = None  # of its samples, where they are laid end to end
        self._weighted = False
        self._figures: dict[str, float] = {}

    # --- a run --------------------------------------------------------------------------------------------------------

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader, sampler = kwargs["train_dataloader"], self.sampler
        self._batches = passed_batches(loader)
        if self._batches is None and not is_stream(loader.dataset):
            raise RuntimeError(
                "attach: the Trainer trains with a loader that has another sampler, so get_train_dataloader was "
                "replaced after attach(trainer, sampler); replace it before."
            )
        if sampler.num_replicas != args.world_size:
            raise RuntimeError(
                f"attach: the sampler serves {sampler.num_replicas} ranks, the Trainer has {args.world_size}; leave "
                f"the sampler's num_replicas and rank at None."
            )
        self._ids, self._figures = None, {}
        if self._batches is None:
            self._begin_stream(args, state)
            return
        self._length, self._in_order = len(loader), getattr(loader, "in_order", True)
        updates = max(1, -(-self._length // args.gradient_accumulation_steps))
        self._epoch, steps = divmod(state.global_step, updates)  # as the Trainer itself counts
        self._warn_of_epochs(state)
        if state.global_step:
            self._resume(args, state, steps * args.gradient_accumulation_steps)
        else:
            self._begin_anew()

    def _begin_anew(self) -> None:
        if self.sampler.epoch or self.sampler.consumed:
            warnings.warn(
                "attach: training begins anew, and the sampler with it at epoch 0; the ledger keeps what it holds.",
                stacklevel=2,
            )
        self.sampler.set_epoch(0)
        self.sampler.advance_to(0)

    def _resume(self, args: Any, state: Any, batches: int) -> None:
        """Go on after so many batches of the epoch, which the Trainer passes over."""
        sampler = self.sampler
        assert self._batches is not None
        done = batches * self._batches.batch_size * sampler.num_replicas
        if not self._load(args, state):
            sampler.set_epoch(self._epoch)
            sampler.advance_to(done)
        elif (sampler.epoch, sampler.consumed) != (self._epoch, done):
            raise RuntimeError(
                f"attach: the checkpoint was saved after {sampler.consumed} samples of epoch {sampler.epoch}, but the "
                f"Trainer goes on after {done} of epoch {self._epoch}. Keep the product of "
                f"per_device_train_batch_size, gradient_accumulation_steps and the number of ranks the same, and "
                f"leave no epoch early (control.should_epoch_stop), since a Trainer that resumes does not know of it."
            )
        else:
            self._batches.passed = done // self._batches.batch_size

    def _load(self, args: Any, state: Any) -> bool:
        file = checkpoint_of(self.given, args, state) / STATE_FILE
        if not file.is_file():
            warnings.warn(
                f"attach: there is no {file}, so that the sampler goes on at the Trainer's step {state.global_step} "
                f"with the ledger that it has; what was chosen by earlier losses is chosen anew.",
                stacklevel=2,
            )
            return False
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved.get("version") != VERSION:
            raise ValueError(f"attach: {file} is of version {saved.get('version')}, this release reads {VERSION}.")
        self.sampler.load_state_dict(saved["sampler"])
        self._figures = saved["figures"]
        return True

    def _begin_stream(self, args: Any, state: Any) -> None:
        if not state.global_step:
            self._begin_anew()
        elif not args.ignore_data_skip:
            raise RuntimeError(
                "attach: a Trainer does not save the place in a stream, so that other samples would come next than "
                "in a run without a break. Set TrainingArguments(ignore_data_skip=True) to begin the epoch again, "
                "with the ledger restored."
            )
        elif self._load(args, state):
            self.sampler.advance_to(0)
        self._epoch = self.sampler.epoch

    def _warn_of_epochs(self, state: Any) -> None:
        planned = getattr(self.sampler, "epochs", None)
        if planned is not None and planned != state.num_train_epochs:
            warnings.warn(
                f"attach: {type(self.sampler).__name__}(epochs={planned}), but the Trainer trains for "
                f"{state.num_train_epochs} epochs: the method anneals by its own number of epochs; make them equal.",
                stacklevel=2,
            )

    @override
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.sync()
        if rank() == 0:
            content = {"version": VERSION, "sampler": self.sampler.state_dict(), "figures": dict(self._figures)}
            write_file(args, state, STATE_FILE, lambda path: torch.save(content, path))

    # --- epochs -------------------------------------------------------------------------------------------------------

    @override
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.sampler
        sampler.set_epoch(self._epoch)
        if self._batches is not None:
            sampler.epoch_samples = self._length * self._batches.batch_size * sampler.num_replicas
        plan = sampler.current_plan
        self._weighted, self._seen, self._step_before = plan.weights is not None, 0, sampler.step
        if sampler.consumed and self._figures:
            return  # resumed: those of the epoch's beginning
        summary = plan.summary(sampler.ledger)
        planned = np.zeros(sampler.size, dtype=bool)
        planned[np.asarray(plan.ids)] = True
        self._figures = {"kept": float(planned.mean())}  # an epoch may run through several plans
        self._figures |= {key: summary[key] for key in ("coverage", "ess", "staleness")}
        self._figures["plan_seconds"] = sampler.plan_seconds
        if self._batches is not None and len(plan) < sampler.size:
            self._figures["saved"] = 1 - len(plan) / sampler.size

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.sampler
        sampler.sync()
        if sampler.uses_losses and sampler.recording and self._seen and sampler.step == self._step_before:
            warnings.warn(
                f"attach: no loss was recorded in epoch {self._epoch}, so that nothing can be chosen by it; the "
                f"Trainer's training_step does not call compute_loss.",
                stacklevel=2,
            )
        figures = dict(self._figures)
        if rejected := sampler.ledger.rejected:
            figures["rejected"] = float(rejected)
            if state.is_world_process_zero:
                warnings.warn(
                    f"attach: {rejected} losses so far were not finite; they are left out of the ledger.", stacklevel=2
                )
        logs, control = control.should_log, self.trainer.control  # logging says that what was to be logged is
        # Not the Trainer's own method: trl's moves its metrics into whatever is logged first.
        transformers.Trainer.log(self.trainer, {f"samplewise/{name}": value for name, value in figures.items()})
        control.should_log = logs
        self._epoch += 1

    # --- batches ------------------------------------------------------------------------------------------------------

    def begin_batch(self, inputs: Any) -> None:
        """Take the ids out of a training batch.

        Raises:
            RuntimeError: it has none, or others than are due.
        """
        if not isinstance(inputs, MutableMapping) or SAMPLE_ID not in inputs:
            raise RuntimeError(
                "attach: a training batch carries no ids, so the loader is not the one that attach(trainer, sampler) "
                "made; change get_train_dataloader before attach, and give the loader to the Trainer as it is."
            )
        ids: Tensor = inputs.pop(SAMPLE_ID)
        self._lengths = inputs.pop(LENGTHS, None)
        if self._batches is not None and self._seen < BATCHES and self._in_order:
            check_batch(
                "attach",
                self.sampler,
                ids,
                "Leave the accelerator's dispatch_batches and split_batches, and what get_train_dataloader() gives, as "
                "they are.",
            )
        self._ids, self._samples, self._before = ids, ids.numel(), self.sampler.consumed

    def take_ids(self) -> Tensor | None:
        """The ids of the batch in progress, once."""
        ids, self._ids = self._ids, None
        return ids

    def end_batch(self) -> None:
        """Count the batch, observed or not."""
        self._seen += 1
        if self._batches is not None:
            self.sampler.advance_to(self._before + self._samples * self.sampler.num_replicas)

    def observe(self, ids: Tensor, loss: Tensor, step: Step, inputs: dict[str, Any], items: Any) -> Tensor:
        """Record the samples' losses.

        Args:
            ids: int64 (B,).
            loss: the Trainer's, a scalar with its graph.
            step: what the model gave.
            inputs: the batch, without ids.
            items: labels that count in the optimizer step, over all its batches; None where they were not counted.

        Returns:
            What to backpropagate: ``loss`` itself where the plan has no weights, or else with each sample's part of it
            times its weight.
        """
        watched = self._seen < BATCHES
        with torch.set_grad_enabled(self._weighted):
            rows = self.losses.of(step, inputs, ids.numel(), self._lengths)
            if self._weighted or watched:
                parts, gap = self.losses.parts(rows, loss, items)
        if watched:
            self.losses.check(step, rows, loss, gap)
        self.sampler.observe(ids, rows.losses.detach())
        if not self._weighted:
            return loss
        weights = self.sampler.ledger.weights(ids, device=parts.device)
        extra: Tensor = ((weights - 1) * parts).sum()
        return loss + extra.to(loss.device)


def _check_trainer(trainer: Any, sampler: PlannedSampler) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    if any(isinstance(other, SamplingCallback) for other in trainer.callback_handler.callbacks):
        raise RuntimeError("attach(trainer): it has a sampler already; make a new Trainer for another one.")
    if args.n_gpu > 1:
        raise ValueError(
            f"attach(trainer): torch.nn.DataParallel, which the Trainer uses for the {args.n_gpu} GPUs that one "
            f"process sees, gives no losses of single samples; start one process a GPU by torchrun or accelerate "
            f"launch, or set CUDA_VISIBLE_DEVICES to one."
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise ValueError(
            "attach(trainer): with tensor, context or sequence parallelism several ranks train on the same samples, "
            "which are counted once a rank; use data parallelism only (DDP, FSDP, DeepSpeed ZeRO)."
        )
    for name, wanted in (("ignore_data_skip", False), ("train_sampling_strategy", "random")):
        if (found := getattr(args, name)) != wanted and not (found is True and is_stream(trainer.train_dataset)):
            why = {
                "ignore_data_skip": "a resumed run would begin its epoch again, and passing over batches costs nothing",
                "train_sampling_strategy": "the sampler decides what comes when",
            }[name]
            raise ValueError(f"attach(trainer): {name}={found!r}, but {why}; set TrainingArguments({name}={wanted!r}).")
    if sampler.sharded and args.world_size > 1:
        raise ValueError(
            f"attach(trainer): the loader deals out the ids of all ranks, but each rank of a "
            f"{type(sampler).__name__}(sharded=True) knows its own only, and one rank saves the state; leave "
            f"sharded out."
        )
    if is_stream(trainer.train_dataset):
        return
    check_size(sampler, trainer.train_dataset)
    for name in ("dispatch_batches", "split_batches"):
        if getattr(accelerator, name):
            raise ValueError(
                f"attach(trainer): with {name}=True accelerate cuts batches up, and the Trainer counts them otherwise; "
                f"set TrainingArguments(accelerator_config={{'{name}': False}})."
            )
