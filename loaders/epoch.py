"""SharedEpoch: an epoch that worker processes see change."""

from __future__ import annotations

from typing import Any

import torch


class SharedEpoch:
    """An epoch number in shared memory, so that what a data set draws by epoch is right in persistent workers too.

    A worker process, forked or spawned, holds the same memory, not a copy of its value when it was started.
    """

    def __init__(self, value: int = 0):
        self._cell = torch.tensor([value], dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cell.share_memory_()  # a copy that was pickled or deep-copied; a worker's is shared already

    @property
    def value(self) -> int:
        """The current epoch, from 0."""
        return int(self._cell[0])

    @value.setter
    def value(self, epoch: int) -> None:
        self._cell[0] = epoch
