"""Offline RL data as :class:`Episodes`: from flat arrays, D4RL's files, Minari's data sets and rows of whole episodes.

The observation after an episode's last transition is what these formats treat differently. Where they leave it out, a
terminal transition is kept, since what follows it decides nothing, and the last observation stands in, as it does where
the one after a terminal is not finite; the last transition of an episode that was cut off is dropped, since its next
observation is unknown, but its reward counts in the episode's return.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samplewise.cuda_ext.checks import optional_import
from samplewise.loaders.episode_arrays import BY_STEP
from samplewise.loaders.episodes import Episodes
from samplewise.loaders.flat_episodes import Folder, cut, finished, require, with_transitions
from samplewise.loaders.numeric import Array, as_flags, as_rewards, check_finite, numeric


def read_arrays(
    *,
    observations: Any,
    actions: Any,
    rewards: Any,
    terminals: Any,
    timeouts: Any = None,
    next_observations: Any = None,
    unfinished: str = "drop",
    folder: Folder = None,
) -> Episodes:
    """Episodes one after another in flat arrays, which end where ``terminals`` or ``timeouts`` is True.

    Args:
        observations: (N, ...), before each transition; anything that can be sliced, for example a dataset of h5py.
        actions: (N, ...).
        rewards: (N,).
        terminals: (N,): the episode ended in this transition.
        timeouts: (N,): it was cut off after this transition; None: never.
        next_observations: (N, ...), None where they are not there: see the module's docstring.
        unfinished: what to do with transitions after the last end: ``"drop"`` them with a warning, ``"keep"`` them as
            an episode that was cut off, or ``"error"``.
        folder: where to keep the episodes, memory-mapped; None: in memory.

    Raises:
        TypeError: arrays of anything but numbers.
        ValueError: lengths that disagree, numbers that are not finite, no end of an episode, nothing left, or next
            observations that are not the observations of the next row.
    """
    columns = {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "terminals": terminals,
        "timeouts": timeouts,
        "next_observations": next_observations,
    }
    return cut("read_arrays", columns, unfinished, folder)


def read_d4rl(
    source: Mapping[str, Any] | str | os.PathLike[str], *, unfinished: str = "drop", folder: Folder = None
) -> Episodes:
    """A D4RL data set: the mapping that its ``get_dataset()`` gives, or the path of its HDF5 file.

    A file is read episode by episode. Keys beside those of :func:`read_arrays` are ignored.

    Args:
        source: mapping or path.
        unfinished: see :func:`read_arrays`.
        folder: where to keep the episodes, memory-mapped; None: in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a file, and h5py is not installed.
        TypeError: neither a mapping nor a path.
        ValueError: keys that are missing, and as for :func:`read_arrays`.
    """
    if isinstance(source, (str, os.PathLike)):
        h5py = optional_import("read_d4rl", "h5py", "rl")
        if not os.path.exists(source):
            raise FileNotFoundError(f"read_d4rl: {os.fspath(source)}: there is no such file.")
        with h5py.File(source, "r") as file:
            return _of_d4rl(file, unfinished, folder)
    if not isinstance(source, Mapping):
        raise TypeError(f"read_d4rl({type(source).__name__}): a mapping or the path of an HDF5 file is needed.")
    return _of_d4rl(source, unfinished, folder)


def _of_d4rl(source: Mapping[str, Any], unfinished: str, folder: Folder) -> Episodes:
    require("read_d4rl", BY_STEP, source)
    if "timeouts" not in source and "next_observations" not in source:
        warnings.warn(
            "read_d4rl: there are neither timeouts nor next_observations, so that only terminals end an episode: those "
            "that were cut off run into the next ones, and their returns are sums of both. Add timeouts, bool (N,).",
            stacklevel=3,
        )
    columns = {name: source.get(name) for name in (*BY_STEP, "timeouts", "next_observations")}
    return cut("read_d4rl", columns, unfinished, folder)


def read_minari(
    dataset: Any, *, observation_keys: Sequence[str] | None = None, folder: Folder = None, download: bool = False
) -> Episodes:
    """A Minari data set, read episode by episode.

    Args:
        dataset: a ``MinariDataset``, or the name of one.
        observation_keys: which entries of observations that are dicts make up the observation, each flattened, one
            after another.
        folder: where to keep the episodes, memory-mapped; None: in memory.
        download: fetch a data set that is not on this machine, by its name.

    Raises:
        FileNotFoundError: it is not on this machine.
        ImportError: minari is not installed.
        TypeError: observations or actions that are no arrays.
        ValueError: dicts of observations without keys or with wrong ones, episodes whose arrays do not fit or are not
            finite.
    """
    if isinstance(observation_keys, str):
        raise TypeError(f"read_minari(observation_keys={observation_keys!r}): a list of keys is needed.")
    if isinstance(dataset, str):
        dataset = optional_import("read_minari", "minari", "rl").load_dataset(dataset, download=download)
    about = dataset.storage.get_episode_metadata(dataset.episode_indices)
    lengths = np.array([int(episode["total_steps"]) for episode in about], dtype=np.int64)
    episodes = (_of_minari(episode, observation_keys) for episode in dataset.iterate_episodes())
    return Episodes.from_iterable(episodes, lengths, folder=folder)


def read_rows(
    rows: Any,
    *,
    observations: str = "observations",
    actions: str = "actions",
    rewards: str = "rewards",
    dones: str = "dones",
    folder: Folder = None,
) -> Episodes:
    """Rows that are whole episodes, as the Decision Transformer's data sets have them.

    Args:
        rows: n mappings with T or T + 1 observations (without the last one: see the module's docstring), T actions, T
            rewards and T dones each: an HF ``Dataset`` or a list of dicts, which is gone through twice.
        observations: key of the observations.
        actions: key of the actions.
        rewards: key of the rewards.
        dones: key of what is True in the last transition of an episode that ended by itself. Where rows have no
            ``"dones"``, all count as cut off.
        folder: where to keep the episodes, memory-mapped; None: in memory.

    Raises:
        TypeError: no sequence of mappings of numbers.
        ValueError: keys that are missing, an empty row, lengths that disagree, numbers that are not finite, a done
            before the last transition, or nothing left.
    """
    if isinstance(rows, Mapping):
        keys = [repr(key) for key in rows][:3] or ["'train'"]
        raise TypeError(
            f"read_rows({type(rows).__name__}): rows are needed, not a mapping with {', '.join(keys)}; take a split, "
            f"for example rows[{keys[0]}], or, for one array a key, read_arrays."
        )
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise TypeError(f"read_rows({type(rows).__name__}): a sequence is needed, for example an HF Dataset or a list.")
    names = dict(zip(BY_STEP, (observations, actions, rewards, dones), strict=True))
    if hasattr(rows, "with_format"):
        rows = rows.with_format("numpy", columns=[name for name in rows.column_names if name in names.values()])
    lengths = np.array([len(_of_row(row, number, names)["rewards"]) for number, row in enumerate(rows)], dtype=np.int64)
    kept = with_transitions("read_rows", lengths, stacklevel=3)
    episodes = (_of_row(row, number, names) for number, row in enumerate(rows) if kept[number])
    return Episodes.from_iterable(episodes, lengths[kept], folder=folder)


def _of_minari(episode: Any, keys: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(episode.actions, (Mapping, tuple)):
        raise TypeError(f"read_minari: actions must be an array, but are a {type(episode.actions).__name__} of them.")
    return {
        "observations": finished(_joined(episode.observations, keys), bool(np.any(episode.terminations[-1:]))),
        "actions": episode.actions,
        "rewards": episode.rewards,
        "terminals": episode.terminations,
    }


def _joined(observations: Any, keys: Sequence[str] | None) -> Array:
    if isinstance(observations, tuple):
        raise TypeError("read_minari: observations must be arrays or dicts of them, but are tuples.")
    if not isinstance(observations, Mapping):
        if keys is not None:
            raise ValueError(f"read_minari(observation_keys={keys!r}): the observations are arrays; leave it out.")
        return numeric("read_minari", "observations", observations)
    if not keys:
        raise ValueError(
            f"read_minari(observation_keys={keys!r}): the observations are dicts; say which of "
            f"{', '.join(observations)} make up the observation."
        )
    require(f"read_minari(observation_keys={keys!r})", keys, observations)
    parts = [numeric("read_minari", f"observation_keys={key!r}", observations[key]) for key in keys]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"read_minari: an episode has {[len(part) for part in parts]} observations of {keys!r}.")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _of_row(row: Any, number: int, names: Mapping[str, str]) -> dict[str, Any]:
    """The episode in a row; without a transition where the only one is to be dropped."""
    owner = f"read_rows: row {number}"
    if not isinstance(row, Mapping):
        raise TypeError(f"{owner} must be a mapping, not {type(row).__name__}.")
    optional = names["terminals"] == "dones"
    require(owner, [key for name, key in names.items() if not (name == "terminals" and optional)], row)
    rewards = as_rewards(f"{owner} ", row[names["rewards"]])
    if rewards.ndim == 0:
        raise ValueError(
            f"{owner} has a single reward; a row must be a whole episode: for a transition a row, give the columns to "
            f"read_arrays."
        )
    if not rewards.size:
        raise ValueError(f"{owner} has no rewards; leave empty episodes out.")
    check_finite(f"{owner} ", names["rewards"], rewards, "step {}".format)
    seen, actions = (numeric(f"{owner} ", names[name], row[names[name]]) for name in ("observations", "actions"))
    dones = row.get(names["terminals"])
    terminals = np.zeros(len(rewards), np.bool_) if dones is None else as_flags(f"{owner} ", names["terminals"], dones)
    size = len(rewards)
    if rewards.ndim != 1 or terminals.shape != (size,) or len(actions) != size or len(seen) not in (size, size + 1):
        raise ValueError(
            f"{owner} must have T actions, rewards (T,), dones (T,) and T or T + 1 observations, but has "
            f"{len(actions)}, {rewards.shape}, {terminals.shape} and {len(seen)}."
        )
    if terminals[:-1].any():
        raise ValueError(
            f"{owner} is done in step {terminals.argmax()} of {size} (from 0), before its last; a row must be one "
            f"episode."
        )
    if len(seen) == size and terminals[-1]:
        seen = np.concatenate((seen, seen[-1:]))
    size = len(seen) - 1
    seen, actions = finished(seen, terminals[-1]), actions[:size]
    check_finite(f"{owner} ", names["observations"], seen, "observation {}".format)
    check_finite(f"{owner} ", names["actions"], actions, "step {}".format)
    return {
        "observations": seen,
        "actions": actions,
        "rewards": rewards[:size],
        "terminals": terminals[:size],
        "returns": rewards.sum(dtype=np.float64),
    }
