"""What the callbacks that switch bit widths share: the model's layers, the step's configuration, the step's record."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from samplewise.cuda_ext.ranks import mean_over_ranks
from samplewise.loaders.schedule import Schedule
from samplewise.plugins.bit_adapters import (
    Site,
    drop_unsampled_gradients,
    find_layers,
    get_bits,
    gradient_norms,
    set_bits,
)

Config = int | Mapping[str, int]
"""One width for all layers, or a width for each layer's name."""


class Switch:
    """A schedule of bit widths at work on a model, one optimizer step after the other.

    Args:
        owner: the callback, for messages.
        schedule: draws ``{layer: width}``.
        evaluate: the configuration of evaluations, or a list with one for each of the evaluation's loaders; None: each
            layer's largest width.
    """

    def __init__(self, owner: str, schedule: Schedule, evaluate: Config | Sequence[Config] | None):
        if not isinstance(schedule, Schedule) or schedule.slots is None:
            raise TypeError(
                f"{owner}(schedule={type(schedule).__name__}): a Schedule with a slot for each layer is needed: "
                f"BitSchedule(layers=quantize_model(model))."
            )
        pins = list(evaluate) if isinstance(evaluate, Sequence) and not isinstance(evaluate, str) else [evaluate]
        if wrong := [pin for pin in pins if not (pin is None or isinstance(pin, Integral | Mapping))]:
            raise TypeError(f"{owner}(evaluate): must be widths or {{layer: width}}, one or a list; got {wrong[0]!r}.")
        if not pins:
            raise ValueError(
                f"{owner}(evaluate=[]): must hold at least one configuration; leave it out for the largest."
            )
        self.owner, self.schedule, self.pins = owner, schedule, pins
        self.sites: Mapping[str, Site] = {}
        self._losses: list[Tensor] = []
        self._norms: dict[str, Tensor] | None = None

    def find(self, model: nn.Module) -> None:
        """Look for the model's quantized layers, and check that schedule and evaluation fit them.

        Raises:
            ValueError: layers that the model does not have, layers that the schedule leaves out, or widths that a layer
                is not quantized at.
        """
        sites = find_layers(model)
        layers = self.schedule.slots or ()
        unknown, left = sorted(set(layers) - set(sites)), sorted(set(sites) - set(layers))
        if unknown:
            raise ValueError(
                f"{self.owner}(schedule): it has {len(unknown)} layers that the model does not have, such as "
                f"{unknown[0]!r}; give it the names that quantize_model(model) returned."
            )
        if left:
            raise ValueError(
                f"{self.owner}(schedule): it leaves out {len(left)} quantized layers of the model, such as {left[0]!r}."
            )
        for name, site in sites.items():
            if missing := set(self.schedule.arms) - set(site.linear.bits):
                raise ValueError(
                    f"{self.owner}(schedule): it draws {min(missing)} bits, and {name} is quantized at "
                    f"{', '.join(map(str, site.linear.bits))}."
                )
        before = get_bits(sites)
        for pin in self.pins:
            set_bits(sites, self._config(pin, sites))
        set_bits(sites, before)
        self.sites = sites

    def _config(self, pin: Config | None, sites: Mapping[str, Site]) -> Config:
        if not (pin is None or isinstance(pin, Mapping)):
            return int(pin)
        return {**{name: site.linear.bits[-1] for name, site in sites.items()}, **(pin or {})}

    def unfreeze(self) -> None:
        """Make all adapters trainable: peft's own switch, which loading may use, freezes all but one of a model."""
        for site in self.sites.values():
            if site.lora is not None:
                site.lora.set_requires_grad(list(site.lora.lora_A), True)

    def check_adapters(self) -> None:
        """Warn where the quantized layers, which are frozen, have nothing around them that is trained."""
        if all(site.lora is None for site in self.sites.values()):
            warnings.warn(
                f"{self.owner}: the quantized layers have no adapters, so that no width is trained; call "
                f"add_adapters(model) after quantize_model(model).",
                stacklevel=3,
            )

    def check_ddp(self, finds_unused: bool) -> None:
        """Refuse a DDP that waits for the gradients of adapters that a step does not use.

        Raises:
            RuntimeError: it does not look for unused parameters, and there are any.
        """
        if not finds_unused and any(len(site.adapters) > 1 for site in self.sites.values()):
            raise RuntimeError(
                f"{self.owner}: a step trains one adapter of each layer, and DDP waits for the gradients of all: "
                f"with Lightning take Trainer(strategy='ddp_find_unused_parameters_true'), with transformers "
                f"TrainingArguments(ddp_find_unused_parameters=True); and no static graph."
            )

    def begin(self, step: int) -> None:
        """The configuration of an optimizer step, before its first batch."""
        set_bits(self.sites, self.schedule.draw(step))

    def pin(self, loader: int = 0) -> None:
        """The configuration of an evaluation on its loader number ``loader``."""
        set_bits(self.sites, self._config(self.pins[loader if len(self.pins) > 1 else 0], self.sites))

    def before_optimizer(self) -> None:
        """Between the last backward pass of a step and the optimizer's step."""
        drop_unsampled_gradients(self.sites)
        if self.schedule.needs_scores:
            self._norms = gradient_norms(self.sites)

    def add_loss(self, loss: Tensor) -> None:
        """The loss of a batch of the step, or its share of the step's loss."""
        self._losses.append(loss.detach())

    def end(self, step: int, *, shares: bool) -> None:
        """After the optimizer's step: record it, with the sum of the batches' shares or their mean loss. Collective."""
        losses = torch.stack(self._losses) if self._losses else None
        loss = None if losses is None else mean_over_ranks(losses.sum() if shares else losses.mean())
        self.schedule.record(step, loss=loss, scores=self._norms)
        self._losses, self._norms = [], None

    def forget(self) -> None:
        """What a step has left that was not finished."""
        self._losses, self._norms = [], None
