"""Each sample's loss in a training step of the HF Trainer, whatever its loss is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from samplewise.callbacks.head_losses import IGNORED, HeadLosses, log_probabilities, of_head, row_by_row, shares, value
from samplewise.callbacks.huggingface import Losses

TOLERANCE = 0.02
"""By how much, relatively, the samples' losses may miss the Trainer's: bfloat16 has 8 bits."""


class Step:
    """What one call of ``compute_loss`` did: the model's first outputs with a graph, and its call of a loss function.

    Attributes:
        outputs: None where the model was not called.
        call: function, arguments and keyword arguments; None where none of the model's own was called.
    """

    def __init__(self) -> None:
        self.outputs: Any = None
        self.call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None

    def _forward(self, module: Any, args: Any, outputs: Any) -> None:
        if self.outputs is None and torch.is_grad_enabled():
            self.outputs = outputs

    @contextmanager
    def watched(self, model: Any, base: Any, function: Callable[..., Any] | None) -> Iterator[None]:
        """Write down what happens inside; ``function`` is the model's own where its call is needed."""
        hook = model.register_forward_hook(self._forward)
        set_before = vars(base).get("_loss_function")

        def recorded(*args: Any, **kwargs: Any) -> Any:
            assert function is not None
            self.call = function, args, kwargs
            return function(*args, **kwargs)

        if function is not None:
            base._loss_function = recorded
        try:
            yield
        finally:
            hook.remove()
            if function is not None:
                if set_before is None:
                    del base._loss_function
                else:
                    base._loss_function = set_before


class StepLosses:
    """Gives the Trainer's loss and the samples', and weighs them.

    Args:
        trainer: a ``transformers.Trainer``.
        losses: the user's own function, or None.
    """

    def __init__(self, trainer: Any, losses: Losses | None):
        self.trainer, self.own = trainer, losses

    def base(self) -> Any:
        """The model of transformers, under what peft and accelerate put around it."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def loss_function(self, base: Any) -> tuple[Callable[..., Any] | None, bool]:
        """The model's loss function where it has to be called row by row, and whether it shifts labels."""
        from transformers.loss import loss_utils

        kind: Any = getattr(base, "loss_type", None)
        usual = loss_utils.LOSS_MAPPING.get(kind, loss_utils.ForCausalLMLoss)
        function = vars(base).get("_loss_function", usual)
        shifts = usual is loss_utils.ForCausalLMLoss and hasattr(base, "loss_type")
        known = {
            loss_utils.ForCausalLMLoss,
            loss_utils.ForMaskedLMLoss,
            loss_utils.ForQuestionAnsweringLoss,
            loss_utils.ForSequenceClassificationLoss,
            loss_utils.ForTokenClassification,
        }
        encodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        return None if function in known else function, shifts and not encodes

    def watch(self) -> tuple[Any, Callable[..., Any] | None]:
        """The model, and its loss function where its call has to be written down."""
        base = self.base()
        trainer = self.trainer
        if self.own is not None or trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            return base, None
        return base, self.loss_function(base)[0]

    def of(self, step: Step, inputs: Mapping[str, Any], samples: int, lengths: Tensor | None = None) -> HeadLosses:
        """The samples' losses in the order of the batch.

        Args:
            step: what happened.
            inputs: the batch as the Trainer got it, without ids.
            samples: B.
            lengths: int64 (B,), tokens of each sample where they are laid end to end, in one row.

        Raises:
            RuntimeError: they cannot be told from what the model gave.
        """
        outputs = step.outputs
        if outputs is None:
            raise RuntimeError(
                "attach: compute_loss did not call the model that it was given, so that there is nothing to take the "
                "samples' losses from; in your Trainer's compute_loss, call model(**inputs)."
            )
        if self.own is not None:
            return _checked(self.own(outputs, inputs), samples)
        rows = self._rows(step, inputs, samples, lengths)
        if rows is None:
            raise RuntimeError(_missing(outputs, inputs))
        if len(rows.losses) != samples:
            raise RuntimeError(
                f"attach: the batch has {samples} samples, but the model's outputs have {len(rows.losses)} rows, so "
                f"that no loss belongs to one sample; have the collate function give a row a sample, or give "
                f"attach(..., losses=function)."
            )
        return rows

    def _rows(self, step: Step, inputs: Mapping[str, Any], samples: int, lengths: Tensor | None) -> HeadLosses | None:
        trainer, outputs, base = self.trainer, step.outputs, self.base()
        function, causal = self.loss_function(base)
        logs, labels = value(outputs, "log_probs"), inputs.get("labels")
        if isinstance(logs, Tensor) and isinstance(value(outputs, "label_mask"), Tensor):  # trl's fused head
            dynamic = getattr(trainer.args, "loss_type", "nll") == "dft"
            return log_probabilities(logs, outputs.label_mask, dynamic=dynamic, lengths=lengths)
        if lengths is not None and (trainer.compute_loss_func or trainer.label_smoother or function):
            raise RuntimeError(
                f"attach: {samples} samples are laid end to end in one row, whose loss is told sample by sample for "
                f"the usual loss of language models only; set SFTConfig(padding_free=False), with packing=True also "
                f"packing_strategy='wrapped', or give attach(..., losses=function)."
            )
        if trainer.compute_loss_func is not None:
            counts = _counts(labels, samples, trainer._loss_shifts_labels)

            def given(outputs: Any, labels: Any, count: Tensor) -> Any:
                return trainer.compute_loss_func(outputs, labels, num_items_in_batch=count.reshape(()))

            return _rows_of(counts, given, outputs, labels, counts.clamp_min(1))
        if trainer.label_smoother is not None and labels is not None:
            from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

            shift = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            counts = _counts(labels, samples, shift)
            return _rows_of(counts, trainer.label_smoother, outputs, labels, shift_labels=shift)
        if function is not None:
            if step.call is None:
                return None
            _, args, named = step.call
            named = {name: given for name, given in named.items() if name != "num_items_in_batch"}
            return _rows_of(_counts(labels, samples, trainer._loss_shifts_labels), function, *args, **named)
        problem = getattr(getattr(base, "config", None), "problem_type", None)
        return of_head(outputs, inputs, causal=causal, problem=problem, lengths=lengths)

    def parts(self, rows: HeadLosses, loss: Tensor, items: Any) -> tuple[Tensor, Tensor]:
        """What each sample adds to the Trainer's loss, (B,), and by how much their sum misses it."""
        trainer = self.trainer
        ranks = 1
        if trainer.args.average_tokens_across_devices:
            ranks = trainer.accelerator.num_processes
        steps = trainer.current_gradient_accumulation_steps
        return shares(rows, loss, items, ranks, steps, means=self.own is not None)

    def check(self, step: Step, rows: HeadLosses, loss: Tensor, gap: Tensor) -> None:
        """Raise where the samples' losses do not make up the Trainer's.

        Raises:
            RuntimeError: they do not, so that they are losses of something else.
        """
        total, missed = float(loss.detach()), float(gap)
        if self.own is not None or value(step.outputs, "aux_loss") is not None:
            return
        if missed > TOLERANCE * abs(total) + 1e-3 and total == total:
            mean = float(rows.losses.mean())
            raise RuntimeError(
                f"attach: the Trainer's loss is {total:.6g}, but the samples' losses, of mean {mean:.6g}, do not make "
                f"it up: it is of another kind than those of the usual heads, or has further terms. Give "
                f"attach(..., losses=function), with function(outputs, inputs) -> (B,)."
            )


