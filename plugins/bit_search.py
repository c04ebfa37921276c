"""Search for the best configuration of bit widths under a budget of average bits, after a once-for-all training.

Yi et al., "One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments", ACL 2025 (LLM-QFA): 100
random mixed configurations, then the space is shrunk by correlation, then 50 more.

    stage one: uniform configurations; target mean m ~ U[lowest width, budget], each layer's width from the
               maximum-entropy distribution with mean m, random layers lowered until the budget holds
    shrinking: r_l = correlation of the width of layer l with the loss, both net of the average width; in the order of
               r the first half of the layers loses its lowest width, the last half its highest
    stage two: the same draws from the shrunk space, m in the upper half of what is feasible there

The counts and the word correlation are the paper's; the rest is [ours], and `search_bits` says exactly what is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from samplewise.cuda_ext.checks import integer, share
from samplewise.loaders.seeding import generator
from samplewise.plugins.bit_schedule import tilted
from samplewise.plugins.quantize import check_bits

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Config = dict[str, int]  # layer name -> bit width
Sizes = Mapping[str, int] | None  # layer name -> weights
Levels = tuple[int, ...]  # for each layer the index of its width
_TRIES = 5  # draws for each configuration wanted; what is missing then is enumerated


@dataclass(frozen=True, eq=False, repr=False)
class BitSearch:
    """What was tried and what came of it, in the order of the evaluations.

    Attributes:
        configs: n configurations.
        average: float64 (n,), their average bits: a weight, where sizes were given, else a layer.
        losses: float64 (n,), as evaluated: `rejected` of them are not finite.
        stage: int64 (n,), 1 or 2.
        best: index of the lowest finite loss, the first of equal ones.
    """

    configs: tuple[Config, ...]
    average: Float64Array
    losses: Float64Array
    stage: Int64Array
    best: int

    @property
    def best_config(self) -> Config:
        """The configuration with the lowest loss."""
        return self.configs[self.best]

    @property
    def best_loss(self) -> float:
        """The lowest finite loss."""
        return float(self.losses[self.best])

    @property
    def front(self) -> Int64Array:
        """The `pareto` front of average bits and losses: int64 (m,) indices, by average."""
        return pareto(self.average, self.losses)

    @property
    def rejected(self) -> int:
        """How many losses are not finite."""
        return int((~np.isfinite(self.losses)).sum())

    def rows(self) -> list[dict[str, float | bool]]:
        """One row a configuration, for a CSV: average, loss, stage, on_front."""
        columns = (self.average, self.losses, self.stage, np.isin(np.arange(self.losses.size), self.front))
        names = ("average", "loss", "stage", "on_front")
        return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]


def search_bits(
    evaluate: Callable[[Config], float],
    *,
    layers: Iterable[str],
    budget: float,
    bits: Sequence[int] = (2, 3, 4),
    sizes: Sizes = None,
    first: int = 100,
    second: int = 50,
    seed: int = 0,
    watch: Callable[[int], object] | None = None,
) -> BitSearch:
    """Evaluate `first` + `second` different configurations within the budget, and say which is the best.

    Stage one starts with uniform configurations: the lowest width, then the others within the budget, highest first.
    The rest is drawn [ours]: a target mean uniform from the lowest width to the budget (independent uniform widths
    nearly all have the middle average), each layer's width from the maximum-entropy distribution with that mean; above
    the budget, random layers go down by one width until it fits.

    Shrinking [ours, but for the word correlation]: over stage one's finite losses, the linear regression on the average
    width is taken out of the loss and of each layer's width; r_l is the correlation of what is left. In the order of r,
    the first half of the layers (more bits, less loss) loses its lowest width and the last half its highest; quarters,
    where there are two widths in all. A layer stays as it is where nothing varies, or where without its lowest width
    the cheapest one left would lie above the middle between the cheapest of all and the budget, which leaves a choice.

    Stage two [ours] draws in the same way from the shrunk space, targets uniform in the upper half of the averages
    feasible there: a layer's mean lies where the target does, as a share of its own range. What the shrunk space lacks
    comes from the whole one. Where draws bring nothing new the rest is enumerated: a small space is tried completely.

    Args:
        evaluate: from a configuration to its loss on validation data, with `set_bits(model, config)` or `pinned` first;
            lower is better, what is not finite never wins.
        layers: names, all different.
        budget: highest average bits, a weight or, without sizes, a layer.
        bits: widths to choose from, increasing.
        sizes: weights (parameters) of each layer; None: all layers count the same. Of other layers: ignored.
        first: configurations of stage one, >= 1.
        second: configurations of stage two, >= 0.
        seed: key of all draws; nothing but this and the values of `evaluate` decides.
        watch: called with the number of configurations done after each.

    Raises:
        TypeError: an argument, or a loss, of another type.
        ValueError: an argument outside its range, a budget below the smallest width, no finite loss in stage one.
    """
    owner = "search_bits"
    if not callable(evaluate):
        raise TypeError(f"{owner}(evaluate={evaluate!r}): evaluate must be callable, from a configuration to its loss.")
    (names, weights), widths = _check_layers(owner, layers, sizes), np.array(check_bits(owner, bits))
    budget = share(owner, "budget", budget, high=np.inf, what="the highest average of bits")
    if budget < widths[0]:
        fault = f"budget={budget:g} is below the smallest width, {widths[0]}: no configuration fits"
        raise ValueError(f"{owner}: {fault}. Raise the budget, or add a smaller width to bits.")
    first, second = integer(owner, "first", first, 1), integer(owner, "second", second, 0)
    seed = integer(owner, "seed", seed, 0)
    space = _Space(widths, weights, 0 * weights, 0 * weights + widths.size - 1, min(budget, float(widths[-1])))
    rows: list[Levels] = [(k,) * len(names) for k in (0, *reversed(range(1, (widths <= budget).sum())))][:first]
    rows += space.draw(generator(seed, owner, 1), first - len(rows), 0.0, rows)
    losses: list[float] = []

    def run() -> None:
        for row in rows[len(losses) :]:
            losses.append(float(evaluate(_config(names, widths, row))))
            if watch is not None:
                watch(len(losses))

    run()
    done, finite = len(rows), np.isfinite(losses)
    if not finite.any():
        fault = f"evaluate gave no finite loss for any of {done} configurations"
        raise ValueError(f"{owner}: {fault}; the first, width {widths[0]} everywhere, gave {losses[0]}: look into it.")
    if done > 1 and len(set(losses)) == 1:
        fault = f"evaluate gave the same loss for all of {done} configurations"
        warnings.warn(f"{owner}: {fault}; call set_bits(model, config) in it before the loss.", stacklevel=2)
    tried = np.array(rows)[finite]
    gains = _partial_correlations(widths[tried], space.average(tried), np.array(losses)[finite])
    for key, part in enumerate((space.shrunk(gains), space), 2):
        rows += part.draw(generator(seed, owner, key), done + second - len(rows), 0.5, rows)
    run()
    return BitSearch(
        configs=tuple(_config(names, widths, row) for row in rows),
        average=space.average(np.array(rows)),
        losses=np.array(losses),
        stage=1 + (np.arange(len(rows)) >= done).astype(np.int64),
        best=int(np.where(np.isfinite(losses), losses, np.inf).argmin()),
    )


def pareto(costs: npt.ArrayLike, losses: npt.ArrayLike) -> Int64Array:
    """The points that no other is as good as in both and better in one, by cost: int64 (m,) indices.

    Lower is better. Of equal points the first is taken; those that are not finite never are.

    Raises:
        ValueError: `costs` and `losses` are not both (n,).
    """
    x, y = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"pareto(costs=..., losses=...): both must have shape (n,), not {x.shape} and {y.shape}.")
    points = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    points = points[np.lexsort((y[points], x[points]))]
    return points[y[points] < np.minimum.accumulate(np.append(np.inf, y[points]))[:-1]]


def average_bits(config: Mapping[str, int], sizes: Sizes = None) -> float:
    """sum(size * bits) / sum(size) over the layers of `config`; without `sizes` all count the same.

    Raises:
        ValueError: no layers, a width or size below 1, a layer without a size.
    """
    names, weights = _check_layers("average_bits", config, sizes)
    widths = [integer("average_bits", f"config[{name!r}]", config[name], 1) for name in names]
    return float(weights @ np.array(widths) / weights.sum())


def even_config(layers: Iterable[str], average: float, bits: Sequence[int] = (2, 3, 4)) -> Config:
    """A pinned configuration: the two widths around an average, spread evenly over the L layers.

    k get the upper one, those where floor(i k / L), i = 1..L, steps up; k is the largest whose average, each layer
    counting the same, is not above `average`: it is less than (upper - lower) / L below.

    Raises:
        ValueError: an average outside the range of `bits`, layers that are none or not all different.
    """
    (names, _), widths = _check_layers("even_config", layers, None), np.array(check_bits("even_config", bits))
    average = share("even_config", "average", average, low=widths[0], high=widths[-1], what="an average of the widths")
    lower, count = int((widths <= average).sum()) - 1, len(names)
    upper = min(lower + 1, widths.size - 1)
    ups = sum((widths[lower] * (count - k) + widths[upper] * k) / count <= average for k in range(1, count + 1))
    return _config(names, widths, np.where(np.diff(np.arange(count + 1) * ups // count), upper, lower).tolist())


@dataclass(frozen=True, eq=False)
class _Space:
    """All levels from low to high whose average is within the budget; that of low must be."""

    bits: Int64Array  # (K,), the others (L,)
    sizes: Int64Array
    low: Int64Array
    high: Int64Array
    budget: float

    def average(self, levels: Int64Array) -> Float64Array:
        """Bits a weight, of levels (..., L): (...)."""
        return np.asarray(self.bits[levels] @ self.sizes / self.sizes.sum())

    def draw(self, rng: np.random.Generator, count: int, bottom: float, known: list[Levels]) -> list[Levels]:
        """Up to `count` that are not known and all different; targets from the share `bottom` of the range upward."""
        seen, new = set(known), list[Levels]()
        for _ in range(_TRIES * count):
            if len(new) == count:
                return new
            if (row := self._draw_one(rng, rng.uniform(bottom, 1))) not in seen:
                seen.add(row)
                new.append(row)
        rest = list(islice((row for row in self._all() if row not in seen), _TRIES * count))
        return new + [rest[i] for i in rng.permutation(len(rest))[: count - len(new)]]

    def _draw_one(self, rng: np.random.Generator, target: float) -> Levels:
        """`target` is a share of the range from the lowest average to the highest within the budget."""
        lowest, highest = float(self.average(self.low)), float(self.average(self.high))
        mean = target * (min(self.budget, highest) - lowest) / (highest - lowest or 1)  # a share of each range
        levels = self.low.copy()
        for low, high in sorted(set(zip(self.low.tolist(), self.high.tolist(), strict=True))):
            where = np.flatnonzero((self.low == low) & (self.high == high))
            values = self.bits[low : high + 1].astype(np.float64)
            p = tilted(values, values[0] + mean * (values[-1] - values[0]))
            levels[where] += rng.choice(values.size, size=where.size, p=p)
        while self.average(levels) > self.budget:
            levels[rng.choice(np.flatnonzero(levels > self.low))] -= 1
        return tuple(levels.tolist())

    def _all(self) -> Iterator[Levels]:
        """Like an odometer, the last layer fastest: those after it are at their lowest when a layer goes up."""
        levels, i = self.low.copy(), 0
        while i >= 0:
            yield tuple(levels.tolist())
            for i in range(levels.size - 1, -2, -1):
                levels[i] += 1
                if i < 0 or (levels[i] <= self.high[i] and self.average(levels) <= self.budget):
                    break
                levels[i] = self.low[i]

    def shrunk(self, gains: Float64Array) -> _Space:
        """Without the lowest width where gains (L,) are low, and without the highest where they are high."""
        order = np.argsort(gains, kind="stable")[: np.isfinite(gains).sum()]  # NaN is last
        some = order.size // (2 if self.bits.size > 2 else 4)
        low, high = self.low.copy(), self.high.copy()
        middle = (self.average(low) + np.minimum(self.budget, self.average(high))) / 2
        for i in order[:some]:
            raised = low + (np.arange(low.size) == i) * (low < high)
            low = raised if self.average(raised) <= middle else low
        last = order[order.size - some :]
        high[last] -= low[last] < high[last]
        return replace(self, low=low, high=high)


def _partial_correlations(widths: Int64Array, averages: Float64Array, losses: Float64Array) -> Float64Array:
    """Correlations of widths (n, L) with losses (n,), net of averages (n,): (L,), NaN where nothing is left to vary."""
    columns = np.column_stack((widths, losses / max(np.abs(losses).max(), 1.0)))  # no square leaves the range
    centred, cost = columns - columns.mean(axis=0), averages - averages.mean()
    residuals = centred - np.outer(cost, cost @ centred / max(cost @ cost, 1e-300))
    norms = np.linalg.norm(residuals, axis=0)
    norms[norms <= 1e-9 * np.linalg.norm(columns, axis=0)] = np.nan  # rounding
    return np.asarray(residuals[:, -1] @ residuals[:, :-1] / norms[-1] / norms[:-1])


def _config(names: tuple[str, ...], widths: Int64Array, levels: Iterable[int]) -> Config:
    return {name: int(widths[level]) for name, level in zip(names, levels, strict=True)}


def _check_layers(owner: str, layers: Iterable[str], sizes: Sizes) -> tuple[tuple[str, ...], Int64Array]:
    """Names and sizes (L,) of the layers."""
    names = tuple(layers)
    if not names or len(set(names)) < len(names):
        fault = f"{max(names, key=names.count)!r} is there twice" if names else "there is none"
        raise ValueError(f"{owner}(layers=...): layers must be names, at least one and all different; {fault}.")
    counts = dict.fromkeys(names, 1) if sizes is None else sizes
    missing = [name for name in names if name not in counts]
    if missing:
        fault = f"{len(missing)} of {len(names)} are missing, e.g. {missing[0]!r}"
        raise ValueError(f"{owner}(sizes=...): sizes must hold every layer, and {fault}; None counts all the same.")
    return names, np.array([integer(owner, f"sizes[{name!r}]", counts[name], 1) for name in names], dtype=np.int64)
