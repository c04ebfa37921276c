"""Which bit width each layer has in a step: one fine-tuning run that serves every width.

"One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments" (Yi et al., ACL 2025, LLM-QFA). A
step draws one width per layer and trains the adapters of those widths. Drawn uniformly, the average width of 224 layers
has a standard deviation of .054 around 3: configurations near 2 or 4 bits are never trained. The resource-balanced
schedule lets the expected average follow a triangular wave over a period P of optimizer steps,

    m(t) = b_1 + (b_K - b_1) |2 (t mod P) / P - 1|,

which visits every average equally often. From the average to probabilities of the widths [ours], all with mean m(t):

    maxent    p_b ~ exp(theta b)                     the most varied configurations at an average; middle widths rarest
    adjacent  the two widths beside m(t)             the least varied: 2 and 4 bits never meet; middle widths commonest
    gaussian  p_b ~ exp(theta b - (b / gap)^2)       between the two; gap: the mean distance between widths

(shares of 2, 3 and 4 bits: .38/.24/.38, .25/.50/.25, .31/.37/.31). Beside these ``uniform``, and two that follow what
was trained (PA&DA, Lu et al., CVPR 2023): ``loss`` and ``grad_norm`` draw a layer's width in proportion to the running
mean of the losses, or of its adapter's gradient norms, at that width, mixed with a share of uniform draws; their draws
wait for the step before on its device, the others for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.loaders.schedule import Schedule
from samplewise.loaders.seeding import derive
from samplewise.plugins.quantize import check_bits

MappingName = Literal["maxent", "adjacent", "gaussian", "uniform", "loss", "grad_norm"]
BALANCED, ADAPTIVE = ("maxent", "adjacent", "gaussian"), ("loss", "grad_norm")
_SPREAD = {"maxent": np.inf, "gaussian": np.sqrt(0.5)}  # of the Gaussian over the costs, in mean distances between them


def triangle(step: int, period: int, low: float, high: float) -> float:
    """The triangular wave ``low + (high - low) |2 (step mod period) / period - 1|``: it begins at ``high``."""
    return min(high, low + (high - low) * abs(2 * (step % period) / period - 1))  # rounding may carry it past high


def tilted(costs: np.ndarray, mean: float, spread: float = np.inf) -> np.ndarray:
    """The distribution over ``costs`` with this mean that is nearest to a wide Gaussian: ``exp(theta c - (c/s)^2/2)``.

    Args:
        costs: float64 ``(K,)``, ascending.
        mean: within their range.
        spread: s, the Gaussian's standard deviation; infinite: the maximum-entropy distribution.

    Returns:
        Float64 ``(K,)``, sums to 1; its mean is right within 1e-12 of the range (tested to 25 costs).

    Raises:
        ValueError: a mean out of range.
    """
    low, high = float(costs[0]), float(costs[-1])
    if not low <= mean <= high:
        raise ValueError(f"tilted(mean={mean}): must be between the least and the largest cost, {low:g} and {high:g}.")
    if mean in (low, high):
        return np.where(costs == mean, 1.0, 0.0)
    places = (costs - (low + high) / 2) / (high - low)  # in [-1/2, 1/2]
    target = (mean - (low + high) / 2) / (high - low)
    base = -0.5 * (places * (high - low) / spread) ** 2
    theta, left, right = 0.0, -np.inf, np.inf
    for _ in range(200):  # Newton's method, kept between the bounds that are known: the mean grows with theta
        weights = np.exp(base + theta * places - np.max(base + theta * places))
        weights /= weights.sum()
        found = float(weights @ places)
        if abs(found - target) < 1e-14:
            break
        left, right = (theta, right) if found < target else (left, theta)
        theta += (target - found) / max(float(weights @ (places - found) ** 2), 1e-300)
        if not left < theta < right:
            theta = (
                (left + right) / 2
                if np.isfinite(left + right)
                else 2 * (left if np.isfinite(left) else right) + np.sign(target - found)
            )
    return weights


def adjacent(costs: np.ndarray, mean: float) -> np.ndarray:
    """The distribution with this mean over the two costs beside it: float64 ``(K,)``.

    Raises:
        ValueError: a mean out of range.
    """
    if not costs[0] <= mean <= costs[-1]:
        raise ValueError(
            f"adjacent(mean={mean}): must be between the least and the largest cost, {costs[0]:g} and {costs[-1]:g}."
        )
    probabilities = np.zeros(len(costs))
    above = min(int(np.searchsorted(costs, mean, side="right")), len(costs) - 1)
    below = max(above - 1, 0)
    upper = 1.0 if above == below else (mean - costs[below]) / (costs[above] - costs[below])
    probabilities[below] = 1 - upper
    probabilities[above] += upper
    return probabilities


def in_proportion(values: np.ndarray, uniform_share: float) -> np.ndarray:
    """Each row's probabilities: in proportion to its values, mixed with uniform ones.

    Args:
        values: float64 ``(S, K)``, running means; NaN where there is none yet, which counts as the row's mean.
        uniform_share: u in ``u / K + (1 - u) v_k / sum(v)``, in [0, 1].

    Returns:
        Float64 ``(S, K)``; a row without positive values is uniform.
    """
    seen = np.isfinite(values)
    known = np.where(seen, np.maximum(values, 0), 0)
    means = known.sum(1, keepdims=True) / np.maximum(seen.sum(1, keepdims=True), 1)
    filled = np.where(seen, known, means)
    totals = filled.sum(1, keepdims=True)
    even = np.full_like(filled, 1 / filled.shape[1])
    return uniform_share * even + (1 - uniform_share) * np.where(
        totals > 0, filled / np.where(totals > 0, totals, 1), even
    )


class ArmSchedule(Schedule):
    """Arms by a mapping of this module's: for any setting that has a cost and may differ from step to step.

    Args:
        arms: K values, such as lengths or ranks.
        slots: S names, each with an arm of its own in a step; None: one arm a step.
        costs: a number for each arm, ascending; None: the arms themselves, where they are numbers, else 0 to K - 1.
        mapping: ``"maxent"``, ``"adjacent"`` or ``"gaussian"`` (balanced over a period), ``"uniform"``, ``"loss"`` or
            ``"grad_norm"`` (in proportion to what was recorded).
        period: P, optimizer steps in which the expected average goes from the largest cost to the least and back.
        uniform_share: of the draws with ``"loss"`` and ``"grad_norm"``, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError: arms that are none, twice or not ascending in cost, an unknown mapping, a period below 2.

    Example::

        lengths = ArmSchedule(arms=[128, 256, 512, 1024], period=1000)
        batch = {name: values[:, : lengths.draw(step)] for name, values in batch.items()}
    """

    def __init__(
        self,
        *,
        arms: Sequence[Any],
        slots: Sequence[str] | None = None,
        costs: Sequence[float] | None = None,
        mapping: MappingName = "maxent",
        period: int = 8000,
        uniform_share: float = 0.2,
        seed: int = 0,
        **options: Any,
    ):
        owner = type(self).__name__
        choice(owner, "mapping", mapping, *BALANCED, "uniform", *ADAPTIVE)
        self.mapping, self.needs_loss, self.needs_scores = mapping, mapping == "loss", mapping == "grad_norm"
        self.period = integer(owner, "period", period, 2, what="the length of a wave in optimizer steps")
        self.uniform_share = share(owner, "uniform_share", uniform_share, what="a share of the draws")
        super().__init__(arms=arms, slots=slots, costs=costs, seed=seed, **options)

    def target(self, step: int) -> float:
        """The expected average cost of a step; with ``"loss"`` and ``"grad_norm"`` as things are now."""
        return float((np.atleast_2d(self.probabilities(step)) @ self.costs).mean())

    @override
    def probabilities(self, step: int) -> np.ndarray:
        if self.mapping == "uniform":
            return np.full(len(self.arms), 1 / len(self.arms))
        if self.mapping in ADAPTIVE:
            return in_proportion(self.losses if self.mapping == "loss" else self.scores, self.uniform_share)
        mean = triangle(step, self.period, self.costs[0], self.costs[-1])
        if self.mapping == "adjacent":
            return adjacent(self.costs, mean)
        gap = np.diff(self.costs).mean() if len(self.costs) > 1 else 1.0
        return tilted(self.costs, mean, _SPREAD[self.mapping] * gap)

    @override
    def check_steps(self, steps: int) -> None:
        if self.mapping not in BALANCED or steps >= self.period or len(self.arms) == 1:
            return
        reached = triangle(min(steps, self.period // 2), self.period, self.costs[0], self.costs[-1])
        if 2 * steps < self.period:
            consequence = (
                f"the average only falls from {self.costs[-1]:g} to {reached:.2f}: below that nothing is trained"
            )
        else:
            consequence = "the way back from the least to the largest average is cut short, and large ones are rarer"
        warnings.warn(
            f"{type(self).__name__}(period={self.period}): the training has {steps} optimizer steps, so {consequence}. "
            f"Take a period of {max(2, steps)} or less.",
            stacklevel=2,
        )

    @override
    def _fingerprint(self) -> int:
        return derive(super()._fingerprint(), "mapping", self.mapping, self.period, repr(self.uniform_share))


class BitSchedule(ArmSchedule):
    """One bit width per layer and optimizer step; see this module for the mappings.

    Args:
        layers: the layers' names, as :func:`~samplewise.plugins.quantize_model` gives them.
        bits: the widths, ascending, each in [1, 8].
        period: optimizer steps of a wave, with the balanced mappings; not more than the training has.
        mapping: ``"maxent"``, ``"gaussian"`` or ``"adjacent"`` (balanced over a period, with more or fewer different
            widths in a configuration), ``"uniform"``, ``"loss"`` or ``"grad_norm"`` (by what was recorded).
        seed: of the draws.
        **options: ``uniform_share`` of ``"loss"`` and ``"grad_norm"``; ``ema`` of the statistics.

    Raises:
        ValueError: no layers, one of them twice, widths that are none, an unknown mapping, a period below 2.

    Example::

        >>> schedule = BitSchedule(layers=["q_proj", "k_proj"], period=100)
        >>> schedule.draw(0), schedule.draw(50)
        ({'q_proj': 4, 'k_proj': 4}, {'q_proj': 2, 'k_proj': 2})
    """

    def __init__(
        self,
        *,
        layers: Sequence[str],
        bits: Sequence[int] = (2, 3, 4),
        period: int = 8000,
        mapping: MappingName = "maxent",
        seed: int = 0,
        **options: Any,
    ):
        owner = type(self).__name__
        layers = layers if isinstance(layers, str) else tuple(layers)
        if isinstance(layers, str) or not layers or len(set(layers)) < len(layers):
            raise ValueError(f"{owner}(layers={layers!r}): must be a list with at least one layer's name, none twice.")
        widths = check_bits(owner, bits)
        super().__init__(arms=widths, slots=layers, mapping=mapping, period=period, seed=seed, **options)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' names."""
        assert self.slots is not None
        return self.slots
