"""Weights of trajectories by how well they went, and what they do to a data set of mixed quality; pure functions.

Hong et al., "Harnessing Mixed Offline RL Datasets via Trajectory Weighting", ICLR 2023. Trajectory i has T_i
transitions, the undiscounted return G_i and the first observation s_i0:

    RW:  x_i = min-max of G_i
    AW:  x_i = min-max of A_i = G_i - V(s_i0), V a linear regression of G on s_0
    q_i = exp(x_i / alpha),  P(i, t) = q_i / sum_j T_j q_j

What differs from the public code: P sums to 1; a trajectory is valued by a regression that has not seen it, since in
one that has, the residuals of few trajectories are noise; values can be clipped to quantiles, so that one outlier does
not press all others together.
"""

from __future__ import annotations

from math import ceil, inf
from typing import Any

import numpy as np
import numpy.typing as npt

from samplewise.cuda_ext.checks import integer, share
from samplewise.loaders.seeding import generator
from samplewise.plugins.trajectory_data import check_observations, check_values
from samplewise.plugins.weights import effective_sample_size

Float64Array = npt.NDArray[np.float64]
ROUNDING = 1e-9  # differences below this share of the values themselves are taken for rounding


def min_max(values: Any, *, clip_quantile: float = 0.0) -> Float64Array:
    """The values, shifted and scaled to [0, 1].

    Args:
        values: real numbers (n,), finite.
        clip_quantile: c, in [0, 0.5): values are first clipped to their quantiles c and 1 - c.

    Returns:
        float64 (n,), all 0 where the spread is nothing but rounding.

    Raises:
        TypeError: for values that are no real numbers.
        ValueError: for values that are not finite, of another shape, or c outside its range.
    """
    checked = check_values("min_max", "values", values)
    cut = share("min_max", "clip_quantile", clip_quantile, high=0.5, ends="[)", what="the share to clip at each end")
    if cut:
        checked = checked.clip(*np.quantile(checked, (cut, 1 - cut)))
    low, high = checked.min(), checked.max()
    if high / 2 - low / 2 <= ROUNDING / 2 * max(abs(low), abs(high)):  # halves: the spread may leave the range
        return np.zeros(checked.size)
    scaled: Float64Array = (checked / 2 - low / 2) / (high / 2 - low / 2)
    return scaled


def exponential_weights(values: Any, alpha: float, *, clip_quantile: float = 0.0) -> Float64Array:
    """Weights q = exp(x / alpha), x = `min_max` of the values, scaled so that the largest is 1: float64 (n,).

    Args:
        values: real numbers (n,), finite: returns (RW) or advantages (AW).
        alpha: temperature, > 0: the largest weight is exp(1 / alpha) times the smallest.
        clip_quantile: see `min_max`.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: as `min_max`, and for alpha <= 0.

    >>> exponential_weights([0.0, 5.0, 10.0], 0.5).round(4).tolist()
    [0.1353, 0.3679, 1.0]
    """
    alpha = share("exponential_weights", "alpha", alpha, high=inf, ends="()", what="the temperature")
    x = min_max(values, clip_quantile=clip_quantile)
    q: Float64Array = np.exp((x - x.max()) / alpha)
    return q


def state_values(returns: Any, first_obs: Any, *, ridge: float = 1.0, folds: int = 5, seed: int = 0) -> Float64Array:
    """V(s_i0), the return that the first observation lets one expect: float64 (n,).

    A linear regression with an intercept. With `folds` >= 2 it is cross-fitted: the trajectories fall at random into
    as many parts, and those of each are valued by a fit on the others, within the range of the returns it has seen:
    an odd first observation, a hundred standard deviations off, must not be worth a thousand times the best return.

    Args:
        returns: G, real numbers (n,), finite.
        first_obs: s_0, real numbers (n, ...), finite; flattened to (n, d). Constant features are harmless.
        ridge: weight of |w|^2 beside the sum of squares, >= 0, w the coefficients of standardised features.
        folds: parts, at most n of them count (each trajectory is then left out once); 1 fits all at once, and with
            `ridge=0` that is the least squares of the paper.
        seed: key of the parts.

    Raises:
        TypeError: for arguments that are no numbers.
        ValueError: for values that are not finite, lengths that differ, or an argument outside its range.
    """
    owner = "state_values"
    targets = check_values(owner, "returns", returns)
    features = check_observations(owner, first_obs, targets.size)
    ridge = share(owner, "ridge", ridge, high=inf, ends="[)")
    folds = min(integer(owner, "folds", folds, 1), targets.size)
    if folds == 1:
        return _fit_and_predict(features, targets, features, ridge)
    values = np.empty(targets.size)
    parts = np.arange(targets.size) % folds
    generator(seed, "folds").shuffle(parts)
    for part in range(folds):
        out = parts == part
        seen = targets[~out]
        values[out] = _fit_and_predict(features[~out], seen, features[out], ridge).clip(seen.min(), seen.max())
    return values


