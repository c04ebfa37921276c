"""Prioritised replay: draws by how much there is to learn from a sample, with weights that keep the mean of the losses.

Schaul et al., "Prioritized Experience Replay", ICLR 2016. With the last recorded value v_j of item j (a temporal-
difference error), N items and the probabilities b_j by which they would be drawn without priorities (1 / N there):

    p_j = |v_j| + 1e-6,  the largest p where j was not seen yet (1 while nothing is recorded at all)
    P(j) = b_j p_j^alpha / sum_i b_i p_i^alpha
    w_j = (b_j / P(j))^beta, divided by the largest of all

The weights only ever lower a loss: a single item without error, hardly ever drawn, has the largest and lowers all
others. What differs from the public code: no tree of partial sums, which rounding wears down, but a float64 sum of all
items for each plan, which draws each item as often as is due, rounded at random (`draw_with_replacement`; the paper
stratifies too); the largest weight is that of all items, not that of the batch; the base b is any distribution.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]
OFFSET = 1e-6  # so that an item without error keeps coming up


def priorities(values: FloatArray, seen: npt.NDArray[np.bool_] | None = None) -> Float64Array:
    """p_j = |v_j| + 1e-6 of recorded values (N,), which are NaN where nothing is: float64 (N,), > 0.

    Items without a value have the largest p, or the mean where they were `seen`, bool (N,), and still have none: a
    sample whose errors are never finite must not keep coming up.
    """
    p = np.abs(values, dtype=np.float64)
    p += OFFSET
    missing = np.isnan(p)
    if missing.all():
        p[:] = 1.0
    elif missing.any():
        known = ~missing
        largest, mean = p.max(initial=0.0, where=known), p.mean(where=known)
        p[missing] = largest if seen is None else np.where(seen[missing], mean, largest)
    return p


def prioritised(base: Float64Array, p: Float64Array, alpha: float, *, mix: float = 1.0) -> Float64Array:
    """P(j) = mix b_j p_j^alpha / sum_i b_i p_i^alpha + (1 - mix) / N: float64 (N,) that sums to 1.

    Args:
        base: b, float64 (N,), >= 0, not all 0, on any scale.
        p: priorities, float64 (N,), > 0.
        alpha: how much they count, in [0, 1]; with 0 they do not.
        mix: their share in the mixture, the rest being uniform, in [0, 1].
    """
    drawn: Float64Array = p / p.max()
    drawn **= alpha
    drawn *= base
    drawn *= mix / drawn.sum()
    drawn += (1 - mix) / drawn.size
    return drawn


def importance_weights(
    target: Float64Array, drawn: Float64Array, ids: npt.NDArray[np.int64], beta: float
) -> npt.NDArray[np.float32]:
    """Loss weights w_j = (target_j / drawn_j)^beta of the drawn `ids` (k,), divided by the largest of all items.

    With beta = 1, mean(weights * losses) is proportional to an unbiased estimate of the mean loss under the target.

    Args:
        target: float64 (N,), the distribution whose mean loss is wanted.
        drawn: float64 (N,), the one that is drawn from; items of probability 0 do not count.
        ids: int64 (k,).
        beta: how much of the difference is made up for, in [0, 1].

    Returns:
        float32 (k,), in (0, 1].
    """
    largest = np.divide(target, drawn, out=np.zeros(drawn.size), where=drawn > 0).max()
    weights: npt.NDArray[np.float32] = ((target[ids] / drawn[ids] / largest) ** beta).astype(np.float32)
    return weights
