"""Drawing samples by weight, with the loss weights that keep the mean of the losses unbiased.

Shared by every method that draws unevenly. Symbols: N items with weights w_i, k of them drawn, pi_i the probability
that item i is drawn. Drawing without replacement does NOT include item i with probability k w_i / sum(w): the weights
1 / (N p_i) of importance sampling are biased there (by about +50 % at k = N/2 on heavy-tailed weights). Use instead:

- `draw_without_replacement`: exponential keys Exp(1)_i / w_i, the k smallest; tau is the (k+1)-th key and
  a_i = 1 / (1 - exp(-w_i tau)) the inverse inclusion probability given the others' keys (rank conditioning).
- `draw_systematic`, `draw_poisson`: pi_i is known exactly; the weight is 1 / pi_i.

Every function takes an explicit generator and returns ids in ascending order: shuffle before training on them. Sums are
float64 and there is no limit at 2^24 items. Peak memory of a draw is at most 30 bytes an item beside the weights.
"""

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from samplewise.cuda_ext import ops

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def effective_sample_size(weights: npt.ArrayLike) -> float:
    """(sum w)^2 / sum(w^2) of weights (k,): k when all are equal, 1 when one has everything, 0 for none."""
    checked = check_weights("effective_sample_size", "weights", weights)
    top = float(checked.max(initial=0.0))
    if top == 0:
        return 0.0
    scaled = checked.astype(np.float64) / top
    return float(scaled.sum() ** 2 / np.square(scaled).sum())


def defensive_mixture(scores: npt.ArrayLike, *, mix: float = 0.9) -> Float64Array:
    """Probabilities mix * score / sum(score) + (1 - mix) / N, which bounds the weights 1 / (N p) by 1 / (1 - mix).

    Args:
        scores: (N,), finite and >= 0; uniform probabilities come out when all are 0.
        mix: share of the scores in the mixture, in [0, 1).

    Returns:
        float64 (N,) that sums to 1.

    Raises:
        ValueError: for scores that are not finite and >= 0, or mix outside [0, 1).
    """
    if not 0 <= mix < 1:
        raise ValueError(
            f"defensive_mixture(mix={mix}): mix is the scores' share, the rest is uniform, and must be in [0, 1)"
        )
    checked = check_weights("defensive_mixture", "scores", scores).astype(np.float64)  # a copy, changed in place
    top = checked.max(initial=0.0)
    if top == 0:
        return np.full(checked.size, 1 / max(checked.size, 1))
    checked /= top
    checked *= mix / checked.sum()
    checked += (1 - mix) / checked.size
    return checked


def subset(size: int, k: int, rng: np.random.Generator) -> IntArray:
    """Draw k of `size` ids without replacement, every subset equally likely.

    Returns:
        int64 (k,), ascending.

    Raises:
        ValueError: for k outside [0, size].
    """
    k = _count("subset", k, size, "size")
    if k == 0:
        return np.empty(0, dtype=np.int64)
    if k == size:
        return np.arange(size, dtype=np.int64)
    keys = rng.integers(0, 1 << 32, size=size, dtype=np.uint32)
    return _smallest(keys, np.partition(keys, k)[k], k, rng)


