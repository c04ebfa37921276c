"""Is what the model trains on what the sampler dealt out? Frameworks replace samplers, or deal their ids out again."""

from __future__ import annotations

import sys
import warnings

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samplewise.loaders.cursor import Cursor
from samplewise.loaders.order import Order

BATCHES = 3
"""Batches that are looked at before a sampler is trusted."""


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
        due = np.concatenate([due, order.ids(0, min(start, order.length))])
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
    """Notices, in a loop that nothing of ours takes part in, that accelerate deals out ids a second time.

    Rank r of W then gets every W-th batch of its own, r, r + W, r + 2 W, ..., and the others are lost. It is said after
    a few batches that show this very pattern, where an Accelerator is in use and the sampler was not told of it.

    Attributes:
        done: whether there is nothing more to look at.
    """

    def __init__(self) -> None:
        self._shown = 0
        self.done = False

    def look(self, owner: str, ids: Tensor, order: Order, position: int, ranks: int) -> None:
        """Look at one of the first batches.

        Args:
            owner: the sampler's class, for the message.
            ids: integer (B,).
            order: of the loader's ids.
            position: where the epoch stands, over all ranks.
            ranks: number of ranks.

        Raises:
            RuntimeError: the pattern is there.
        """
        size = ids.numel()
        first = (self._shown * ranks + order.rank) * size
        shown = ranks > 1 and first + size <= order.length and _accelerate_in_use()
        self.done = not (shown and np.array_equal(ids.cpu().numpy(), order.ids(first, first + size)))
        self._shown += 1
        if not self.done and self._shown == BATCHES:
            raise RuntimeError(
                f"{owner}: accelerate deals the sampler's ids out to the ranks a second time, so that this rank gets "
                f"one batch in {ranks} of its own and the others are lost. After loader = accelerator.prepare(loader), "
                f"call samplewise.callbacks.huggingface.attach(accelerator, loader)."
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

    def look(self, owner: str, ids: Tensor, order: Order, position: int, ranks: int) -> None:
        """Look at one of the first batches; a step may be observed in pieces.

        Raises:
            RuntimeError: other ids than those of this step or the next.
        """
        start = position - (position - order.begin) % self._step
        check_due(owner, ids, order, start, 2 * self._step, self._fix)
        self._left -= 1
        self.done = not self._left


def _accelerate_in_use() -> bool:
    state = sys.modules.get("accelerate.state")
    return bool(state and state.PartialState._shared_state)