def _fit_and_predict(features: Float64Array, targets: Float64Array, asked: Float64Array, ridge: float) -> Float64Array:
    """Fit on features (m, d) and targets (m,), and predict for the features `asked` (k, d): float64 (k,)."""
    center, spread, level = features.mean(axis=0), features.std(axis=0), targets.mean()
    varies = spread > ROUNDING * np.abs(features).max(axis=0)
    scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    z, y = (features - center) * scale, targets - level
    count, width = z.shape
    if ridge == 0:
        coefficients = np.linalg.lstsq(z, y, rcond=None)[0]
    elif width <= count:
        coefficients = np.linalg.solve(z.T @ z + ridge * np.eye(width), z.T @ y)
    else:  # the same, by a smaller system
        coefficients = z.T @ np.linalg.solve(z @ z.T + ridge * np.eye(count), y)
    predicted: Float64Array = level + ((asked - center) * scale) @ coefficients
    return predicted


def advantages(returns: Any, values: Any) -> Float64Array:
    """A = G - V, float64 (n,); all 0 where the differences are nothing but rounding."""
    checked = check_values("advantages", "returns", returns)
    differences = checked - check_values("advantages", "values", values, checked.size)
    if np.abs(differences).max() <= ROUNDING * np.abs(checked).max():
        return np.zeros(checked.size)
    return differences


def value_r2(returns: Any, values: Any) -> float:
    """1 - sum (G - V)^2 / sum (G - mean G)^2, the share of the variance explained; 0 where there is none."""
    checked = check_values("value_r2", "returns", returns)
    errors = checked - check_values("value_r2", "values", values, checked.size)
    deviations = checked - checked.mean()
    if np.abs(deviations).max() <= ROUNDING * np.abs(checked).max():
        return 0.0
    return float(1 - np.square(errors).sum() / np.square(deviations).sum())


def top_weights(returns: Any, top: float) -> Float64Array:
    """1 for the best max(1, ceil(top n)) trajectories and all that tie with the last of them, else 0: float64 (n,).

    Raises:
        TypeError: for arguments that are no numbers.
        ValueError: for returns that are not finite, or top outside (0, 1].
    """
    checked = check_values("top_weights", "returns", returns)
    best = share("top_weights", "top", top, ends="(]", what="the share of the trajectories")
    count = max(1, ceil(round(best * checked.size, 6)))  # 0.07 * 100 is 7.000000000000001
    weights: Float64Array = (checked >= np.partition(checked, -count)[-count]).astype(np.float64)
    return weights


def transition_probabilities(weights: npt.ArrayLike, lengths: npt.ArrayLike) -> Float64Array:
    """P(i, t) = q_i / sum_j T_j q_j of each transition of trajectory i: float64 (n,).

    Args:
        weights: q, float64 (n,), >= 0, not all 0.
        lengths: T, integers (n,), >= 1.
    """
    q = np.asarray(weights, dtype=np.float64)
    q = q / q.max()
    probabilities: Float64Array = q / (q * np.asarray(lengths)).sum()
    return probabilities


def positive_variance(returns: Any) -> float:
    """E[(G - E G)_+^2] over trajectories: how much there is above the mean, which predicts the benefit."""
    checked = check_values("positive_variance", "returns", returns)
    return float(np.square((checked - checked.mean()).clip(0)).mean())


def summary(weights: npt.ArrayLike, returns: Any) -> dict[str, float]:
    """Figures of a distribution over trajectories.

    Whoever draws transitions by P(i, t) follows the behaviour of trajectories that are drawn with a probability
    proportional to q_i: of their returns the expectation is meant.

    Args:
        weights: q, (n,), finite and >= 0, not all 0.
        returns: G, real numbers (n,), finite.

    Returns:
        ``ess``: effective sample size (sum q)^2 / sum q^2, in trajectories. ``expected_return``: sum q G / sum q.
        ``mean_return``: of the data. ``positive_variance``: see `positive_variance`.
    """
    checked, q = check_values("summary", "returns", returns), np.asarray(weights, dtype=np.float64)
    return {
        "ess": effective_sample_size(q),
        "expected_return": float(np.average(checked, weights=q / q.max())),
        "mean_return": float(checked.mean()),
        "positive_variance": positive_variance(checked),
    }