def draw_without_replacement(weights: npt.ArrayLike, k: int, rng: np.random.Generator) -> tuple[IntArray, Float32Array]:
    """Draw k items one after the other, each with probability proportional to its weight among those left.

    Args:
        weights: (N,), finite and >= 0, on any scale; items of weight 0 are never drawn.
        k: number of items, at most the number of positive weights.
        rng: the generator.

    Returns:
        ids int64 (k,), ascending, and their loss weights float32 (k,) of mean 1: a_i / mean(a), the Hajek form, so that
        mean(weights * losses) estimates the mean loss over the items of positive weight: a ratio estimate, whose bias
        is of order 1 / k.

    Raises:
        ValueError: for weights that are not finite and >= 0, or k outside [0, number of positive weights].
    """
    checked = check_weights("draw_without_replacement", "weights", weights)
    positive = int(np.count_nonzero(checked))
    k = _count("draw_without_replacement", k, positive, "the number of positive weights")
    if k == positive:
        return np.flatnonzero(checked), np.ones(k, dtype=np.float32)
    scaled = _scaled(checked)
    drawn, tau = ops.draw(torch.from_numpy(scaled), k, int(rng.integers(1 << 63)))
    if tau == np.inf:  # fewer than k + 1 weights are above 1e-37 of the largest
        raise ValueError("draw_without_replacement(weights=...): weights span more than 37 decades; clip the smallest")
    ids = drawn.numpy()
    inverse = -1 / np.expm1(-scaled[ids].astype(np.float64) * tau)
    return ids, (inverse / inverse.mean()).astype(np.float32) if k else np.empty(0, dtype=np.float32)


def inclusion_probabilities(weights: npt.ArrayLike, k: int) -> Float64Array:
    """pi_i = k w_i / sum(w), with items that reach 1 taken surely and the rest scaled up so that sum(pi) = k.

    Args:
        weights: (N,), finite and >= 0.
        k: the sum of the probabilities, at most the number of positive weights.

    Returns:
        float64 (N,) in [0, 1].

    Raises:
        ValueError: for weights that are not finite and >= 0, or k outside [0, number of positive weights].
    """
    checked = check_weights("inclusion_probabilities", "weights", weights)
    k = _count("inclusion_probabilities", k, int(np.count_nonzero(checked)), "the number of positive weights")
    pi = _in_range(checked).astype(np.float64)  # a copy, changed in place
    total, sure = pi.sum(), 0
    if k and pi.max() * k > total:
        ordered = np.sort(pi)
        rest = np.cumsum(ordered)[-k:][::-1]  # rest[m]: sum without the m largest
        ordered[-k:] *= np.arange(1, k + 1)
        sure = int(np.argmax(ordered[-k:][::-1] <= rest))
        total = rest[sure]
    pi *= (k - sure) / (total or 1)
    return np.minimum(pi, 1, out=pi)


def draw_systematic(weights: npt.ArrayLike, k: int, rng: np.random.Generator) -> tuple[IntArray, Float64Array]:
    """Draw exactly k items, item i with probability exactly `inclusion_probabilities(weights, k)[i]`.

    The items stand in random order on a line, item i taking up pi_i of it; u, u+1, u+2, ... hit k different ones.

    Returns:
        ids int64 (k,), ascending, and their inclusion probabilities float64 (k,): sum(losses / pi) / N is an unbiased
        estimate of the mean loss where all weights are positive.

    Raises:
        ValueError: as `inclusion_probabilities`.
    """
    pi = inclusion_probabilities(weights, k)
    sure = np.flatnonzero(pi == 1)
    order = np.flatnonzero((pi > 0) & (pi < 1)).astype(np.uint32 if pi.size < 1 << 32 else np.int64)
    rng.shuffle(order)
    hits = operator.index(k) - sure.size
    line = pi[order]
    np.cumsum(line, out=line)
    at = _marks(line, hits, rng)
    # Rounding can hit an item of pi = 1 - 1e-12 twice or run past the end: the next free item then.
    steps = np.arange(hits)
    at -= steps
    at = np.minimum(np.maximum.accumulate(at, out=at), order.size - hits) + steps
    ids = np.sort(np.concatenate((sure, order[at])))
    return ids, pi[ids]


def draw_poisson(pi: npt.ArrayLike, rng: np.random.Generator) -> IntArray:
    """Keep each item i on its own with probability pi_i: int64 ids, ascending, sum(pi) of them on average.

    Raises:
        ValueError: for probabilities outside [0, 1].
    """
    checked = check_weights("draw_poisson", "pi", pi)
    if checked.max(initial=0.0) > 1:
        raise ValueError(f"draw_poisson(pi=...): pi are probabilities and must be in [0, 1], not {checked.max()}")
    return np.flatnonzero(rng.random(checked.size) < checked)


