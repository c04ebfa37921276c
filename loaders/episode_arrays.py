"""The arrays of episodes: how they are checked, and filled from one episode after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samplewise.loaders.draws import some
from samplewise.loaders.numeric import Array, as_flags, as_rewards, check_finite, first_not_finite, numbers, numeric

IntArray = NDArray[np.int64]

BY_STEP = ("observations", "actions", "rewards", "terminals")


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
        ValueError: none, one below 1, or rows of different shapes.
    """
    counts = numbers("Episodes", "lengths", lengths)
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
        TypeError: anything but numbers.
        ValueError: another shape, or numbers that are not finite.
    """
    array = numbers("Episodes", "returns", returns).astype(np.float64)
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


def check_numbers(arrays: Mapping[str, Array], lengths: IntArray) -> None:
    """Look at each observation and action, also at the observation after a terminal.

    Raises:
        ValueError: some are not finite.
    """
    offsets = offsets_of(lengths)
    with_last = offsets + np.arange(len(offsets))
    check_finite("Episodes", "observations", arrays["observations"], partial(_place, with_last, "observation"))
    check_finite("Episodes", "actions", arrays["actions"], partial(_place, offsets, "step"))


def check_steps(rewards: Array, terminals: Array, offsets: IntArray) -> None:
    """Look at each transition.

    Raises:
        ValueError: rewards that are not finite, terminals before the end of their episode.
    """
    check_finite("Episodes", "rewards", rewards, partial(_place, offsets, "step"))
    ends = np.flatnonzero(terminals)
    early = ends[offsets[offsets.searchsorted(ends, side="right")] != ends + 1]
    if len(early):
        raise ValueError(
            f"Episodes(terminals=...): a terminal ends its episode, but {len(early)} are before the end of theirs, the "
            f"first in {_place(offsets, 'step', int(early[0]))}, from 0; the boundaries are wrong, or these are no "
            f"terminals."
        )


def _place(starts: IntArray, what: str, row: int) -> str:
    """Episode and step of a row, for an error; the episodes' rows start at ``starts`` (n + 1,)."""
    episode = int(starts.searchsorted(row, side="right")) - 1
    return f"episode {episode}, {what} {row - starts[episode]} of {starts[episode + 1] - starts[episode]}"


def completed(arrays: Mapping[str, Array], lengths: IntArray, returns: Any) -> dict[str, Array]:
    """The arrays of steps with what is computed from them, and ``returns``, None for the sums of the rewards.

    Raises:
        TypeError: returns that are no numbers.
        ValueError: shapes that disagree, and see :func:`check_steps`, :func:`checked_returns` and :func:`to_go`.
    """
    check_shapes(arrays, lengths)
    offsets = offsets_of(lengths)
    check_steps(arrays["rewards"], arrays["terminals"], offsets)
    sums = np.add.reduceat(arrays["rewards"], offsets[:-1], dtype=np.float64)
    totals = sums if returns is None else checked_returns(returns, len(lengths))
    computed = {"lengths": lengths, "returns": totals, "returns_to_go": to_go(arrays["rewards"], offsets, totals)}
    return {**arrays, **computed}


def offsets_of(lengths: IntArray) -> IntArray:
    """Where each episode starts, and where the last one ends: int64 (n + 1,)."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def to_go(rewards: Array, offsets: IntArray, returns: NDArray[np.float64]) -> NDArray[np.float32]:
    """What of the return was still to come before each transition: float32 (N,).

    Raises:
        ValueError: some of it is beyond float32.
    """
    out = np.empty(len(rewards), dtype=np.float32)
    for number, (start, stop) in enumerate(pairwise(offsets.tolist())):
        to_come = np.cumsum(rewards[start:stop][::-1], dtype=np.float64)[::-1]
        with np.errstate(over="ignore"):
            out[start:stop] = to_come + (returns[number] - to_come[0])  # it may count rewards that are not stored
    row = first_not_finite(out)
    if row is not None:
        raise ValueError(
            f"Episodes(rewards=..., returns=...): returns_to_go are kept as float32, at most "
            f"{np.finfo(np.float32).max:.1e}, but in {_place(offsets, 'step', row)}, from 0, more is to come; scale "
            f"rewards and returns down."
        )
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
        ValueError: more or fewer episodes than lengths, or one whose arrays do not fit or are not finite.
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
            with np.errstate(over="ignore"):  # whole numbers may be beyond float16
                here[...] = part
            check_finite(_owner(number), name, here)
        done = number + 1
    if done != n:
        raise ValueError(f"Episodes.from_iterable: {n} lengths, but {done} episodes.")


def _parts(episode: Mapping[str, Any], number: int) -> Iterator[tuple[str, Array]]:
    """One episode's share of each array but the lengths."""
    missing = [name for name in BY_STEP if name not in episode]
    if missing:
        raise ValueError(f"Episodes.from_iterable: episode {number} has no {', '.join(missing)}.")
    owner = _owner(number)
    rewards = as_rewards(owner, episode["rewards"])
    with np.errstate(invalid="ignore"):  # rewards that are not finite are refused when they are in their place
        returns = episode.get("returns", rewards.sum(dtype=np.float64))
    yield "rewards", rewards
    yield "observations", numeric(owner, "observations", episode["observations"])
    yield "actions", numeric(owner, "actions", episode["actions"])
    yield "terminals", as_flags(owner, "terminals", episode["terminals"])
    yield "returns", numbers(owner, "returns", returns)[None].astype(np.float64)


def _owner(number: int) -> str:
    return f"Episodes.from_iterable: episode {number} "
