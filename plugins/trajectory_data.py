"""What a sampler of trajectories is told of them, checked."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from samplewise.loaders.draws import some
from samplewise.loaders.numeric import numbers
from samplewise.plugins.weights import check_weights

Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What is known of n trajectories.

    Attributes:
        returns: float64 (n,), finite.
        lengths: int64 (n,), >= 1.
        first_obs: float64 (n, d), finite, in mode "aw", otherwise None.
        weights: float64 (n,), finite and >= 0, in mode "weights", otherwise None.
    """

    returns: Float64Array
    lengths: IntArray
    first_obs: Float64Array | None
    weights: Float64Array | None

    @classmethod
    def checked(cls, owner: str, mode: str, returns: Any, lengths: Any, first_obs: Any, weights: Any) -> Trajectories:
        """What was given to `owner`.

        Raises:
            TypeError: no numbers.
            ValueError: values outside their range, lengths that differ, or what the mode lacks or does not use.
        """
        hint = "their rewards hold NaN or inf: repair them, or drop these trajectories"
        returns = check_values(owner, "returns", returns, hint=hint)
        lengths = check_lengths(owner, lengths, returns.size)
        if mode != "aw":
            first_obs = None
        elif first_obs is None:
            raise ValueError(f"{owner}(mode='aw'): it needs first_obs, (n, ...); give them, or use mode='rw'.")
        else:
            first_obs = check_observations(owner, first_obs, returns.size)
        if (weights is None) == (mode == "weights"):
            raise ValueError(f"{owner}(mode={mode!r}): weights, (n,), go with mode='weights', and with no other.")
        if weights is not None:
            weights = check_weights(owner, "weights", numbers(owner, "weights", weights)).astype(np.float64)
            if weights.size != returns.size:
                raise ValueError(f"{owner}(weights=...): there are {weights.size} for {returns.size} trajectories.")
        return cls(returns, lengths, first_obs, weights)

    def joined(self, owner: str, more: Trajectories) -> Trajectories:
        """These, and then the others.

        Raises:
            ValueError: the others' first observations are of another size.
        """
        first_obs = weights = None
        if self.first_obs is not None and more.first_obs is not None:
            width, other = self.first_obs.shape[1], more.first_obs.shape[1]
            if other != width:
                raise ValueError(f"{owner}(first_obs=...): first_obs must have {width} features each, not {other}.")
            first_obs = np.concatenate((self.first_obs, more.first_obs))
        if self.weights is not None and more.weights is not None:
            weights = np.concatenate((self.weights, more.weights))
        lengths = np.concatenate((self.lengths, more.lengths))
        return Trajectories(np.concatenate((self.returns, more.returns)), lengths, first_obs, weights)

    def fingerprint(self, unit: str) -> str:
        """Of the data set: of returns, lengths and what an id is."""
        digest = sha256(f"{unit}, {self.returns.size}".encode())
        digest.update(self.returns.data)
        digest.update(self.lengths.data)
        return f"trajectories:{digest.hexdigest()}"


def check_values(owner: str, name: str, values: Any, size: int | None = None, *, hint: str = "") -> Float64Array:
    """Real numbers, one a trajectory, as float64 (n,).

    Raises:
        TypeError: no real numbers.
        ValueError: another shape, none, or some that are not finite (`hint` says what to do about it).
    """
    array = numbers(owner, name, values)
    if array.ndim != 1 or array.size == 0 or size not in (None, array.size):
        shape = "(n,), n >= 1" if size is None else f"({size},)"
        raise ValueError(f"{owner}({name}=...): {name} must have shape {shape}, one a trajectory, not {array.shape}.")
    checked = array.astype(np.float64)
    _check_finite(owner, name, np.isfinite(checked), hint)
    return checked


def check_observations(owner: str, first_obs: Any, size: int) -> Float64Array:
    """First observations, real and finite, as float64 (n, d).

    Raises:
        TypeError: no real numbers.
        ValueError: another number than `size` of them, or some that are not finite.
    """
    array = numbers(owner, "first_obs", first_obs)
    if array.ndim == 0 or len(array) != size:
        raise ValueError(
            f"{owner}(first_obs=...): first_obs must be ({size}, ...), one observation a trajectory, not {array.shape}."
        )
    features = array.reshape(size, -1).astype(np.float64)
    _check_finite(owner, "first_obs", np.all(np.isfinite(features), axis=1), "drop these trajectories")
    return features


def _check_finite(owner: str, name: str, finite: npt.NDArray[np.bool_], hint: str) -> None:
    if not finite.all():
        bad = f"{np.count_nonzero(~finite)} of {finite.size} are not (trajectories {some(~finite)})"
        raise ValueError(f"{owner}({name}=...): {name} must be finite, and {bad}{hint and '; '}{hint}.")


def check_lengths(owner: str, lengths: Any, size: int) -> IntArray:
    """Transitions of `size` trajectories, as int64 (n,).

    Raises:
        TypeError: no integers.
        ValueError: another number of them, or some below 1.
    """
    array = numbers(owner, "lengths", lengths)
    if array.shape != (size,):
        raise ValueError(f"{owner}(lengths=...): lengths must be ({size},), one a trajectory, not {array.shape}.")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{owner}(lengths=...): lengths must be integers, not {array.dtype}.")
    if (array < 1).any():
        raise ValueError(
            f"{owner}(lengths=...): each trajectory must have a transition, but trajectories {some(array < 1)} have "
            f"none; drop them from all arguments."
        )
    if array.sum(dtype=np.float64) >= 2.0**62:
        raise ValueError(f"{owner}(lengths=...): the lengths must add up to less than 2^62 transitions.")
    return array.astype(np.int64)
