"""The order of one epoch: which id stands at which position, on which rank, without a list of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.ops import permutation
from samplewise.loaders.plan import Plan
from samplewise.loaders.seeding import derive

CHUNK = 65_536
"""Ids turned into Python integers at a time."""


@dataclass(frozen=True)
class Segment:
    """A stretch ``[start, stop)`` of one shuffled plan; ``number`` is the plan's number and keys its order."""

    plan: Plan
    number: int
    start: int
    stop: int

    def ids(self, first: int, count: int, stride: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
        """``count`` ids from offset ``first`` on, every ``stride``-th: int64 (count,)."""
        first += self.start
        if not shuffle:
            return self.plan.take(np.arange(first, first + count * stride, stride))
        key = derive(seed, self.number, "order")
        return self.plan.take(permutation(len(self.plan), key, first, count, stride=stride).numpy())

    def state(self) -> dict[str, Any]:
        """The segment as numbers and tensors; a plan that is a ``range`` needs three integers."""
        ids, weights = self.plan.ids, self.plan.weights
        return {
            "number": self.number,
            "start": self.start,
            "stop": self.stop,
            "ids": [ids.start, ids.stop, ids.step] if isinstance(ids, range) else torch.from_numpy(ids),
            "weights": None if weights is None else torch.from_numpy(weights),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Segment:
        """The segment that :meth:`state` described."""
        ids, weights = state["ids"], state["weights"]
        plan = Plan(
            ids.cpu().numpy() if isinstance(ids, Tensor) else range(*ids),
            None if weights is None else weights.cpu().numpy(),
        )
        return cls(plan, state["number"], state["start"], state["stop"])


@dataclass(frozen=True)
class Order:
    """One epoch as one rank sees it.

    Rank r of W takes the positions r, r + W, r + 2 W, ... of the epoch's ids. ``total`` is a multiple of W: the epoch's
    first ids are repeated at its end to fill it up, or its last ones are left out (``drop_last``).

    Attributes:
        segments: stretches of plans, one after another.
        total: positions of all ranks together.
    """

    segments: tuple[Segment, ...]
    total: int
    rank: int
    num_replicas: int
    seed: int
    shuffle: bool

    @property
    def length(self) -> int:
        """Positions of this rank."""
        return self.total // self.num_replicas

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """This rank's ids number ``start`` to ``stop``: int64 (stop - start,)."""
        parts = []
        position = self.rank + start * self.num_replicas
        left = stop - start
        size = sum(segment.stop - segment.start for segment in self.segments)
        while left:
            offset = position % size  # positions beyond the end are the filling
            for segment in self.segments:
                length = segment.stop - segment.start
                if offset < length:
                    break
                offset -= length
            count = min(left, -(-(length - offset) // self.num_replicas))
            parts.append(segment.ids(offset, count, self.num_replicas, self.seed, self.shuffle))
            position += count * self.num_replicas
            left -= count
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class OrderIterator(Iterator[int]):
    """Runs through one rank's order; its state is three integers (torchdata's ``Stateful`` protocol).

    Args:
        order: what to run through.
        epoch: the epoch it belongs to.
        start: number of ids to pass over.
        previous: the order of the epoch before, where a state of its last batches has just been loaded.
    """

    def __init__(self, order: Order, epoch: int, start: int, previous: Order | None = None):
        self._order, self._epoch, self._previous = order, epoch, previous
        self._move_to(start)

    def _move_to(self, index: int) -> None:
        self._index = index
        self._chunk: Iterator[int] = iter(())

    @property
    def exhausted(self) -> bool:
        """Whether all ids were handed out."""
        return self._index >= self._order.length

    def __next__(self) -> int:
        value = next(self._chunk, None)
        if value is None:
            stop = min(self._index + CHUNK, self._order.length)
            self._chunk = iter(self._order.ids(self._index, stop).tolist())
            value = next(self._chunk)
        self._index += 1
        return value

    def state_dict(self) -> dict[str, int]:
        """``epoch`` and ``position`` (ids handed out on all ranks together); JSON-able."""
        return {"version": 1, "epoch": self._epoch, "position": self._index * self._order.num_replicas}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the saved position; the sampler must be at the saved epoch already, or at the start of the next."""
        if self._previous is not None and state["epoch"] == self._epoch - 1:
            if state["position"] >= self._previous.total:
                return
            self._order, self._epoch = self._previous, state["epoch"]  # a loader that passes over the rest itself
        if state["epoch"] != self._epoch:
            raise ValueError(
                f"The loader's state is of epoch {state['epoch']}, the sampler is at epoch {self._epoch}: call "
                f"sampler.load_state_dict(...) with the state saved beside it before the loader is iterated."
            )
        self._move_to(min(state["position"] // self._order.num_replicas, self._order.length))
