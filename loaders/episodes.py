"""Episodes: the transitions of whole episodes, in memory or memory-mapped, fetched in batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from samplewise.loaders.episode_arrays import (
    BY_STEP,
    IntArray,
    check_numbers,
    checked_lengths,
    checked_rows,
    completed,
    fill,
    layout_of,
    offsets_of,
)
from samplewise.loaders.numeric import Array, as_flags, as_rewards, numeric
from samplewise.loaders.table import Table, Version
from samplewise.loaders.windows import Trajectories, Windows

_STORED = (*BY_STEP, "lengths", "returns", "returns_to_go")


class Episodes(Dataset[dict[str, Tensor]]):
    """Map-style data set of transitions, episode after episode; item r is transition r of N.

    A batch is a dict: ``observations`` (B, ...), ``actions`` (B, ...), ``rewards`` float32 (B,), ``terminals`` bool
    (B,) and ``next_observations`` (B, ...). A DataLoader gets it whole, by one call of ``__getitems__``::

        loader = DataLoader(with_ids(episodes), 256, sampler=sampler, collate_fn=collate_with_ids())

    Arrays, tensors and lists are taken; float64 and bfloat16 become float32, other dtypes stay.

    Args:
        observations: (N + n, ...): of episode i its T_i observations and then the one after its last transition, so
            that transition r of episode i leads from row r + i to row r + i + 1. After a terminal that one decides
            nothing; any finite numbers do.
        actions: (N, ...).
        rewards: (N,).
        terminals: (N,): True where the episode ended in this transition, so that nothing can follow. An episode that
            was cut off, by a time limit for example, has none.
        lengths: ints (n,): T_i >= 1 transitions each, N in all.
        returns: (n,): undiscounted returns, None for the sums of the rewards.
        meta: notes that JSON can hold, for example how the data were generated; saved with them.

    Attributes:
        observations, actions, rewards, terminals: the arrays, rewards float32, terminals bool.
        lengths: int64 (n,).
        returns: float64 (n,).
        returns_to_go: float32 (N,): what was still to come of the episode's return before this transition.
        offsets: int64 (n + 1,): episode i has the transitions offsets[i] .. offsets[i + 1] - 1.
        num_episodes: n.
        meta: the notes.

    Raises:
        TypeError: arrays of anything but numbers.
        ValueError: shapes that disagree, an episode without transitions, a terminal before the end of its episode,
            numbers that are not finite in the dtype that is kept, masked elements.
    """

    def __init__(
        self,
        *,
        observations: Any,
        actions: Any,
        rewards: Any,
        terminals: Any,
        lengths: Any,
        returns: Any = None,
        meta: Mapping[str, Any] | None = None,
    ):
        counts = checked_lengths(lengths)
        arrays: dict[str, Array] = {
            "observations": numeric("Episodes", "observations", observations),
            "actions": numeric("Episodes", "actions", actions),
            "rewards": as_rewards("Episodes", rewards),
            "terminals": as_flags("Episodes", "terminals", terminals),
        }
        arrays = completed(arrays, counts, returns)
        check_numbers(arrays, counts)
        self._hold(arrays, dict(meta or {}), None)

    def _hold(self, arrays: Mapping[str, Array], meta: dict[str, Any], source: tuple[str, str] | None) -> None:
        self.observations, self.actions, self.rewards, self.terminals = (np.asarray(arrays[name]) for name in BY_STEP)
        self.returns_to_go: NDArray[np.float32] = np.asarray(arrays["returns_to_go"])
        self.lengths: IntArray = np.array(arrays["lengths"])
        self.returns: NDArray[np.float64] = np.array(arrays["returns"])
        self.offsets = offsets_of(self.lengths)
        self.num_episodes = len(self.lengths)
        self.meta = meta
        self._source = source

    def __repr__(self) -> str:
        return f"Episodes({self.num_episodes:,} episodes, {len(self):,} transitions)"

    # --- reading ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The transitions ``rows`` (B,) as one batch.

        Raises:
            IndexError: a row outside [0, N).
        """
        numbers = checked_rows("Episodes", rows, len(self))
        at = numbers + self._episode_of(numbers)
        sources = {
            "observations": (self.observations, at),
            "actions": (self.actions, numbers),
            "rewards": (self.rewards, numbers),
            "terminals": (self.terminals, numbers),
            "next_observations": (self.observations, at + 1),
        }
        return {name: torch.from_numpy(values.take(where, axis=0)) for name, (values, where) in sources.items()}

    def episode_of(self, rows: Any) -> IntArray:
        """The episode that each of the transitions ``rows`` (B,) belongs to: int64 (B,).

        Raises:
            IndexError: a row outside [0, N).
        """
        return self._episode_of(checked_rows("Episodes", rows, len(self)))

    def _episode_of(self, rows: IntArray) -> IntArray:
        return self.offsets.searchsorted(rows, side="right") - 1

    @property
    def first_observations(self) -> Array:
        """The observation that each episode starts with: (n, ...), a copy."""
        first: Array = self.observations[self.offsets[:-1] + np.arange(self.num_episodes)]
        return first

    def windows(self, horizon: int, *, align: str = "end") -> Windows:
        """A data set of N windows of ``horizon`` transitions, with the rows of this one.

        Args:
            horizon: transitions a window, >= 1.
            align: ``"end"``: window r ends at transition r, padded in front: what a causal sequence model sees when it
                acts; ``"start"``: it starts there, padded behind.
        """
        return Windows(self, horizon, align=align)

    def trajectories(self) -> Trajectories:
        """A data set of the n whole episodes, whose rows are their numbers."""
        return Trajectories(self)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write everything into a folder, for :meth:`open`; episodes that it holds already are replaced.

        Raises:
            TypeError: notes that JSON cannot hold.
            ValueError: the folder holds something else.
        """
        arrays: dict[str, Array] = {name: getattr(self, name) for name in _STORED}
        layout = {name: (values.shape, values.dtype) for name, values in arrays.items()}
        with _table(folder).writing(layout, meta=self.meta) as stored:
            for name, values in arrays.items():
                stored[name][...] = values

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Episodes:
        """The episodes in a folder, memory-mapped.

        Pickled, as for the workers of a DataLoader, they travel as the path of the folder.

        Raises:
            RuntimeError: there are none yet.
            ValueError: the folder holds something else, or is damaged.
        """
        table = _table(folder)
        opened = cls.__new__(cls)
        opened._take(str(table.path), table.snapshot())
        return opened

    def _take(self, folder: str, version: Version) -> None:
        self._hold(version.arrays, version.meta, (folder, version.token))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self._source is None else {"_source": self._source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["_source"] is None:
            self.__dict__.update(state)
            return
        folder, token = state["_source"]
        version = _table(folder).snapshot()
        if version.token != token:
            raise RuntimeError(
                f"Episodes.open({folder!r}): these episodes were pickled as the path of their folder, which holds "
                f"others by now; open it anew, and do not write into it while it is in use."
            )
        self._take(folder, version)

    @classmethod
    def from_iterable(
        cls,
        episodes: Iterable[Mapping[str, Any]],
        lengths: Any,
        *,
        folder: str | os.PathLike[str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Episodes:
        """Take one episode after another; with a folder, they are never in memory together.

        Args:
            episodes: n mappings with ``observations`` (T + 1, ...), ``actions`` (T, ...), ``rewards`` (T,),
                ``terminals`` (T,) and perhaps ``returns``, a number; the first sets the shapes and dtypes.
            lengths: ints (n,): their T.
            folder: where to keep them, memory-mapped; episodes that it holds already are replaced. None: in memory.
            meta: notes that JSON can hold.

        Raises:
            TypeError, ValueError: as of the constructor, and episodes whose arrays do not fit each other.
        """
        counts, notes = checked_lengths(lengths), dict(meta or {})
        iterator = iter(episodes)
        first = next(iterator, None)
        if first is None:
            raise ValueError(f"Episodes.from_iterable: {len(counts)} lengths, but no episode.")
        layout = layout_of(first, counts)
        items = chain([first], iterator)
        if folder is None:
            arrays: dict[str, Array] = {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}
            fill(arrays, items, counts)
            made = cls.__new__(cls)
            made._hold(completed(arrays, counts, arrays["returns"]), notes, None)
            return made
        with _table(folder).writing({**layout, "returns_to_go": layout["rewards"]}, meta=notes) as stored:
            fill(stored, items, counts)
            stored["returns_to_go"][:] = completed(stored, counts, stored["returns"])["returns_to_go"]
        return cls.open(folder)


def _table(folder: str | os.PathLike[str]) -> Table:
    table = Table(folder, keep=1)
    if table.version and not {*_STORED} <= {*table.snapshot().arrays}:
        raise ValueError(f"{table!r} holds {', '.join(table.snapshot().arrays)}, not episodes; take another folder.")
    return table
