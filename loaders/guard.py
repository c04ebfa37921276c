"""Is what the model trains on what the sampler dealt out? Frameworks replace samplers, or deal their ids out again."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from samplewise.loaders.cursor import Cursor
from samplewise.loaders.order import Order

BATCHES = 3
"""Batches that are looked at before a sampler is trusted."""


def check_batch(owner: str, sampler: Any, ids: Tensor, fix: str) -> None:
    """For a framework's callback: see that a batch that comes now is the sampler's, before it is trained on.

    Args:
        owner: the callback, for the message.
        sampler: a PlannedSampler.
        ids: integer (B,), this rank's batch.
        fix: what to change in the framework's settings, the end of the message.

    Raises:
        RuntimeError: the ids are not among those that are due.
    """
    check_due(owner, ids, sampler.order(), sampler.consumed, ids.numel() * sampler.num_replicas, fix)


def check_due(owner: str, ids: Tensor, order: Order, position: int, samples: int, fix: str) -> None:
    """Raise unless the ids of a batch are among those due.

    Args:
        owner: who asks, for the message.
        ids: integer (B,), of this rank's batch.
        order: this rank's, or that of all ranks together, where the loader deals the ids out.
        position: where the epoch stands, over all ranks.
        samples: that come next, over all ranks.
        fix: what to change, the end of the message.

    Raises:
        RuntimeError: other ids.
    """
    got = ids.cpu().numpy()
    start, count = order.index_of(position), samples // order.num_replicas
    due = order.ids(start, min(start + count, order.length))
    if start + count > order.length:  # loaders fill the last batches up with the first ones that they have seen
        due = np.concatenate([due, order.ids(order.index_of(0), min(start, order.length))])
    if not np.isin(got, due).all():
        raise RuntimeError(
            f"{owner}: the batch holds the samples {_some(got)}, but {_some(due)} are due, so the loader has another "
            f"sampler, or something deals the sampler's ids out once more. {fix}"
        )


def _some(ids: NDArray[np.int64]) -> str:
    more = f", ... ({ids.size})" if ids.size > 4 else ""
    return f"[{', '.join(map(str, ids[:4].tolist()))}{more}]"


def begin_again(owner: str, ids: Tensor, order: Order, cursor: Cursor, first: int) -> None:
    """See whether the loop left the epoch early and iterates it once more, or only looked at the first batch.

    Args:
        owner: the sampler's class, for the warning.
        ids: integer (B,), the first batch since the sampler was iterated once more.
        order: that of the loader's ids.
        cursor: set back where the epoch begins again.
        first: offset of this rank's first batch in the order.
    """
    cursor.iterated_again = False
    starts = [order.index_of(min(at, order.total - 1)) + first for at in (cursor.start, cursor.consumed)]
    at_start, here = (order.ids(start, start + 1)[0] for start in starts)
    if ids.numel() and int(ids[0]) == at_start and (at_start != here or cursor.consumed >= order.total):
        warnings.warn(
            f"{owner}: the epoch was left early and begins again, with the same samples in the same order. Call "
            f"set_epoch() before each pass.",
            stacklevel=3,
        )
        cursor.consumed = cursor.start


class ReshardingWatch:
    """Notices that accelerate deals out a second time what is dealt out to the ranks already.

    It does so with every loader that it prepared, where the sampler was not told of it: the rank then gets one batch
    in W of its own, and the others are lost. Of a stream whose shards are divided, it reads the first rank's only.

    Attributes:
        done: whether there is nothing more to look at.
    """

    def __init__(self) -> None:
        self._left = BATCHES
        self.done = False

    def look(self, sampler: Any, ids: Tensor) -> None:
        """Look at what accelerate iterates while one of the first batches is observed.

        Args:
            sampler: a PlannedSampler.
            ids: integer (B,), the batch.

        Raises:
            RuntimeError: it deals out the sampler's ids, or a stream that follows the sampler.
        """
        self._left -= 1
        self.done = sampler.num_replicas == 1 or not self._left
        if sampler.num_replicas == 1:
            return
        for loader in _prepared_loaders():
            dealt = type(loader).__name__ == "DataLoaderDispatcher"
            batches: Any = getattr(loader, "batch_sampler", None)
            if getattr(batches, "num_processes", 1) > 1:
                dealt, batches = True, batches.batch_sampler
            if dealt and getattr(batches, "sampler", None) is sampler:
                raise RuntimeError(
                    f"{type(sampler).__name__}: accelerate deals the sampler's ids out to the ranks a second time, so "
                    f"that most of them are lost. After loader = accelerator.prepare(loader), call "
                    f"samplewise.callbacks.huggingface.attach(accelerator, loader)."
                )
            dealt = dealt or type(loader.dataset).__name__ == "IterableDatasetShard"
            if dealt and sampler.on_plan is not None and isinstance(loader.dataset, IterableDataset):
                raise RuntimeError(
                    f"{type(sampler).__name__}: accelerate deals a stream out to the ranks whose shards they divide "
                    f"among themselves already. Leave its loader out of accelerator.prepare(...)."
                )


def _prepared_loaders() -> list[Any]:
    """The loaders that accelerate made and that are being iterated."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return []
    return [loader for loader in state.GradientState().dataloader_references if loader is not None]


class StreamWatch(ReshardingWatch):
    """Notices, besides, that a loop over a stream never says which epoch it is in."""

    def look(self, sampler: Any, ids: Tensor) -> None:
        """Look at one of the first batches, then at how far the epoch is."""
        if self._left > 0:
            super().look(sampler, ids)
        self.done = sampler.set_epoch_called
        if not self.done and sampler.consumed > sampler.total_size:
            self.done = True
            warnings.warn(
                f"{type(sampler).__name__}: more samples were trained on than epoch {sampler.epoch} has, and set_epoch "
                f"was never called: a stream cannot tell where an epoch begins, so that the plan stays what it is. "
                f"Call sampler.set_epoch(epoch) before each pass.",
                stacklevel=3,
            )


class DueWatch:
    """Looks whether the first batches are those that are due, where the loader deals out the ids.

    Args:
        step: samples of one step, all ranks together.
        fix: what to change where they are not, the end of the message.

    Attributes:
        done: whether there is nothing more to look at.
    """

    def __init__(self, step: int, fix: str):
        self._step, self._fix = step, fix
        self._left = BATCHES
        self.done = False

    def look(self, sampler: Any, ids: Tensor) -> None:
        """Look at one of the first batches; a step may be observed in pieces.

        Args:
            sampler: a PlannedSampler.
            ids: integer (B,), the batch.

        Raises:
            RuntimeError: other ids than those of this step or the next.
        """
        start = sampler.consumed - (sampler.consumed - sampler.begin) % self._step
        check_due(type(sampler).__name__, ids, sampler.order(), start, 2 * self._step, self._fix)
        self._left -= 1
        self.done = not self._left
