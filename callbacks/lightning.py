"""SamplingCallback: a planned sampler in a Lightning training run, exact under changing epoch lengths and resume."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from samplewise.callbacks.guards import batch_size_of, check_validation, combined_loader, is_stream, planned_loader
from samplewise.loaders import PlannedSampler, ids_of
from samplewise.loaders.guard import BATCHES, check_batch
from samplewise.loaders.ids import _WithIds
from samplewise.loaders.shares import load_saved_state, saved_state

VERSION = 1

_PRIVATE = {
    # Lightning settles an epoch's length once, for all epochs. Where it keeps that length:
    "fit_loop._combined_loader": "its `limits` cut the epoch to `limit_train_batches`",
    "fit_loop.max_batches": "batches of the epoch, for accumulation, schedulers, validation, progress bars",
    "fit_loop._data_fetcher": "iterated anew where Lightning made the iterator before the state was restored",
    "val_check_batch": "batches between validations, from a share in `val_check_interval`",
    # Lightning's position in the run, to be made equal to the sampler's after a resume:
    "fit_loop.epoch_progress": "epochs done; set to the sampler's epoch",
    "fit_loop.epoch_loop.batch_progress": "batches done in the epoch; set where other ranks had done them",
    "fit_loop.epoch_loop._batches_that_stepped": "the loggers' step, not counted yet when the last batch is saved",
    "fit_loop._restarting": "whether Lightning would skip the beginning of the epoch",
    "fit_loop.epoch_loop.restarting": "whether Lightning keeps the count of the epoch's batches",
    "fit_loop.restarted_mid_epoch": "what kind of checkpoint it was",
    "fit_loop.reset_restart_stage": "makes it a beginning of an epoch",
    "fit_loop.epoch_loop.update_restart_stage": "makes it the middle of one",
}
"""Every field of the trainer that is not public API and is used here, and why."""


class SamplingCallback(Callback):
    """Joins a :class:`~samplewise.loaders.PlannedSampler` and a Lightning :class:`~lightning.pytorch.Trainer`.

    It keeps the trainer's lengths (batches, accumulation, validation, progress bars) those of each epoch's plan; merges
    the ranks' ledgers after each epoch; saves the sampler in checkpoints, and makes a run resumed from any of them
    go on exactly; stops losses of evaluation from being recorded; refuses to train where the loader no longer has the
    sampler; and logs, each epoch, ``samplewise/kept`` (planned samples over N), ``/saved`` (share of the samples of
    whole epochs that was not planned so far), ``/coverage``, ``/ess``, ``/staleness``, ``/plan_seconds``, and
    ``/rejected`` (non-finite losses so far, with a warning) where there are any.

    Some settings keep their meaning but look different with epochs of changing length: an int ``val_check_interval``
    beyond an epoch's batches skips that epoch's validation, with a warning (``check_val_every_n_epoch=None`` counts
    over epochs instead); ``trainer.estimated_stepping_batches`` takes the first epoch's length for all (use
    :class:`~samplewise.callbacks.BudgetSchedule`); and Lightning's warning of a loader that cannot resume is untrue.

    Args:
        sampler: the training loader's sampler, this very object.

    Raises:
        TypeError: ``sampler`` is no PlannedSampler.

    Example::

        sampler = MyMethod(len(train_set))  # any of samplewise.plugins
        loader = DataLoader(with_ids(train_set), batch_size=128, sampler=sampler)
        Trainer(max_epochs=30, callbacks=[SamplingCallback(sampler)]).fit(model, loader)
    """

    def __init__(self, sampler: PlannedSampler):
        if not isinstance(sampler, PlannedSampler):
            raise TypeError(
                f"SamplingCallback(sampler={type(sampler).__name__}): a PlannedSampler is needed, the one that the "
                f"training DataLoader has: SamplingCallback(sampler)."
            )
        self.sampler = sampler
        self._figures: dict[str, float] = {}  # of the current epoch's plan
        self._kept: list[float] = []  # share kept in each epoch that ended
        self._ended = -1  # the last epoch that ended
        self._batch_size: int | None = None
        self._step_before = -1  # batches observed before this epoch
        self._before: int | None = None  # samples consumed before the batch in progress
        self._recording = sampler.recording
        self._refuse_state = self._restored = self._stale = False
        self._unchecked = BATCHES
        self._wrapped = False  # whether a pair's first tensor is the ids, and not labels, say

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check_installed(trainer)
        _check_trainer(trainer, self.sampler)
        run: Any = trainer
        run.callbacks = [self, *(other for other in run.callbacks if other is not self)]  # progress bars read lengths
        epoch = run.fit_loop.epoch_progress.current.processed
        self.sampler.set_epoch(epoch)
        self.sampler.advance_to(0)  # a run that was interrupted starts its epoch again; a checkpoint comes after this
        self._ended, self._before, self._kept = epoch - 1, None, self._kept[:epoch]
        self._restored = self._stale = False
        self._unchecked = BATCHES

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refuse_state = trainer.state.fn != TrainerFn.FITTING  # `trainer.test(ckpt_path=...)` is no resume
        self._stale = trainer.train_dataloader is not None  # sharded strategies restore after the loader was iterated

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._refuse_state:
            return
        if state_dict.get("version") != VERSION:
            raise ValueError(
                f"SamplingCallback state: version {state_dict.get('version')} was saved, this release reads {VERSION}."
            )
        load_saved_state(self.sampler, state_dict["sampler"])
        self._figures, self._kept, self._ended = state_dict["figures"], state_dict["kept"], state_dict["ended"]
        self._restored = True

    @override
    def state_dict(self) -> dict[str, Any]:
        """What all ranks need; complete on the first one. Collective, like Lightning's saving itself."""
        return {
            "version": VERSION,
            "sampler": saved_state(self.sampler),
            "figures": dict(self._figures),
            "kept": list(self._kept),
            "ended": self._ended,
        }

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        planned_loader(trainer, self.sampler)
        check_validation(trainer, self.sampler)
        fit: Any = trainer.fit_loop
        epoch = fit.epoch_progress.current.processed
        if not self._restored and (epoch != self.sampler.epoch or fit.epoch_loop.restarting):
            warnings.warn(
                f"SamplingCallback: the checkpoint holds no state of it, so the sampler starts epoch {epoch} from its "
                f"beginning, with an empty ledger.",
                stacklevel=2,
            )
            self.sampler.set_epoch(epoch)
            self._restored = self._stale = True
        if self._restored:
            _align(trainer, self.sampler)
        self._settle(trainer)
        if self._stale:
            iter(fit._data_fetcher)
        self._restored = self._stale = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer)  # Lightning called set_epoch, and iterates the loader after this
        self._step_before = self.sampler.step
        if not self.sampler.consumed:
            summary = self.sampler.current_plan.summary(self.sampler.ledger)
            self._figures = {key: summary[key] for key in ("kept", "coverage", "ess", "staleness")}
            self._figures["plan_seconds"] = self.sampler.plan_seconds

    def _settle(self, trainer: Trainer) -> None:
        index = planned_loader(trainer, self.sampler)
        loader = combined_loader(trainer).flattened[index]
        if is_stream(loader):
            self._batch_size = None
            fit: Any = trainer.fit_loop
            self.sampler.set_epoch(fit.epoch_progress.current.processed)  # Lightning finds no sampler to tell
            return
        batches = _refresh_lengths(trainer, index, self.sampler)
        self._batch_size = batch_size_of(loader)
        if self._batch_size is not None:
            self.sampler.epoch_samples = _consumed_after(batches, self._batch_size, self.sampler)
        self._wrapped = isinstance(getattr(loader, "dataset", None), _WithIds)
        if not getattr(loader, "in_order", True) or combined_loader(trainer).iterables is not loader:
            self._unchecked = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = self.sampler.consumed
        if not (self._unchecked and self._batch_size is not None and (self._wrapped or isinstance(batch, Mapping))):
            return
        if (ids := ids_of(batch)) is not None:
            self._unchecked -= 1
            check_batch(
                "SamplingCallback",
                self.sampler,
                ids,
                "Let nothing stand between DataLoader(..., sampler=sampler) and the Trainer.",
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._batch_size is not None:
            self.sampler.advance_to(_consumed_after(batch_idx + 1, self._batch_size, self.sampler))
        elif (ids := ids_of(batch)) is not None:
            self.sampler.advance_to((self._before or 0) + ids.numel() * self.sampler.num_replicas)
        self._before = None
        if trainer.is_last_batch:
            self._end_epoch()

    def _end_epoch(self) -> None:
        """From here on, a checkpoint is one of the next epoch's start."""
        if self._ended != self.sampler.epoch:
            if self.sampler.uses_losses and self.sampler.recording and self.sampler.step == self._step_before:
                warnings.warn(
                    f"SamplingCallback: no loss was recorded in epoch {self.sampler.epoch}, so that nothing can be "
                    f"chosen by it. Return sampler.observe(ids, losses) from training_step.",
                    stacklevel=2,
                )
            self.sampler.epoch_samples = self.sampler.consumed
            self._kept.append(self._figures.get("kept", 1.0))
            self._ended = self.sampler.epoch

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # also where on_train_batch_start skipped the rest of the epoch
            self._end_epoch()
        self.sampler.sync()
        figures = {**self._figures, "saved": 1 - sum(self._kept) / max(len(self._kept), 1)}
        if rejected := self.sampler.ledger.rejected:
            figures["rejected"] = float(rejected)
            if trainer.is_global_zero:
                warnings.warn(
                    f"SamplingCallback: {rejected} losses so far were not finite; they are left out of the ledger.",
                    stacklevel=2,
                )
        figures = {f"samplewise/{name}": value for name, value in figures.items()}
        pl_module.log_dict(figures, batch_size=1, sync_dist=True)  # equal on all ranks, but for the seconds

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_validation(trainer, self.sampler)
        self._pause(trainer, pl_module)

    def _pause(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recording, self.sampler.recording = self.sampler.recording, False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sampler.recording = self._recording

    on_test_start = on_predict_start = _pause
    on_test_end = on_predict_end = on_validation_end

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not trainer.training:
            self.sampler.recording = self._recording
        elif self._before is not None:  # a batch that was not finished is trained on again after a resume
            self.sampler.advance_to(self._before)


# --- guards (trainer: Any below, since Lightning declares few of its attributes) --------------------------------------


def _check_installed(trainer: Any) -> None:
    for path, purpose in _PRIVATE.items():
        try:
            attrgetter(path)(trainer)
        except AttributeError:
            raise RuntimeError(
                f"SamplingCallback: lightning {lightning.__version__} has no trainer.{path} ({purpose}); it works with "
                f"lightning 2.6: pip install 'lightning>=2.6,<2.7'."
            ) from None


def _check_trainer(trainer: Any, sampler: PlannedSampler) -> None:
    if sum(isinstance(other, SamplingCallback) and other.sampler is sampler for other in trainer.callbacks) > 1:
        raise RuntimeError("SamplingCallback: two of them have the same sampler; give the trainer one.")
    epochs, planned = trainer.max_epochs, getattr(sampler, "epochs", None)
    if planned is not None and epochs is not None and epochs >= 0 and epochs != planned:
        warnings.warn(
            f"SamplingCallback: {type(sampler).__name__}(epochs={planned}), but Trainer(max_epochs={epochs}): the "
            f"method anneals by its own number of epochs; make them equal.",
            stacklevel=2,
        )
    if overfit := trainer.overfit_batches:
        raise RuntimeError(
            f"SamplingCallback: Trainer(overfit_batches={overfit}) makes Lightning replace the sampler by a sequential "
            f"one. Set Trainer(limit_train_batches={overfit}) instead, or leave the callback out."
        )
    ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    if (sampler.num_replicas, sampler.rank) != (ranks["num_replicas"], ranks["rank"]):
        raise RuntimeError(
            f"SamplingCallback: the sampler serves rank {sampler.rank} of {sampler.num_replicas}, but the trainer's "
            f"strategy feeds this process as rank {ranks['rank']} of {ranks['num_replicas']}. Leave the sampler's "
            f"num_replicas and rank at None, and use a data-parallel strategy (DDP, FSDP)."
        )


# --- lengths ----------------------------------------------------------------------------------------------------------


def _refresh_lengths(trainer: Any, index: int, sampler: PlannedSampler) -> int:
    """Tell the trainer how long this epoch is: the plan's batches, within ``limit_train_batches``."""
    combined, limit = combined_loader(trainer), trainer.limit_train_batches
    length = _length(combined.flattened[index], sampler)
    batches = min(length, limit) if isinstance(limit, int) else max(1, int(length * limit))
    assert combined.limits is not None
    combined.limits[index] = batches  # in place: the iterator in use reads the same list
    trainer.fit_loop.max_batches = total = len(combined)
    if total > batches:
        raise RuntimeError(
            f"SamplingCallback: the planned loader has {batches} batches in this epoch and another one {total}, so "
            f"Lightning would go through the plan more than once. Use CombinedLoader(loaders, mode='min_size')."
        )
    if trainer.val_check_batch is not None:  # None: validation goes by the clock
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(total * trainer.val_check_interval))
        elif trainer.val_check_batch > total and trainer.check_val_every_n_epoch is not None:
            _warn_no_validation(trainer, total)
    return batches


def _length(loader: Any, sampler: PlannedSampler) -> int:
    """Batches of the epoch, with those that other ranks trained on before a resume."""
    size = batch_size_of(loader)
    if not sampler.begin or size is None:
        return len(loader)
    left = (sampler.total_size - sampler.begin) // sampler.num_replicas
    return _batches_before(size, sampler) + (left // size if loader.drop_last else -(-left // size))


def _batches_before(size: int, sampler: PlannedSampler) -> int:
    """What the epoch's beginning, which another number of ranks trained on, would be in batches of these ranks."""
    return sampler.begin // (size * sampler.num_replicas)


def _consumed_after(batches: int, size: int, sampler: PlannedSampler) -> int:
    """Samples of the epoch, all ranks together, after so many batches of it."""
    return sampler.begin + (batches - _batches_before(size, sampler)) * size * sampler.num_replicas


def _warn_no_validation(trainer: Any, total: int) -> None:
    if trainer.enable_validation and trainer.is_global_zero:
        warnings.warn(
            f"SamplingCallback: epoch {trainer.current_epoch} has {total} batches, fewer than "
            f"Trainer(val_check_interval={trainer.val_check_interval}), so it has no validation. Set a share of the "
            f"epoch, or check_val_every_n_epoch=None to count batches over epochs.",
            stacklevel=2,
        )


# --- position ---------------------------------------------------------------------------------------------------------


def _align(trainer: Any, sampler: PlannedSampler) -> None:
    """Give Lightning the sampler's position after a resume; its own rules assume that all epochs are equally long.

    Saved in the middle of an epoch, both agree. Two cases remain: at an epoch's end Lightning would
    finish the old epoch once more, with the new one's length; and an epoch that was cut short (``max_steps``,
    a timer) it takes for done, but the samples that are left belong to it.
    """
    fit, inner = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if not sampler.consumed:
        if fit.restarted_mid_epoch and trainer.is_last_batch:
            inner._batches_that_stepped += 1
        fit._restarting = inner.restarting = False
    else:
        _check_batches_done(trainer, sampler)
        if fit.epoch_progress.current.processed == sampler.epoch:
            return
        inner.restarting = True
        inner.update_restart_stage()
    fit.reset_restart_stage()
    for done in (fit.epoch_progress.total, fit.epoch_progress.current):
        done.ready = done.started = done.processed = done.completed = sampler.epoch


def _check_batches_done(trainer: Any, sampler: PlannedSampler) -> None:
    loader = combined_loader(trainer).flattened[planned_loader(trainer, sampler)]
    if is_stream(loader):
        raise RuntimeError(
            f"SamplingCallback: the checkpoint is of the middle of epoch {sampler.epoch}, and Lightning does not save "
            f"the place in a stream. Resume from a checkpoint of an epoch's end, or train in a plain loop with "
            f"torchdata's StatefulDataLoader (samplewise.loaders.resumable)."
        )
    size, progress = batch_size_of(loader), trainer.fit_loop.epoch_loop.batch_progress.current
    if size is None or _consumed_after(progress.processed, size, sampler) == sampler.consumed:
        return
    if sampler.begin != sampler.consumed:
        raise RuntimeError(
            f"SamplingCallback: the checkpoint was saved after {progress.processed} batches and {sampler.consumed} "
            f"samples of epoch {sampler.epoch}, which are no batches of {size} on {sampler.num_replicas} ranks. Resume "
            f"with the same batch_size, or from a checkpoint of an epoch's end."
        )
    fewer = progress.processed - _batches_before(size, sampler)
    for count in ("ready", "started", "processed", "completed"):  # the last lags behind where a hook saved
        setattr(progress, count, getattr(progress, count) - fewer)
