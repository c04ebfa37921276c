"""The order of one epoch: which id stands at which position, on which rank, without a list of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext import Ledger
from samplewise.cuda_ext.ops import permutation
from samplewise.loaders.options import Arrange
from samplewise.loaders.plan import Plan
from samplewise.loaders.seeding import derive, generator

VERSION = 1
CHUNK = 65_536
"""Ids turned into Python integers at a time."""


@dataclass(frozen=True)
class Segment:
    """A stretch ``[start, stop)`` of one shuffled plan; ``number`` is the plan's number and keys its order."""

    plan: Plan
    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its plan."""
        return len(self) == len(self.plan)

    def positions(self, first: int, count: int, stride: int, seed: int, shuffle: bool) -> NDArray[np.int64]:
        """Where in the plan ``count`` ids stand, from offset ``first`` on, every ``stride``-th: int64 (count,)."""
        first += self.start
        if not shuffle:
            return np.arange(first, first + count * stride, stride)
        key = derive(seed, self.number, "order")
        positions: NDArray[np.int64] = permutation(len(self.plan), key, first, count, stride=stride).numpy()
        return positions

    def shown(self, seed: int, shuffle: bool) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All its ids, int64 (m,), and their weights, float32 (m,)."""
        positions = np.arange(len(self)) if self.is_whole else self.positions(0, len(self), 1, seed, shuffle)
        weights = self.plan.weights
        return self.plan.take(positions), np.ones(len(self), np.float32) if weights is None else weights[positions]

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
    def from_state(cls, state: dict[str, Any], size: int) -> Segment:
        """The segment that :meth:`state` described, of a data set of ``size`` samples."""
        ids, weights = state["ids"], state["weights"]
        plan = Plan(
            ids.cpu().numpy() if isinstance(ids, Tensor) else range(*ids),
            None if weights is None else weights.cpu().numpy(),
        )
        return cls(plan.check(size, "Sampler state"), state["number"], state["start"], state["stop"])


def next_stretches(
    length: int, last: Segment | None, epoch: int, make_plan: Callable[[int], Plan]
) -> tuple[Segment, ...]:
    """``length`` ids of consecutive plans, the first going on where ``last``, the epoch before's, was left."""
    segments: list[Segment] = []
    while length:
        if last is None or last.stop == len(last.plan):
            number = epoch if last is None else last.number + 1
            last = Segment(make_plan(number), number, 0, 0)
        count = min(length, len(last.plan) - last.stop)
        last = replace(last, start=last.stop, stop=last.stop + count)
        segments.append(last)
        length -= count
    return tuple(segments)


def arranged_ids(
    arrange: Arrange, owner: str, segments: tuple[Segment, ...], seed: int, epoch: int, ranks: int
) -> NDArray[np.int64]:
    """All ids of one epoch in the order that ``arrange`` gives them: int64 (k,).

    Raises:
        ValueError: the order is no permutation of 0 ... k - 1.
    """
    ids = np.concatenate([segment.shown(seed, True)[0] for segment in segments])
    order = np.asarray(arrange(ids, generator(seed, epoch, "arrange"), ranks))
    fits = order.shape == ids.shape and order.dtype.kind in "iu" and order.min() >= 0 and order.max() < len(ids)
    if not fits or (np.bincount(order, minlength=len(ids)) != 1).any():
        raise ValueError(
            f"{owner}(arrange=...): arrange must give a permutation of the positions 0 ... {len(ids) - 1}, int64 "
            f"({len(ids)},), but gave {order.dtype}{order.shape}."
        )
    return ids[order]


def write_weights(ledger: Ledger, segments: tuple[Segment, ...], seed: int, shuffle: bool) -> None:
    """Write one epoch's weights into the ledger.

    A sample that the epoch shows several times gets the mean of its weights, so that their sum, and with it the
    expected gradient, is unchanged.
    """
    parts = [segment.shown(seed, shuffle) for segment in segments]
    ids, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not (ids[1:] > ids[:-1]).all():  # most methods plan ascending ids, none of them twice
        times = np.bincount(ids, minlength=ledger.size)
        sums = np.bincount(ids, weights=weights, minlength=ledger.size)
        ids = np.flatnonzero(times)
        weights = (sums[ids] / times[ids]).astype(np.float32)
    ledger.set_weights(torch.from_numpy(ids), torch.from_numpy(weights))


