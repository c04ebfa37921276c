"""The arrays of episodes: how they are checked, and filled from one episode after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samplewise.loaders.draws import some

Array = NDArray[Any]
IntArray = NDArray[np.int64]

BY_STEP = ("observations", "actions", "rewards", "terminals")


def numeric(owner: str, name: str, values: Any) -> Array:
    """``values`` as an array of numbers that torch knows; float64 as float32.

    Raises:
        TypeError: anything but numbers.
        ValueError: rows of different shapes.
    """
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{owner}({name}=...): rows of one shape are needed: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}({name}=...): an array of numbers is needed, not of {array.dtype}.")
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 4
    with np.errstate(over="ignore"):  # what becomes inf is refused where it matters
        return array.astype(np.float32 if wide else array.dtype.newbyteorder("="), copy=False)


def as_rewards(owner: str, values: Any) -> NDArray[np.float32]:
    """``values`` as float32, see :func:`numeric`."""
    return numeric(owner, "rewards", values).astype(np.float32, copy=False)


def as_flags(owner: str, name: str, values: Any) -> NDArray[np.bool_]:
    """``values`` as bool.

    Raises:
        TypeError: anything but numbers.
        ValueError: a number that is neither 0 nor 1.
    """
    array = numeric(owner, name, values)
    if array.dtype.kind != "b" and not ((array == 0) | (array == 1)).all():
        raise ValueError(f"{owner}({name}=...): True or False (1 or 0) is needed for each transition.")
    return array.astype(np.bool_, copy=False)


def checked_rows(owner: str, rows: Any, size: int) -> IntArray:
    """``rows`` (B,) as int64.

    Raises:
        TypeError: no integers.
        IndexError: outside [0, size).
    """
    numbers = np.asarray(rows)
    if numbers.size == 0:
        return np.empty(0, dtype=np.int64)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise TypeError(f"{owner}: rows must be integers (B,), not {numbers.dtype}{numbers.shape}.")
    if numbers.min() < 0 or numbers.max() >= size:
        outside = numbers[(numbers < 0) | (numbers >= size)]
        raise IndexError(f"{owner}: rows in [0, {size}) are needed, not {outside[:5].tolist()}.")
    return numbers.astype(np.int64, copy=False)


def checked_lengths(lengths: Any) -> IntArray:
    """``lengths`` (n,) as int64.

    Raises:
        TypeError: no integers.
        ValueError: none, or one below 1.
    """
    counts = np.asarray(lengths)
    if counts.size == 0:
        raise ValueError("Episodes(lengths=[]): at least one episode is needed.")
    if counts.dtype.kind not in "iu" or counts.ndim != 1:
        raise TypeError(f"Episodes(lengths=...): ints (n,) are needed, not {counts.dtype}{counts.shape}.")
    if counts.min() < 1:
        raise ValueError(
            f"Episodes(lengths=...): an episode has at least one transition, but episodes {some(counts < 1)} have "
            f"none; leave them out."
        )
    return counts.astype(np.int64)


def checked_returns(returns: Any, n: int) -> NDArray[np.float64]:
    """``returns`` as float64 (n,).

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    array = np.asarray(returns, dtype=np.float64)
    if array.shape != (n,):
        raise ValueError(f"Episodes(returns=...): {n} episodes need returns ({n},), not {array.shape}.")
    bad = ~np.isfinite(array)
    if bad.any():
        raise ValueError(f"Episodes(returns=...): those of episodes {some(bad)} are not finite.")
    return array


def check_shapes(arrays: Mapping[str, Array], lengths: IntArray) -> None:
    """Compare the arrays of steps with the lengths.

    Raises:
        ValueError: they disagree.
    """
    n, size = len(lengths), int(lengths.sum())
    there = f"the lengths say n = {n} episodes of N = {size} transitions in all"
    if arrays["observations"].shape[:1] != (size + n,):
        raise ValueError(
            f"Episodes(observations=...): {there}; observations need N + n = {size + n} rows, one more than "
            f"transitions in each episode, not {arrays['observations'].shape}."
        )
    if arrays["actions"].shape[:1] != (size,):
        raise ValueError(f"Episodes(actions=...): {there}; actions need N rows, not {arrays['actions'].shape}.")
    for name in ("rewards", "terminals"):
        if arrays[name].shape != (size,):
            raise ValueError(f"Episodes({name}=...): {there}; {name} must be ({size},), not {arrays[name].shape}.")


