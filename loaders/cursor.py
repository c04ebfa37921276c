"""Cursor: how far the model is in an epoch, counted by what it trained on, never by what a loader drew."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CONSUMED, _STEP, _LARGEST, _LIMIT = range(4)


class Cursor:
    """The position in one epoch; each epoch has one of its own, so that a state taken in an earlier one stays true.

    Attributes:
        start: samples consumed before this process began: where iterators start after a resume.
        iterated_again: whether an iterator was made in the middle of the epoch.
    """

    def __init__(self, values: tuple[int, int, int, int]):
        self._values = np.array(values, dtype=np.int64)
        self.start = values[_CONSUMED]
        self.iterated_again = False
        self._drawn = False

    @classmethod
    def at_start(cls, step: int) -> Cursor:
        """An epoch's beginning, after ``step`` batches in all."""
        return cls((0, step, 0, -1))

    @classmethod
    def from_tensor(cls, values: Tensor) -> Cursor:
        """What :attr:`tensor` was."""
        consumed, step, largest, limit = values.tolist()
        return cls((consumed, step, largest, limit))

    @property
    def tensor(self) -> Tensor:
        """Int64 (4,), sharing memory with the cursor."""
        return torch.from_numpy(self._values)

    @property
    def consumed(self) -> int:
        """Samples of the epoch that the model has trained on, all ranks together."""
        return int(self._values[_CONSUMED])

    @consumed.setter
    def consumed(self, samples: int) -> None:
        self._values[_CONSUMED] = samples
        if samples == 0:
            self.start = 0

    @property
    def step(self) -> int:
        """Batches observed in all epochs."""
        return int(self._values[_STEP])

    @property
    def limit(self) -> int | None:
        """Samples after which the loop ends the epoch, None: all."""
        return None if self._values[_LIMIT] < 0 else int(self._values[_LIMIT])

    @limit.setter
    def limit(self, samples: int | None) -> None:
        self._values[_LIMIT] = -1 if samples is None else samples

    def end(self, total: int) -> int:
        """Where the loop ends an epoch of ``total`` samples."""
        return total if self.limit is None else max(1, min(self.limit, total))

    def count(self, batch: int) -> None:
        """A batch was trained on, of so many samples on all ranks together."""
        self._values[_CONSUMED] += batch
        self._values[_STEP] += 1
        self._values[_LARGEST] = max(self._values[_LARGEST], batch)

    def begin(self) -> None:
        """A new iterator was made."""
        self.iterated_again = self.consumed > self.start

    def mark_drawn(self) -> None:
        """An iterator handed out all of the epoch's ids."""
        self._drawn = True

    def is_complete(self, total: int) -> bool:
        """Whether the model has trained on all of the epoch."""
        return self.consumed >= self.end(total)

    def is_left(self, total: int) -> bool:
        """Whether a loop that iterates anew is through with the epoch, but for a last batch that its loader drops.

        To be asked only then: a loader that fetches ahead has drawn all ids long before the model is done.
        """
        left = self.end(total) - self.consumed
        return left <= 0 or (self.consumed > 0 and self._drawn and left < int(self._values[_LARGEST]))
