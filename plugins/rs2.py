"""RS2: every round trains on a fresh random share of the data.

Okanovic et al., "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning", ICLR 2024. Round n of ratio
r trains on k = max(1, round(r N)) samples, weight 1, and the learning-rate schedule is compressed to the rounds' real
number of steps (`samplewise.callbacks.BudgetSchedule`). Modes:

- "without_replacement": round n takes positions n k ... (n+1) k - 1 of an endless row of keyed permutations, so that
  every id comes exactly once in each N draws (the public code leaves one out). A round across the border of two
  permutations may hold an id twice.
- "stratified": the same with each class spread evenly over the row: a round has each class's share, to within
  two samples where no class is a vanishing part (with a thousand classes of one sample each, a few more).
- "with_replacement": k independent draws.
- "hash": id i is kept when hash(seed, n, i) < r 2^64. Stateless: a stream on any rank agrees without a plan
  (`hash_keep`); the number of samples varies from round to round, r N on average.

All but "with_replacement" are functions of (seed, n): no state, exact resume at any round.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack, override

from samplewise.cuda_ext import ops
from samplewise.cuda_ext.checks import share
from samplewise.cuda_ext.hashing import hash64
from samplewise.loaders import Plan, PlannedSampler, SamplerOptions
from samplewise.loaders.seeding import derive, generator

IntArray = npt.NDArray[np.int64]
Mode = Literal["without_replacement", "with_replacement", "stratified", "hash"]
_PIECE = 1 << 16  # ids hashed at once: what stays in the cache


def hash_keep(ids: npt.ArrayLike, epoch: int, seed: int, ratio: float) -> npt.NDArray[np.bool_]:
    """Whether round `epoch` keeps each id: a pure function, equal on every rank and worker, for any ids at any time.

    Args:
        ids: integers of any shape.
        epoch: number of the round; each one is a new independent draw.
        seed: key.
        ratio: probability of being kept, in (0, 1].

    Returns:
        bool, of the shape of ids.

    Raises:
        ValueError: for a ratio outside (0, 1].
        TypeError: for ids that are no integers.
    """
    _check_ratio("hash_keep", ratio)
    rows = np.asarray(ids)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"hash_keep(ids=...): ids must be integers, not {rows.dtype}")
    if ratio == 1:
        return np.ones(rows.shape, dtype=np.bool_)
    key, bound = derive(seed, epoch, "rs2", "hash"), np.uint64(int(ratio * 2.0**64))
    flat = rows.astype(np.int64, copy=False).reshape(-1).view(np.uint64)
    keep = np.empty(flat.size, dtype=np.bool_)
    for start in range(0, flat.size, _PIECE):
        piece = slice(start, start + _PIECE)
        np.less(hash64(flat[piece], key), bound, out=keep[piece])
    return keep.reshape(rows.shape)


def row_block(size: int, start: int, length: int, seed: int) -> IntArray:
    """Positions start ... start + length - 1 of an endless row of keyed permutations of [0, size): int64 (length,)."""
    parts = []
    while length:
        cycle, position = divmod(start, size)
        count = min(length, size - position)
        parts.append(ops.permutation(size, derive(seed, cycle, "rs2"), position, count).numpy())
        start, length = start + count, length - count
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class Strata:
    """An endless row of ids in which each class is spread evenly and every id comes once in each N.

    The j-th of the N_c samples of class c stands at time (j + u_c) / N_c of its pass, u_c keyed by the seed; which
    sample is the j-th is a new keyed permutation in every pass.

    Args:
        labels: integers (N,), any values.
        seed: key.

    Attributes:
        slots: int32 (N,), the class (numbered from 0) of each position of a pass.
        members: int64 (N,), ids grouped by class.
    """

    def __init__(self, labels: npt.NDArray[np.integer], seed: int):
        classes, inverse, self._counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._firsts = np.cumsum(self._counts) - self._counts
        self.members: IntArray = np.argsort(inverse, kind="stable").astype(np.int64, copy=False)
        shifts = hash64(np.arange(classes.size, dtype=np.uint64), derive(seed, "rs2", "strata")) / 2.0**64
        of_member = inverse[self.members]
        time = np.arange(labels.size) - self._firsts[of_member] + shifts[of_member]
        time /= self._counts[of_member]
        self.slots = of_member[np.argsort(time, kind="stable")].astype(np.int32)
        self._seed = seed

    def block(self, start: int, length: int) -> IntArray:
        """Positions start ... start + length - 1 of the row, grouped by class: int64 (length,)."""
        size, parts = self.slots.size, []
        while length:
            cycle, position = divmod(start, size)
            count = min(length, size - position)
            before = np.bincount(self.slots[:position], minlength=self._counts.size)
            taken = np.bincount(self.slots[position : position + count], minlength=self._counts.size)
            for label in np.flatnonzero(taken):
                seed = derive(self._seed, cycle, "rs2", int(label))
                order = ops.permutation(int(self._counts[label]), seed, int(before[label]), int(taken[label])).numpy()
                parts.append(self.members[self._firsts[label] + order])
            start, length = start + count, length - count
        return np.concatenate(parts)


class RS2(PlannedSampler):
    """Repeated random sampling: a fresh share of the data every round.

    Args:
        size: N, the number of samples.
        ratio: share of the samples of a round, in (0, 1].
        mode: "without_replacement", "with_replacement", "stratified" or "hash", see the module. `sharded=True` goes
            with "with_replacement" and "hash".
        labels: class of each sample, integers (N,): for mode "stratified", and only there.
        **common: the options of every sampler, see :class:`samplewise.loaders.PlannedSampler`.

    Raises:
        ValueError: for a ratio outside (0, 1], an unknown mode, labels of another length, or labels that the mode
            lacks or does not use.
        TypeError: for labels that are no integers.
    """

    uses_losses = False

    def __init__(
        self,
        size: int,
        *,
        ratio: float = 0.1,
        mode: Mode = "without_replacement",
        labels: npt.ArrayLike | None = None,
        **common: Unpack[SamplerOptions],
    ):
        _check_ratio("RS2", ratio)
        if mode not in get_args(Mode):
            raise ValueError(f"RS2(mode={mode!r}): mode must be one of {', '.join(map(repr, get_args(Mode)))}")
        if labels is not None and mode != "stratified":
            raise ValueError(
                f"RS2(labels=..., mode={mode!r}): labels are for mode='stratified'; set it or leave them out"
            )
        self.plans_shares = mode in ("with_replacement", "hash")
        super().__init__(size, **common)
        self.ratio = ratio
        self.mode = mode
        self._strata = Strata(_check_labels(labels, self.size, mode), self.seed) if mode == "stratified" else None

    @override
    def grow(self, size: int) -> None:
        """As for every sampler, except that strata cannot grow, since the new samples' labels are not known."""
        if self._strata is not None:
            raise ValueError("RS2(mode='stratified').grow: the new samples have no labels; make a new sampler.")
        super().grow(size)

    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """Round `epoch`: k ids (on average, in mode "hash"), weight 1."""
        k = max(1, round(self.ratio * self.size))
        if self._strata is not None:
            return Plan(self._strata.block(epoch * k, k))
        if self.mode == "with_replacement":
            return Plan(self._drawn(k, epoch, rng))
        if self.mode == "hash":
            return Plan(self._hashed(epoch, rng))
        return Plan(row_block(self.size, epoch * k, k, self.seed))

    def _drawn(self, k: int, epoch: int, rng: np.random.Generator) -> IntArray:
        lengths, here = self.ledger.totals.each(len(self.ledger.ids)), self.ledger.shard[0]
        if len(lengths) > 1:  # how many of the draws fall on each rank's share: the same on all of them
            k = int(generator(self.seed, epoch, "rs2").multinomial(k, np.array(lengths) / self.size)[here])
        return self.ledger.ids_of(rng.integers(0, lengths[here], k))

    def _hashed(self, epoch: int, rng: np.random.Generator) -> IntArray:
        own = self.ledger.ids
        rows = np.arange(own.start, own.stop, own.step)
        ids = rows[hash_keep(rows, epoch, self.seed, self.ratio)]
        if self.ledger.totals.total(ids.size) == 0 and self.ledger.shard[0] == 0:
            return rows[rng.integers(0, rows.size, 1)]  # an epoch trains on something, however small N
        return ids


def _check_ratio(name: str, ratio: float) -> None:
    share(name, "ratio", ratio, ends="(]", what="the share of the samples of a round")


def _check_labels(labels: npt.ArrayLike | None, size: int, mode: str) -> npt.NDArray[np.integer]:
    if labels is None:
        raise ValueError(f"RS2(mode={mode!r}): it needs labels, the class of each sample, integers ({size},)")
    checked = np.asarray(labels)
    if checked.shape != (size,):
        raise ValueError(f"RS2(labels=...): labels must be one class a sample, ({size},), not {checked.shape}")
    if checked.dtype.kind not in "iu":
        raise TypeError(f"RS2(labels=...): labels must be integers, not {checked.dtype}; number the classes first")
    return checked
