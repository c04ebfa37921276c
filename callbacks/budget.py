"""BudgetSchedule: the learning rate as a function of the share of the training budget that is spent.

An epoch of a planned run has any length, so a schedule in steps (or Lightning's ``estimated_stepping_batches``, which
takes the first epoch's length for all) ends too early or never. The share z in [0, 1] of the budget is right always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from samplewise.cuda_ext.checks import integer, share
from samplewise.loaders import PlannedSampler

Shape = Literal["cosine", "linear", "rex"]


def cosine(z: float) -> float:
    """Half a cosine wave: ``(1 + cos(pi z)) / 2``."""
    return (1 + math.cos(math.pi * z)) / 2


def linear(z: float) -> float:
    """A straight line: ``1 - z``."""
    return 1 - z


def rex(z: float) -> float:
    """REX (Chen et al., MLSys 2022), high for long and steep at the end: ``(1 - z) / (1/2 + (1 - z)/2)``."""
    return (1 - z) / (0.5 + (1 - z) / 2)


SHAPES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "rex": rex}


class BudgetSchedule(LRScheduler):
    """Sets each parameter group's learning rate to its initial one times a function of the budget's spent share z.

    With ``epochs``, ``z = sampler.progress / epochs``: it follows the samples trained on, whatever the epochs' lengths,
    and is 1 exactly at the end of the last epoch. With ``steps``, ``z`` is the share of so many calls of :meth:`step`.
    Call :meth:`step` after each optimizer step; in Lightning, return
    ``{"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}``.

    Args:
        optimizer: its groups' present learning rates are the highest ones.
        sampler: the training loader's sampler.
        epochs: the budget in epochs, > 0; or else
        steps: the budget in optimizer steps, > 0.
        shape: ``"cosine"``, ``"linear"`` or ``"rex"``.
        warmup: share of the budget, in [0, 1), in which the rate rises from 0 in a straight line; the shape then takes
            up what is left of the budget.

    Raises:
        TypeError: ``sampler`` is no PlannedSampler.
        ValueError: not exactly one of ``epochs`` and ``steps``, or one of them, ``shape`` or ``warmup`` out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sampler: PlannedSampler,
        *,
        epochs: float | None = None,
        steps: int | None = None,
        shape: Shape = "cosine",
        warmup: float = 0.0,
    ):
        if not isinstance(sampler, PlannedSampler):
            raise TypeError(f"BudgetSchedule(sampler={type(sampler).__name__}): the training loader's PlannedSampler.")
        if (epochs is None) == (steps is None):
            raise ValueError(
                f"BudgetSchedule(epochs={epochs}, steps={steps}): give the budget once, in epochs or in steps."
            )
        owner = "BudgetSchedule"
        if epochs is not None:
            epochs = share(owner, "epochs", epochs, high=math.inf, ends="()", what="the budget")
        if steps is not None:
            steps = integer(owner, "steps", steps, 1, what="the budget")
        if not isinstance(shape, str) or shape not in SHAPES:
            raise ValueError(f"{owner}(shape={shape!r}): there are {', '.join(map(repr, SHAPES))}.")
        warmup = share(owner, "warmup", warmup, ends="[)", what="a share of the budget")
        self.sampler, self.epochs, self.steps, self.shape, self.warmup = sampler, epochs, steps, shape, warmup
        super().__init__(optimizer)

    @property
    def share(self) -> float:
        """z, the share of the budget that is spent, in [0, 1]."""
        if self.epochs is not None:
            return min(1.0, self.sampler.progress / self.epochs)
        assert self.steps is not None
        return min(1.0, self.last_epoch / self.steps)  # last_epoch is torch's name for the calls of step()

    def factor(self, z: float) -> float:
        """What the initial rates are multiplied with at share ``z`` in [0, 1]."""
        if z < self.warmup:
            return z / self.warmup
        return SHAPES[self.shape]((z - self.warmup) / (1 - self.warmup))

    @override
    def get_lr(self) -> list[float | Tensor]:
        """The rates at the present share, one a parameter group."""
        factor = self.factor(self.share)
        return [rate * factor for rate in self.base_lrs]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Numbers only. The budget and the shape are the constructor's: a run may be resumed with a longer budget."""
        own = ("sampler", "epochs", "steps", "shape", "warmup")
        return {key: value for key, value in super().state_dict().items() if key not in own}
