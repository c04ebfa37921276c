"""What the quantisation recipe compares: who is trained at which bit widths, and with how many adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samplewise.loaders import PlannedSampler, Schedule
from samplewise.plugins import RS2, BitSchedule, InfoBatch, SeTa, Uniform

if TYPE_CHECKING:
    from samplewise.recipes.quant import QuantOptions

Config = dict[str, int]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for files.
        label: for people.
        mapping: of the schedule; None: each run has one configuration, and that of rounding no training.
        shared: one adapter for all widths of a layer.
    """

    name: str
    label: str
    mapping: str | None = None
    shared: bool = False

    @property
    def colour(self) -> int:
        """Its number in the plots."""
        return list(ARMS).index(self.name)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("rtn", "Rounded to nearest, not trained"),
        Arm("single", "A run for each average"),
        Arm("uniform", "Once for all, uniform draws", "uniform"),
        Arm("balanced", "Once for all, balanced", "maxent"),
        Arm("shared", "Balanced, shared adapters", "maxent", shared=True),
        Arm("adjacent", "Balanced by adjacent widths", "adjacent"),
        Arm("gaussian", "Balanced by a Gaussian", "gaussian"),
        Arm("loss", "By the loss of each width", "loss"),
        Arm("grad_norm", "By the gradient norm", "grad_norm"),
        Arm("uniform_shared", "Uniform, shared adapters", "uniform", shared=True),
    )
}


def make_schedule(arm: Arm, layers: Sequence[str], seed: int, options: "QuantOptions") -> Schedule:
    """The schedule of a once-for-all arm."""
    given: dict[str, Any] = {"mapping": arm.mapping, "period": options.wave, "seed": seed}
    return BitSchedule(layers=layers, bits=options.bits, **given)


def make_sampler(size: int, steps: int, seed: int, options: "QuantOptions") -> PlannedSampler:
    """What chooses the pairs."""
    epochs = max(1, -(-steps * options.batch_size // size))
    if options.sampler == "rs2":
        return RS2(size, ratio=options.rs2_ratio, seed=seed)
    if options.sampler == "infobatch":
        return InfoBatch(size, epochs=epochs, seed=seed)
    if options.sampler == "seta":
        return SeTa(size, epochs=epochs, seed=seed)
    return Uniform(size, seed=seed)