def draw_with_replacement(weights: npt.ArrayLike, k: int, rng: np.random.Generator) -> IntArray:
    """Draw k items with replacement, item i k w_i / sum(w) times on average.

    Systematic: it comes up exactly that number of times, rounded up or down at random (multinomial draws scatter more).

    Returns:
        int64 (k,), ascending, with repeats; items of weight 0 are never drawn.

    Raises:
        ValueError: for weights that are not finite and >= 0 or are all 0 (with k > 0), or k < 0.
    """
    checked = check_weights("draw_with_replacement", "weights", weights)
    k = _count("draw_with_replacement", k)
    if k and not checked.any():
        raise ValueError("draw_with_replacement(weights=...): at least one weight must be positive; all are 0")
    line = np.cumsum(_in_range(checked), dtype=np.float64)
    at = _marks(line, k, rng)
    last = checked.size - 1 - int(np.argmax(checked[::-1] > 0)) if k else 0
    return np.minimum(at, last, out=at)


def _marks(line: Float64Array, count: int, rng: np.random.Generator) -> IntArray:
    """Items int64 (count,) that evenly spaced marks with a random start hit on a line of cumulative sums (M,)."""
    marks = np.arange(count, dtype=np.float64)
    marks += rng.random()
    marks *= line[-1] / count if count else 0
    return np.searchsorted(line, marks, side="right").astype(np.int64, copy=False)


def _smallest(keys: npt.NDArray[Any], bound: Any, k: int, rng: np.random.Generator) -> IntArray:
    """Ids of the k smallest keys, bound being the (k+1)-th smallest; ties with the bound by lot."""
    ids = np.flatnonzero(keys < bound)
    if ids.size == k:
        return ids
    ties = rng.choice(np.flatnonzero(keys == bound), k - ids.size, replace=False, shuffle=False)
    return np.sort(np.append(ids, ties))


def _scaled(weights: Floats) -> Float32Array:
    """The weights as float32 with the largest near 1, so that no quotient of one leaves the range of float32."""
    top = float(weights.max())
    return (weights if 1e-9 < top < 1e9 else weights / np.float64(top)).astype(np.float32, copy=False)


def _in_range(weights: Floats) -> Floats:
    """The weights, scaled if sums or quotients of them could leave the range of float64."""
    top = float(weights.max(initial=0.0))
    return weights if top == 0 or 1e-150 < top < 1e150 else weights.astype(np.float64) / top


def check_weights(function: str, argument: str, values: npt.ArrayLike) -> Floats:
    """The values as float32 or float64 (N,), without a copy where possible."""
    weights = np.asarray(values)
    if weights.dtype.kind not in "fiub":
        raise TypeError(f"{function}({argument}=...): {argument} must be real numbers, not {weights.dtype}")
    if weights.ndim != 1:
        raise ValueError(f"{function}({argument}=...): {argument} must have shape (N,), not {weights.shape}")
    weights = weights if weights.dtype in (np.float32, np.float64) else weights.astype(np.float64)
    if weights.size and not (weights.min() >= 0 and weights.max() < np.inf):  # min and max are NaN if one value is
        bad = weights.size - int(np.count_nonzero((weights >= 0) & (weights < np.inf)))
        raise ValueError(
            f"{function}({argument}=...): {argument} must be finite and >= 0, and {bad} of {weights.size} are not; "
            f"give the items without one (NaN: unseen) the mean, or drop them"
        )
    return weights


def _count(function: str, k: int, limit: int | None = None, limit_name: str = "") -> int:
    try:
        count = operator.index(k)
    except TypeError:
        raise TypeError(f"{function}(k={k!r}): k is the number of items to draw and must be an integer") from None
    if count < 0 or (limit is not None and count > limit):
        rule = "be >= 0" if limit is None else f"lie between 0 and {limit_name}, {limit}"
        raise ValueError(f"{function}(k={count}): k is the number of items to draw and must {rule}")
    return count
