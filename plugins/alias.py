"""Alias table: draws by weight, with replacement, in constant time each.

Walker 1977, Vose 1991; built without a loop, by a sweep over two lines (Huebschle-Schneider and Sanders, "Parallel
Weighted Random Sampling", 2022). With the weights scaled to a mean of 1, item i has a slot of width 1 of its own:

    light (w < 1): it fills w of its slot and leaves a deficit 1 - w; heavy (w >= 1): it has a surplus w - 1
    D_j, S_k: cumulative deficits of the lights and surpluses of the heavies, each in ascending order of the ids
    light j + 1's alias:  the first heavy k with S_k > D_j, D_0 = 0
    heavy k's threshold:  1 + S_k - D_j with the first D_j >= S_k; the rest of its slot is heavy k + 1's
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from samplewise.plugins.weights import check_weights

IntArray = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class AliasTable:
    """Independent draws of n items, each with a probability proportional to its weight.

    Probabilities are true to 2^-53, the resolution of the one number in [0, 1) that decides a draw; an item that is
    rarer than that may never be drawn.

    Args:
        weights: (n,), finite and >= 0, not all 0, on any scale; items of weight 0 are never drawn.

    Attributes:
        thresholds: float64 (n,), the share of each slot that is the item's own.
        aliases: int64 (n,), the item that has the rest.

    Raises:
        TypeError: for weights that are no real numbers.
        ValueError: for weights that are not finite and >= 0, are all 0, or have another shape.
    """

    def __init__(self, weights: npt.ArrayLike):
        checked = check_weights("AliasTable", "weights", weights)
        if not checked.any():
            raise ValueError("AliasTable(weights=...): at least one weight must be positive; there is none")
        exact = checked.astype(np.longdouble)  # of sums of millions, no digit is lost where the platform has it
        exact /= exact.max()
        exact *= exact.size / exact.sum()
        heavy = exact >= 1  # the largest at least, after rounding too: the sum is not above its size
        heavies, lights = np.flatnonzero(heavy), np.flatnonzero(~heavy)
        deficits = np.append(np.longdouble(0), np.cumsum(1 - exact[lights]))  # before each light, and after the last
        surpluses = np.cumsum(exact[heavies[:-1]] - 1)
        ends = np.searchsorted(deficits, surpluses)
        lacking = np.where(ends <= lights.size, np.append(deficits, 0)[ends] - surpluses, 0).clip(0, 1)
        self.aliases: IntArray = np.arange(exact.size)
        self.aliases[lights] = heavies[np.searchsorted(surpluses, deficits[:-1], side="right")]
        self.aliases[heavies[:-1]] = heavies[1:]
        self.thresholds: Float64Array = exact.astype(np.float64)
        self.thresholds[heavies] = 1
        self.thresholds[heavies[:-1]] -= lacking.astype(np.float64)
        self._size = exact.size
        self._limits = np.arange(exact.size) + self.thresholds

    def __len__(self) -> int:
        return self._size

    def probabilities(self) -> Float64Array:
        """The probability of each item, as the table has it: float64 (n,) that sums to 1."""
        given = np.bincount(self.aliases, weights=1 - self.thresholds, minlength=len(self))
        return (self.thresholds + given) / len(self)

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """Draw `count` items: int64 (count,), in the order in which they were drawn."""
        return self.at(rng.random(count))

    def at(self, lots: Float64Array) -> IntArray:
        """The items that uniform numbers in [0, 1) stand for, float64 (k,), which are overwritten: int64 (k,)."""
        lots *= self._size  # below n after rounding too, as a number below 1 is at most 1 - 2^-53
        slots = lots.astype(np.int64)
        items = self.aliases[slots]
        np.putmask(items, lots < self._limits[slots], slots)
        return items
