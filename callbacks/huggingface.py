"""`attach`: the HF Trainer with a planned sampler or a schedule of bit widths, accelerate with a sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from samplewise.loaders.sampler import PlannedSampler
from samplewise.loaders.schedule import Schedule

if TYPE_CHECKING:
    from samplewise.callbacks.switching import Config

Losses = Callable[[Any, Mapping[str, Any]], Tensor]
"""``(outputs of the model, the batch that it got) -> losses of the samples, (B,)``, with their graph."""


def attach(
    target: Any,
    what: Any,
    *,
    evaluate: Config | Sequence[Config] | None = None,
    losses: Losses | None = None,
) -> Any:
    """Join a ``transformers.Trainer`` (trl's ``SFTTrainer`` too) and a planned sampler, or a schedule of bit widths.

    ::

        sampler = MyMethod(len(trainer.train_dataset))  # any of samplewise.plugins
        attach(trainer, sampler)
        trainer.train()

    **A sampler** decides what the Trainer trains on. Its ids enter in the collator and leave before the model, so that
    ``remove_unused_columns`` may stay as it is. Each sample's own loss is recorded in training, never in evaluations.
    What is backpropagated is the Trainer's loss, in which each sample counts by the plan's weight where it has weights;
    without them, and where all are 1, it is exactly the Trainer's.

    - Epochs have a constant length, since a Trainer counts its steps beforehand: that of the sampler's first plan, or
      its ``epoch_length``. They run through consecutive plans, and the learning rate reaches its end.
    - ``samplewise_sampler.pt`` in each checkpoint holds ledger and position. Runs go on exactly from any of them, also
      on another number of ranks, with the same samples an optimizer step; passing over what is done costs nothing.
    - ``samplewise/kept`` (share of the data set in the epoch's plan), ``/coverage``, ``/ess``, ``/staleness``,
      ``/plan_seconds``, ``/saved`` (where an epoch is shorter than the data set) and ``/rejected`` (non-finite losses
      so far, with a warning) are logged at each epoch's end.
    - An ``IterableDataset`` whose items carry their ids (``samplewise.loaders.streams``) is not sharded or dispatched
      once more: it shards itself by rank. Give ``max_steps``. A Trainer does not save the place in it: a run
      resumes with ``ignore_data_skip=True`` only, which begins the epoch again, with the ledger restored.

    **A schedule** draws one configuration of bit widths for each optimizer step, see
    :class:`~samplewise.callbacks.SwitchBits`, the same for Lightning. Between optimizer steps the model has the
    configuration of evaluations, so that these, predictions and what is saved are made with it.

    Both can be attached to one Trainer.

    **A loop with accelerate**: ``loader = accelerator.prepare(loader)``, then ``attach(accelerator, loader)``, so that
    the loader's planned sampler knows who deals out its ids, and is saved with the accelerator's state.

    Args:
        target: a Trainer before ``train()``, or an ``accelerate.Accelerator``.
        what: the sampler, made with ``len(trainer.train_dataset)``; or a schedule that draws ``{layer: width}``, where
            the Trainer's model has quantized layers and adapters; or the Accelerator's prepared loader.
        evaluate: of a schedule: the configuration of evaluations; layers that it does not name, and None: the layer's
            largest width. To evaluate at another after the training, call ``set_bits(trainer.model, config)`` first.
        losses: of a sampler: what gives each sample's loss, for models whose heads are not the usual ones. None: cross
            entropies of tokens or classes, squared errors, binary cross entropies, or else the model's or the Trainer's
            own loss function, row by row. Weights then apply to ``mean(losses)``.

    Returns:
        The callback that the Trainer has now; with an Accelerator, the loader's sampler.

    Raises:
        TypeError: ``target`` or ``what`` is none of these, or an option belongs to the other.
        ValueError: another size than the data set's, or settings of the Trainer that contradict; layers or widths that
            the model does not have, or more than one configuration for evaluations.
        RuntimeError: a second one of the same kind.

    Example::

        trainer = Trainer(model, TrainingArguments(..., ddp_find_unused_parameters=True), train_dataset=data)
        attach(trainer, BitSchedule(layers=layers, period=500))
        trainer.train()
    """
    accelerate: Any = sys.modules.get("accelerate")
    if accelerate is not None and isinstance(target, accelerate.Accelerator):
        _refuse(evaluate=evaluate, losses=losses)
        from samplewise.callbacks.accelerate_loops import attach_accelerator

        return attach_accelerator(target, what)
    from samplewise.callbacks.huggingface_state import transformers

    if not isinstance(target, transformers.Trainer):
        raise TypeError(
            f"attach(target={type(target).__name__}): a transformers.Trainer is needed, or an accelerate.Accelerator."
        )
    if isinstance(what, PlannedSampler):
        _refuse(evaluate=evaluate)
        from samplewise.callbacks.huggingface_sampling import attach_sampler

        return attach_sampler(target, what, losses)
    if not isinstance(what, Schedule):
        raise TypeError(f"attach(trainer, what={type(what).__name__}): a PlannedSampler or a Schedule is needed.")
    _refuse(losses=losses)
    from samplewise.callbacks.huggingface_bits import attach_schedule

    return attach_schedule(target, what, evaluate)


def _refuse(**options: Any) -> None:
    for name, given in options.items():
        if given is not None:
            raise TypeError(
                f"attach({name}=...): belongs to another use of attach, see its documentation; leave it out."
            )
