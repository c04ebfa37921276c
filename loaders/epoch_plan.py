"""EpochPlan: what one epoch serves, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samplewise.loaders.options import Arrange
from samplewise.loaders.order import Order, Segment, arranged_ids
from samplewise.loaders.plan import Plan


@dataclass
class EpochPlan:
    """The stretches of plans that an epoch consists of, and how they are put in order.

    Positions count the epoch's ids over all ranks together. An epoch that was saved in the middle and goes on with
    another number of ranks is dealt out anew from the position where it was left, so that nothing is repeated or lost.

    Attributes:
        owner: the sampler's class, for errors.
        segments: stretches of plans, one after another.
        number: the epoch, which keys ``arrange``.
        begin: where the dealing out to ``world`` ranks begins.
        world: number of ranks that the epoch was dealt out to when it was saved; None: it is new.
        left_at: the position where it was left then.
        arranged_for: number of ranks that it was arranged for then.
    """

    owner: str
    segments: tuple[Segment, ...]
    number: int
    seed: int
    shuffle: bool
    drop_last: bool
    arrange: Arrange | None
    begin: int = 0
    world: int | None = None
    left_at: int = 0
    arranged_for: int | None = None
    _arranged: tuple[int, NDArray[np.int64]] | None = field(default=None, repr=False)  # for so many ranks

    @property
    def weighted(self) -> bool:
        """Whether any of it has weights."""
        return any(segment.plan.weights is not None for segment in self.segments)

    @property
    def plan(self) -> Plan:
        """All of it as one plan."""
        if len(self.segments) == 1 and self.segments[0].is_whole:
            return self.segments[0].plan
        parts = [segment.shown(self.seed, self.shuffle) for segment in self.segments]
        ids, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Plan(ids, weights if self.weighted else None)

    def begin_for(self, world: int) -> int:
        """Where the dealing out to so many ranks begins."""
        return self.begin if self.world in (None, world) else self.left_at

    def total(self, world: int) -> int:
        """Where the epoch ends: its ids from :meth:`begin_for` on are filled up to a multiple of the ranks.

        Raises:
            ValueError: with ``drop_last`` nothing is left for a rank.
        """
        length, begin = sum(map(len, self.segments)), self.begin_for(world)
        left = max(length - begin, 0)
        shares = left // world if self.drop_last else -(-left // world)
        if begin + shares == 0:
            raise ValueError(
                f"{self.owner}(drop_last=True): the plan of {length} samples leaves none for each of {world} ranks."
            )
        return begin + shares * world

    def order(self, world: int, rank: int | None) -> Order:
        """What one of so many ranks gets, or with rank None what all of them get together."""
        begin, total = self.begin_for(world), self.total(world)
        share = (0, 1) if rank is None else (rank, world)
        return Order(self.segments, total, *share, self.seed, self.shuffle, self._arranged_ids(world), begin)

    def _arranged_ids(self, world: int) -> NDArray[np.int64] | None:
        """Made when first asked for, since only then the number of ranks is sure; it is the same on all of them."""
        if self.arrange is None:
            return None
        ranks = self.arranged_for or world
        if self._arranged is None or self._arranged[0] != ranks:
            ids = arranged_ids(self.arrange, self.owner, self.segments, self.seed, self.number, ranks)
            self._arranged = ranks, ids
        return self._arranged[1]

    def state(self, world: int) -> dict[str, Any]:
        """What an exact resume needs of it, numbers and tensors."""
        return {
            "total": self.total(world),
            "begin": self.begin_for(world),
            "world": world,
            "ranks": self.arranged_for or world,
            "segments": [segment.state() for segment in self.segments],
        }
