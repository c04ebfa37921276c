"""Plan: what one epoch trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samplewise.cuda_ext import Ledger


@dataclass(frozen=True, eq=False)
class Plan:
    """The samples of one epoch, in any order (the sampler shuffles them), and their loss weights.

    Attributes:
        ids: int64 (k,) rows of the data set, repeats allowed, or a ``range``, of which no list is ever stored.
        weights: float32 (k,), finite and >= 0, multiplied with the samples' losses; None means 1 for all.
    """

    ids: range | NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, size: int, name: str) -> Plan:
        """Return the plan with its arrays in their exact dtypes.

        Raises:
            TypeError: ids that are no integers.
            ValueError: an empty plan, ids outside [0, size), or weights of another length, negative, not finite or all
                0.
        """
        ids = self.ids
        if not isinstance(ids, range):
            ids = np.ascontiguousarray(ids)
            if ids.size == 0:
                ids = ids.astype(np.int64)
            if ids.dtype.kind not in "iu" or ids.ndim != 1:
                raise TypeError(f"{name}: Plan.ids must be an int64 (k,) array or a range, not {ids.dtype}{ids.shape}.")
            ids = ids.astype(np.int64, copy=False)
        if len(ids) == 0:
            raise ValueError(f"{name}: the plan is empty, so the epoch would train on nothing; plan at least one id.")
        low, high = sorted((ids[0], ids[-1])) if isinstance(ids, range) else (ids.min(), ids.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name}: Plan.ids must lie in [0, {size}), the rows of the data set; got {low}..{high}.")
        return Plan(ids, None if self.weights is None else _checked_weights(self.weights, len(ids), name))

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids at ``positions`` (m,): int64 (m,)."""
        if isinstance(self.ids, range):
            return positions * self.ids.step + self.ids.start
        return self.ids[positions]

    def summary(self, ledger: Ledger) -> dict[str, float]:
        """Figures to log, computed in a few passes over the data set, or over the share of it that a rank holds.

        Returns:
            ``kept``: planned samples over N. ``coverage``: share of the data set that was seen before or is planned.
            ``ess``: effective sample size (sum w)^2 / sum(w^2) over k, in (0, 1]. ``max_weight``: largest weight over
            the mean one. ``staleness``: mean age of the recorded losses, in batches recorded since.
        """
        seen = ledger.seen.cpu().numpy()
        staleness = 0.0
        if seen.any():
            steps = ledger.column("last_step").cpu().numpy()
            staleness = ledger.updates - float(steps.mean(where=seen, dtype=np.float64))
        covered = seen.copy()
        rows = ledger.rows_of(self.ids)
        if isinstance(rows, range):
            ascending = rows if rows.step > 0 else rows[::-1]
            covered[ascending.start : ascending.stop : ascending.step] = True
        else:
            covered[rows] = True
        ess = max_weight = 1.0
        if self.weights is not None:
            weights = self.weights.astype(np.float64)
            ess = float(weights.sum() ** 2 / np.square(weights).sum() / len(self))
            max_weight = float(weights.max() / weights.mean())
        return {
            "kept": len(self) / seen.size,
            "coverage": float(covered.mean()),
            "ess": ess,
            "max_weight": max_weight,
            "staleness": staleness,
        }


def _checked_weights(weights: NDArray[np.float32], length: int, name: str) -> NDArray[np.float32]:
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if weights.shape != (length,):
        raise ValueError(f"{name}: Plan.weights must be one weight an id, ({length},), not {weights.shape}.")
    if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"{name}: Plan.weights must be finite and >= 0, and not all 0.")
    return weights
