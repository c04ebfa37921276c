"""Flat arrays of transitions, cut into episodes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from samplewise.cuda_ext.checks import choice
from samplewise.loaders.episode_arrays import BY_STEP, IntArray
from samplewise.loaders.episodes import Episodes
from samplewise.loaders.numeric import Array, as_flags, as_rewards, check_finite, first_not_finite, numeric

Folder = str | os.PathLike[str] | None


def cut(owner: str, columns: Mapping[str, Any], unfinished: str, folder: Folder) -> Episodes:
    """The episodes in flat arrays, as :func:`samplewise.loaders.offline_data.read_arrays` describes it.

    Args:
        owner: the function that was called, for errors.
        columns: the arrays by name; ``timeouts`` and ``next_observations`` may be None.
        unfinished: ``"drop"``, ``"keep"`` or ``"error"``.
        folder: where to keep the episodes, None: in memory.
    """
    choice(owner, "unfinished", unfinished, "drop", "keep", "error")
    data = {name: _sliceable(owner, name, columns[name]) for name in BY_STEP}
    data |= {name: _sliceable(owner, name, values) for name, values in columns.items() if values is not None}
    data["rewards"] = rewards = as_rewards(owner, data["rewards"][:])
    flags: dict[str, Any] = {
        name: as_flags(owner, name, data[name][:]) for name in ("terminals", "timeouts") if name in data
    }
    data |= flags
    _check_rows(owner, data, len(rewards))
    check_finite(owner, "rewards", rewards)
    stops = _stops(owner, np.logical_or.reduce([*flags.values()]), unfinished)
    starts = np.concatenate(([0], stops[:-1])).astype(np.int64)
    complete = flags["terminals"][stops - 1] | ("next_observations" in data)
    lengths = stops - starts - ~complete
    kept = with_transitions(owner, lengths, stacklevel=4)
    returns = np.add.reduceat(rewards[: stops[-1]], starts, dtype=np.float64)
    episodes = _pieces(owner, data, starts[kept], lengths[kept], complete[kept], returns[kept])
    return Episodes.from_iterable(episodes, lengths[kept], folder=folder)


def with_transitions(owner: str, lengths: IntArray, *, stacklevel: int) -> Array:
    """Which episodes have a transition left: bool (n,). Warns where some have none.

    Raises:
        ValueError: all have none.
    """
    kept: Array = lengths > 0
    if not kept.all():
        few = (
            f"{owner}: {(~kept).sum()} of {len(kept)} episodes were cut off after one transition, whose next "
            f"observation is unknown; they are left out"
        )
        if not kept.any():
            raise ValueError(f"{few}, and nothing remains; give the observation after the last transition too.")
        warnings.warn(f"{few}.", stacklevel=stacklevel)
    return kept


def require(owner: str, names: Sequence[str], there: Mapping[str, Any]) -> None:
    """Look for keys.

    Raises:
        ValueError: some are missing.
    """
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(f"{owner}: {', '.join(missing)} missing; there are {', '.join(map(str, there))}.")


def finished(observations: Array, terminal: bool) -> Array:
    """Observations (T + 1, ...) of an episode; after a terminal the one before stands in for one that is not finite."""
    if terminal and first_not_finite(observations[-1:]) is not None:
        return np.concatenate((observations[:-1], observations[-2:-1]))
    return observations


def _sliceable(owner: str, name: str, values: Any) -> Any:
    """A list as an array; what has a shape can be sliced, and what is on disk stays there."""
    return values if hasattr(values, "shape") else numeric(owner, name, values)


def _check_rows(owner: str, data: Mapping[str, Any], size: int) -> None:
    for name, values in data.items():
        flat = name in ("rewards", "terminals", "timeouts")
        if tuple(values.shape[:1]) != (size,) or (flat and values.ndim != 1):
            raise ValueError(
                f"{owner}({name}=...): one row a transition is needed, N = {size} as the rewards say, but its shape is "
                f"{tuple(values.shape)}; rewards, terminals and timeouts are (N,)."
            )
    if not size:
        raise ValueError(f"{owner}: there are no transitions.")


def _stops(owner: str, ends: Array, unfinished: str) -> IntArray:
    """The row after each episode's last: int64 (n,), from the flags (N,) of the last rows."""
    stops, size = np.flatnonzero(ends) + 1, len(ends)
    left = size - int(stops[-1]) if len(stops) else size
    if left and unfinished == "keep":
        return np.append(stops, size)
    if not len(stops):
        raise ValueError(
            f"{owner}: neither terminals nor timeouts has a True, which makes one episode of {size} transitions that "
            f"never ends; give timeouts, or, if it is one, unfinished='keep'."
        )
    if left:
        rest = (
            f"{owner}(unfinished={unfinished!r}): the last {left} of {size} transitions are of an episode without end"
        )
        if unfinished == "error":
            raise ValueError(f"{rest}; give timeouts, or unfinished='drop' or 'keep'.")
        warnings.warn(f"{rest}; they are left out.", stacklevel=4)
    return stops


def _pieces(
    owner: str, data: Mapping[str, Any], starts: IntArray, lengths: IntArray, complete: Array, returns: Array
) -> Iterator[dict[str, Any]]:
    """The episodes; those that are not complete have an observation more than transitions in the arrays."""
    for start, length, alone, total in zip(starts.tolist(), lengths.tolist(), complete.tolist(), returns, strict=True):
        stop = start + length
        seen = numeric(owner, "observations", data["observations"][start : stop if alone else stop + 1])
        check_finite(owner, "observations", seen, partial(_row, start))
        if alone:
            last = seen[-1:]
            if "next_observations" in data:
                following = numeric(owner, "next_observations", data["next_observations"][start:stop])
                _check_following(owner, data, seen, following, start)
                last = following[-1:]
            seen = finished(np.concatenate((seen, last)), data["terminals"][stop - 1])
            check_finite(owner, "next_observations", seen[-1:], partial(_row, stop - 1))
        actions = numeric(owner, "actions", data["actions"][start:stop])
        check_finite(owner, "actions", actions, partial(_row, start))
        by_step = {name: data[name][start:stop] for name in ("rewards", "terminals")}
        yield {"observations": seen, "actions": actions, **by_step, "returns": total}


def _row(start: int, row: int) -> str:
    return f"row {start + row}"


def _check_following(owner: str, data: Mapping[str, Any], observations: Array, following: Array, start: int) -> None:
    if following.shape != observations.shape:
        raise ValueError(
            f"{owner}(next_observations=...): their rows are {following.shape[1:]}, those of the observations "
            f"{observations.shape[1:]}."
        )
    same = (following[:-1] == observations[1:]).all(axis=tuple(range(1, observations.ndim)))
    if same.all():
        return
    row = start + int(same.argmin())
    mine, theirs = (str(data[name].dtype).removeprefix("torch.") for name in ("next_observations", "observations"))
    rounded = (
        f", or numbers were rounded, as the dtypes differ, {mine} and {theirs}: cast one to the dtype of the other"
    )
    raise ValueError(
        f"{owner}(next_observations=...): row {row} is not row {row + 1} of the observations, though no episode ends "
        f"there; the boundaries (terminals, timeouts) or the order of the rows are wrong"
        f"{rounded if mine != theirs else ''}."
    )