def _rows_of(counts: Tensor, function: Callable[..., Any], *args: Any, **kwargs: Any) -> HeadLosses:
    losses = row_by_row(function, len(counts), *args, **kwargs)
    return HeadLosses(torch.where(counts.to(losses.device) > 0, losses, 0.0), counts.to(losses.device))


def _counts(labels: Any, samples: int, shift: bool) -> Tensor:
    """How many labels count in each sample: (B,), 1 where there is no telling."""
    if not isinstance(labels, Tensor) or len(labels) != samples or labels.is_floating_point():
        return torch.ones(samples, dtype=torch.int64)
    counted = labels.reshape(samples, -1) != IGNORED
    return (counted[:, 1:] if shift and labels.dim() > 1 else counted).sum(1)


def _checked(losses: Any, samples: int) -> HeadLosses:
    if not isinstance(losses, Tensor) or losses.shape != (samples,) or not losses.is_floating_point():
        found = f"{losses.dtype}{tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"attach(losses=...): losses must give one loss a sample, floating point ({samples},), but gave {found}; "
            f"leave out the reduction over the batch."
        )
    return HeadLosses(losses.float(), torch.ones_like(losses, dtype=torch.float32))


def _missing(outputs: Any, inputs: Mapping[str, Any]) -> str:
    names = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    if value(outputs, "logits", 1) is None:
        return (
            f"attach: the model gave no logits ({names}), so that no sample's loss can be told: fused losses leave "
            f"them out. Set TrainingArguments(use_liger_kernel=False), or liger_kernel_config="
            f"{{'fused_linear_cross_entropy': False}}, or give attach(..., losses=function)."
        )
    return (
        f"attach: no loss of single samples is known for this model, which gave {names} for {', '.join(inputs)}. Give "
        f"attach(..., losses=function), with function(outputs, inputs) -> (B,)."
    )
