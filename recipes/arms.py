"""What the prune recipe compares: the methods, and controls that train for as many optimizer steps as each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.optim import Optimizer
from typing_extensions import override

from samplewise.callbacks import BudgetSchedule
from samplewise.loaders import PlannedSampler
from samplewise.plugins import RS2, InfoBatch, SeTa, Uniform

if TYPE_CHECKING:
    from samplewise.recipes.prune import PruneOptions

LABELS = {"uniform": "Uniform", "rs2": "RS2", "infobatch": "InfoBatch", "seta": "SeTa"}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        method: a key of `LABELS`.
        equal_to: for a control, the method whose number of optimizer steps it gets; else None.
    """

    method: str
    equal_to: str | None = None

    @property
    def name(self) -> str:
        """For files: `seta`, `uniform@seta`."""
        return self.method if self.equal_to is None else f"{self.method}@{self.equal_to}"

    @property
    def label(self) -> str:
        """For people: `SeTa`, `Uniform, steps of SeTa`."""
        name = LABELS[self.method]
        return name if self.equal_to is None else f"{name}, steps of {LABELS[self.equal_to]}"

    @property
    def colour(self) -> int:
        """The colour's number in the plots; a control has that of the method it controls for."""
        return list(LABELS).index(self.equal_to or self.method)


def plan_arms(methods: Sequence[str], controls: Sequence[str]) -> list[Arm]:
    """The methods, then each pruning method's controls; they come last, since they need its number of steps.

    >>> [arm.name for arm in plan_arms(["uniform", "seta"], ["uniform", "rs2"])]
    ['uniform', 'seta', 'uniform@seta', 'rs2@seta']
    """
    pruning = [method for method in methods if method != "uniform"]
    pairs = [Arm(control, method) for method in pruning for control in controls if control != method]
    return [*(Arm(method) for method in methods), *pairs]


class SameRates(BudgetSchedule):
    """Gives a control, step for step, the learning rates that the method it controls for had.

    A method's schedule follows its epochs, which are not equally long, so that a control's own schedule would spend
    other shares of the steps at high and low rates.

    Args:
        optimizer: as for BudgetSchedule.
        sampler: the control's.
        ends: optimizer steps that the method had taken at the end of each epoch.
        warmup: as for BudgetSchedule.
    """

    def __init__(self, optimizer: Optimizer, sampler: PlannedSampler, ends: Sequence[int], *, warmup: float):
        self.ends = ends
        super().__init__(optimizer, sampler, steps=ends[-1], warmup=warmup)

    @property
    @override
    def share(self) -> float:
        """The method's share of the budget after as many steps."""
        epochs = len(self.ends)
        return float(np.interp(self.last_epoch, [0, *self.ends], np.arange(epochs + 1) / epochs))


def make_schedule(
    optimizer: Optimizer, sampler: PlannedSampler, epochs: int, ends: Sequence[int] = ()
) -> BudgetSchedule:
    """Warm-up over 5 % of the budget, then a cosine down to 0; with `ends`, a control's, see `SameRates`."""
    if ends:
        return SameRates(optimizer, sampler, ends, warmup=0.05)
    return BudgetSchedule(optimizer, sampler, epochs=epochs, warmup=0.05)


def make_sampler(arm: Arm, size: int, seed: int, options: "PruneOptions", steps: int = 0) -> PlannedSampler:
    """The arm's sampler over `size` samples; `steps` is the number of optimizer steps that a control gets."""
    ratio = options.rs2_ratio
    if arm.equal_to is not None:  # whole batches in each of the epochs, rounded up: the trainer stops at `steps`
        batches = -(-steps // options.epochs)
        ratio = min(1.0, batches * options.batch_size * options.devices / size)
    annealed: dict[str, Any] = {"epochs": options.epochs, "anneal_from": options.anneal_from}
    make: Mapping[str, Callable[[], PlannedSampler]] = {
        "uniform": lambda: Uniform(size, seed=seed),
        "rs2": lambda: RS2(size, ratio=ratio, seed=seed),
        "infobatch": lambda: InfoBatch(size, prune=options.infobatch_prune, seed=seed, **annealed),
        "seta": lambda: SeTa(
            size,
            prune=options.seta_prune,
            groups=options.seta_groups,
            window=options.seta_window,
            seed=seed,
            **annealed,
        ),
    }
    return make[arm.method]()
