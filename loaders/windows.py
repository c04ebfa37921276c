"""Pieces of episodes for sequence models, in padded batches: windows of some length and whole trajectories."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samplewise.cuda_ext.checks import choice, integer
from samplewise.loaders.episode_arrays import IntArray, checked_rows

if TYPE_CHECKING:
    from samplewise.loaders.episodes import Episodes


class _Pieces(Dataset[dict[str, Tensor]]):
    """Consecutive transitions of one episode each, padded to one length with zeros."""

    def __init__(self, episodes: Episodes):
        self.episodes = episodes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.episodes!r})"

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    @abstractmethod
    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The whole batch, each tensor (B, H, ...)."""

    def _padded(self, numbers: IntArray, first: IntArray, horizon: int) -> dict[str, Tensor]:
        """Steps first .. first + horizon - 1 of episodes ``numbers``, both (B,); zeros where there are none."""
        data = self.episodes
        steps = first[:, None] + np.arange(horizon)
        mask = (steps >= 0) & (steps < data.lengths[numbers][:, None])
        steps = np.where(mask, steps, 0)
        rows = data.offsets[numbers][:, None] + steps
        sources = {
            "observations": (data.observations, rows + numbers[:, None]),
            "actions": (data.actions, rows),
            "rewards": (data.rewards, rows),
            "terminals": (data.terminals, rows),
            "returns_to_go": (data.returns_to_go, rows),
        }
        batch = {"timesteps": torch.from_numpy(steps), "mask": torch.from_numpy(mask)}
        for name, (values, at) in sources.items():
            taken = values.take(at, axis=0)
            taken[~mask] = 0
            batch[name] = torch.from_numpy(taken)
        return batch


class Windows(_Pieces):
    """Windows of ``horizon`` transitions, one for each transition r; made by :meth:`Episodes.windows`.

    A batch is a dict: ``observations`` (B, H, ...), ``actions`` (B, H, ...), ``rewards`` and ``returns_to_go`` float32
    (B, H), ``terminals`` bool (B, H), ``timesteps`` int64 (B, H), the step in the episode, and ``mask`` bool (B, H),
    True where the transition is real. Everything is zero where it is not.

    Args:
        episodes: N transitions.
        horizon: H >= 1.
        align: ``"end"``: window r ends at transition r and is padded in front; ``"start"``: it starts there and is
            padded behind. It never leaves the episode.

    Raises:
        ValueError: a horizon below 1, or another ``align``.
    """

    def __init__(self, episodes: Episodes, horizon: int, *, align: str = "end"):
        super().__init__(episodes)
        self.horizon = integer("Episodes.windows", "horizon", horizon, 1, what="how many transitions a window has")
        choice("Episodes.windows", "align", align, "end", "start")
        self.align = align

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The windows of transitions ``rows`` (B,).

        Raises:
            IndexError: a row outside [0, N).
        """
        numbers = checked_rows("Windows", rows, len(self))
        episodes = self.episodes.episode_of(numbers)
        first = numbers - self.episodes.offsets[episodes]
        return self._padded(episodes, first - (self.horizon - 1 if self.align == "end" else 0), self.horizon)


class Trajectories(_Pieces):
    """Whole episodes, padded behind to the longest of the batch; made by :meth:`Episodes.trajectories`.

    A batch has the keys of :class:`Windows`; H is the length of its longest episode.
    """

    def __len__(self) -> int:
        return self.episodes.num_episodes

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The episodes with the numbers ``rows`` (B,).

        Raises:
            IndexError: a number outside [0, n).
        """
        numbers = checked_rows("Trajectories", rows, len(self))
        longest = int(self.episodes.lengths[numbers].max(initial=0))
        return self._padded(numbers, np.zeros_like(numbers), longest)