@dataclass(frozen=True)
class Order:
    """One epoch as one rank sees it.

    Rank r of W takes the positions b + r, b + r + W, b + r + 2 W, ... of the epoch's ids, b being ``begin``.
    ``total - begin`` is a multiple of W: the epoch's first ids are repeated at its end to fill it up, or its last ones
    are left out (``drop_last``).

    Attributes:
        segments: stretches of plans, one after another.
        total: positions of all ranks together.
        arranged: int64 (k,), all ids of the epoch in an order that takes the shuffle's place.
        begin: the positions before it were trained on by another number of ranks.
    """

    segments: tuple[Segment, ...]
    total: int
    rank: int
    num_replicas: int
    seed: int
    shuffle: bool
    arranged: NDArray[np.int64] | None = None
    begin: int = 0

    @property
    def length(self) -> int:
        """Positions of this rank."""
        return (self.total - self.begin) // self.num_replicas

    def index_of(self, position: int) -> int:
        """How many of this rank's ids stand before a position of the epoch."""
        return (position - self.begin) // self.num_replicas

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """This rank's ids number ``start`` to ``stop``: int64 (stop - start,)."""
        if self.arranged is not None:
            positions = self.begin + self.rank + np.arange(start, stop) * self.num_replicas
            return self.arranged[positions % len(self.arranged)]
        parts = []
        position = self.begin + self.rank + start * self.num_replicas
        left = stop - start
        ends = list(accumulate(map(len, self.segments)))
        while left:
            offset = position % ends[-1]  # positions beyond the end are the filling
            number = bisect_right(ends, offset)
            segment = self.segments[number]
            count = min(left, -(-(ends[number] - offset) // self.num_replicas))
            first = offset - (ends[number] - len(segment))
            positions = segment.positions(first, count, self.num_replicas, self.seed, self.shuffle)
            parts.append(segment.plan.take(positions))
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
        on_exhausted: called when all ids were handed out and one more is asked for.
    """

    def __init__(self, order: Order, epoch: int, start: int, previous: Order | None, on_exhausted: Callable[[], None]):
        self._order, self._epoch, self._previous = order, epoch, previous
        self._on_exhausted = on_exhausted
        self._move_to(start)

    def _move_to(self, index: int) -> None:
        self._index = index
        self._chunk: Iterator[int] = iter(())

    def __next__(self) -> int:
        value = next(self._chunk, None)
        if value is None:
            if self._index >= self._order.length:
                self._on_exhausted()
                raise StopIteration
            stop = min(self._index + CHUNK, self._order.length)
            self._chunk = iter(self._order.ids(self._index, stop).tolist())
            value = next(self._chunk)
        self._index += 1
        return value

    def state_dict(self) -> dict[str, int]:
        """``epoch`` and ``position`` (ids handed out on all ranks together); JSON-able."""
        position = self._order.begin + self._index * self._order.num_replicas
        return {"version": VERSION, "epoch": self._epoch, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the saved position; the sampler must be at the saved epoch already, or at the start of the next."""
        if state.get("version") != VERSION:
            raise ValueError(f"Iterator state: version {state.get('version')} was saved, this release reads {VERSION}.")
        if self._previous is not None and state["epoch"] == self._epoch - 1:
            if state["position"] >= self._previous.total:
                return
            self._order, self._epoch = self._previous, state["epoch"]  # a loader that passes over the rest itself
        if state["epoch"] != self._epoch:
            raise ValueError(
                f"The loader's state is of epoch {state['epoch']}, the sampler is at epoch {self._epoch}: call "
                f"sampler.load_state_dict(...) with the state saved beside it before the loader is iterated."
            )
        if state["position"] < self._order.begin:
            raise ValueError(
                f"The loader's state is of position {state['position']}, which another number of ranks trained on: "
                f"resume with the sampler's state alone, which goes on at position {self._order.begin}."
            )
        self._move_to(min(self._order.index_of(state["position"]), self._order.length))