def check_steps(rewards: Array, terminals: Array, offsets: IntArray) -> None:
    """Look at each transition.

    Raises:
        ValueError: rewards that are not finite, terminals before the end of their episode.
    """
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(f"Episodes(rewards=...): {len(bad)} are not finite, the first in {_step(bad[0], offsets)}.")
    ends = np.flatnonzero(terminals)
    early = ends[offsets[offsets.searchsorted(ends, side="right")] != ends + 1]
    if len(early):
        raise ValueError(
            f"Episodes(terminals=...): a terminal ends its episode, but {len(early)} are before the end of theirs, the "
            f"first in {_step(early[0], offsets)}; the boundaries are wrong, or these are no terminals."
        )


def _step(row: np.int64, offsets: IntArray) -> str:
    episode = int(offsets.searchsorted(row, side="right")) - 1
    return f"episode {episode}, step {row - offsets[episode]} of {offsets[episode + 1] - offsets[episode]}, from 0"


def offsets_of(lengths: IntArray) -> IntArray:
    """Where each episode starts, and where the last one ends: int64 (n + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def to_go(rewards: Array, offsets: IntArray, returns: NDArray[np.float64]) -> NDArray[np.float32]:
    """What of the return was still to come before each transition: float32 (N,)."""
    out = np.empty(len(rewards), dtype=np.float32)
    for number, (start, stop) in enumerate(pairwise(offsets.tolist())):
        to_come = np.cumsum(rewards[start:stop][::-1], dtype=np.float64)[::-1]
        out[start:stop] = to_come + (returns[number] - to_come[0])  # a return may count rewards that are not stored
    return out


def layout_of(first: Mapping[str, Any], lengths: IntArray) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array, as the lengths and the first episode say."""
    n, size = len(lengths), int(lengths.sum())
    rows = {"observations": size + n, "returns": n}
    layout = {name: ((rows.get(name, size), *part.shape[1:]), part.dtype) for name, part in _parts(first, 0)}
    return {**layout, "lengths": ((n,), np.dtype(np.int64))}


def fill(out: Mapping[str, Array], episodes: Iterable[Mapping[str, Any]], lengths: IntArray) -> None:
    """Write one episode after another into the arrays that :func:`layout_of` names.

    Raises:
        TypeError: arrays of anything but numbers.
        ValueError: more or fewer episodes than lengths, or one whose arrays do not fit.
    """
    n, offsets, done = len(lengths), offsets_of(lengths), 0
    out["lengths"][:] = lengths
    for number, episode in enumerate(episodes):
        if number == n:
            raise ValueError(f"Episodes.from_iterable: {n} lengths, but more episodes.")
        start, stop = int(offsets[number]), int(offsets[number + 1])
        spans = {"observations": (start + number, stop + number + 1), "returns": (number, number + 1)}
        for name, part in _parts(episode, number):
            here = out[name][slice(*spans.get(name, (start, stop)))]
            as_float = here.dtype.kind == "f" and part.dtype.kind in "iu"
            if part.shape != here.shape or not (part.dtype == here.dtype or as_float):
                raise ValueError(
                    f"Episodes.from_iterable: episode {number}, of {lengths[number]} transitions, needs {name} "
                    f"{here.dtype}{here.shape}, as its length and the first episode say, not {part.dtype}{part.shape}."
                )
            here[...] = part
        done = number + 1
    if done != n:
        raise ValueError(f"Episodes.from_iterable: {n} lengths, but {done} episodes.")


def _parts(episode: Mapping[str, Any], number: int) -> Iterator[tuple[str, Array]]:
    """One episode's share of each array but the lengths."""
    missing = [name for name in BY_STEP if name not in episode]
    if missing:
        raise ValueError(f"Episodes.from_iterable: episode {number} has no {', '.join(missing)}.")
    owner = f"Episodes.from_iterable: episode {number} "
    rewards = as_rewards(owner, episode["rewards"])
    with np.errstate(invalid="ignore"):  # rewards that are not finite are refused by the constructor
        returns = episode.get("returns", rewards.sum(dtype=np.float64))
    yield "rewards", rewards
    yield "observations", numeric(owner, "observations", episode["observations"])
    yield "actions", numeric(owner, "actions", episode["actions"])
    yield "terminals", as_flags(owner, "terminals", episode["terminals"])
    yield "returns", np.asarray([returns], dtype=np.float64)
