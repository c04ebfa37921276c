"""SeTa: a random share of the data, then a window over groups of equal difficulty that slides from easy to hard.

Zhou et al., "Scale Efficient Training for Large Datasets", CVPR 2025. With N samples, prune ratio r, k groups, window
alpha, E epochs and anneal_from delta, plan n = 0, 1, 2, ...:

    1. a uniform subset of int((1 - r) N) samples;
    2. its latest losses clustered in one dimension into k groups, easy to hard;
    3. n = 0: all groups; else groups s ... s + w - 1 with w = round(k alpha) and s = n mod (k - w + 1);
    4. weights 1.
    From epoch delta E on: a fresh uniform subset of int((1 - r) N), no window.

What differs from the public code, or is left open there: clustering is exact and in numpy (`clustering`) in place of
KMeans and Python loops; unseen samples of the subset are always kept; with fewer distinct losses than groups, k is the
number of distinct losses, so that no window is empty; with one, the groups are k consecutive chunks of the subset.
`rounding="paper"` takes w = ceil(k alpha). With `sharded=True` and one distinct loss, the consecutive chunks are those
of each rank's share. Samples that no window reaches keep old losses: `revisit_every` plans them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from samplewise.cuda_ext.checks import integer, share
from samplewise.cuda_ext.hashing import hash64
from samplewise.cuda_ext.totals import Totals
from samplewise.loaders import Plan, PlannedSampler, SamplerOptions
from samplewise.loaders.seeding import derive, generator
from samplewise.plugins import clustering, weights

IntArray = npt.NDArray[np.int64]
Rounding = Literal["code", "paper"]
_PIECE = 1 << 16  # ids hashed at once: what stays in the cache


def window_start_and_width(n: int, groups: int, window: float, rounding: Rounding = "code") -> tuple[int, int]:
    """First group and number of groups of plan n's window, n >= 1.

    Args:
        n: number of the plan.
        groups: k.
        window: alpha, in (0, 1].
        rounding: "code" is Python's round (halves to even: 4.5 -> 4), "paper" is ceil; the width is 1 at least.

    >>> [window_start_and_width(n, 5, 0.5) for n in range(1, 6)]
    [(1, 2), (2, 2), (3, 2), (0, 2), (1, 2)]
    """
    exact = round(groups * window, 9)  # 100 * 0.07 is 7.000000000000001, whose ceil is not 7
    width = min(max(1, ceil(exact) if rounding == "paper" else round(exact)), groups)
    return n % (groups - width + 1), width


def subset_size(size: int, prune: float) -> int:
    """int((1 - prune) * size), at least 1."""
    return max(1, int(round((1 - prune) * size, 9)))  # in binary (1 - 0.8) * 10 is 1.9999999999999996


def seta_select(
    losses: npt.NDArray[np.float32],
    n: int,
    rng: np.random.Generator,
    *,
    prune: float = 0.1,
    groups: int = 10,
    window: float = 0.9,
    rounding: Rounding = "code",
    k: int | None = None,
    totals: Totals | None = None,
) -> IntArray:
    """Select the samples of plan n: subset, clustering, window.

    Args:
        losses: float32 (N,), NaN where unseen.
        n: number of the plan; 0 selects the whole subset.
        rng: the generator.
        prune: r, share dropped before clustering.
        groups: k.
        window: alpha, share of the groups in the window.
        rounding: see `window_start_and_width`.
        k: samples of the subset; None: `subset_size(N, prune)`.
        totals: finds the groups, where the losses are one rank's share of all (`ShardedLedger.totals`) and k of the
            subset fall into it; the result are places in the share then, and may be none.

    Returns:
        int64 (m,), ascending, m >= 1.
    """
    totals = totals or Totals()
    ids = weights.subset(len(losses), subset_size(len(losses), prune) if k is None else k, rng)
    if n == 0:
        return ids
    values = np.asarray(losses, dtype=np.float32)[ids]
    unseen = np.isnan(values)
    any_unseen = bool(unseen.any())
    seen_values = values[~unseen] if any_unseen else values
    if totals.total(seen_values.size) == 0:
        return ids
    cuts = clustering.kmeans_thresholds(seen_values, groups, totals=totals)
    if cuts.size == 0:
        return ids[unseen | _chunk_window(unseen, n, groups, window, rounding)]
    start, width = window_start_and_width(n, cuts.size + 1, window, rounding)
    outside = np.zeros(values.size, dtype=np.bool_)  # comparisons with NaN are False: unseen samples stay inside
    if start > 0:
        outside |= values < cuts[start - 1]
    if start + width <= cuts.size:
        outside |= values >= cuts[start + width - 1]
    return ids[~outside]


def _chunk_window(
    unseen: npt.NDArray[np.bool_], n: int, groups: int, window: float, rounding: Rounding
) -> npt.NDArray[np.bool_]:
    """The window over consecutive chunks of the seen samples: bool (M,); one chunk a sample if they are fewer."""
    place = np.cumsum(~unseen) - 1
    count = unseen.size - int(np.count_nonzero(unseen))
    chunks = max(1, min(groups, count))
    start, width = window_start_and_width(n, chunks, window, rounding)
    first, stop = start * count // chunks, (start + width) * count // chunks
    return ~unseen & (place >= first) & (place < stop)


def has_turn(ids: range, n: int, every: int, seed: int) -> npt.NDArray[np.bool_]:
    """Whose turn it is in plan n, bool (len(ids),): a keyed share, each id in exactly one of `every` plans in a row."""
    key, turn = derive(seed, "seta", "turn"), np.uint64(n % every)
    mine = np.empty(len(ids), dtype=np.bool_)
    for start in range(0, len(ids), _PIECE):
        some = ids[start : start + _PIECE]
        piece = np.arange(some.start, some.stop, some.step, dtype=np.uint64)
        mine[start : start + _PIECE] = hash64(piece, key) % np.uint64(every) == turn
    return mine


def subset_shares(sizes: Sequence[int], k: int, rng: np.random.Generator) -> list[int]:
    """How many of a uniform subset of k samples fall into each part of the data: multivariate hypergeometric.

    Args:
        sizes: samples of each part, 2e9 in all at most.
        k: of the subset, in [0, sum(sizes)].
        rng: the generator, the same one for all parts.
    """
    if len(sizes) == 1:
        return [k]
    half = len(sizes) // 2  # numpy's own draw ends at 1e9 samples in all, halves do at 1e9 each
    first = int(rng.hypergeometric(sum(sizes[:half]), sum(sizes[half:]), k))
    return subset_shares(sizes[:half], first, rng) + subset_shares(sizes[half:], k - first, rng)


class SeTa(PlannedSampler):
    """Curriculum pruning: random subset, clusters of loss, sliding window.

    Args:
        size: N, the number of samples.
        epochs: E, the epochs of the whole training, >= 1.
        prune: r, share of the samples dropped before clustering, in [0, 1).
        groups: k, number of groups of difficulty, >= 1.
        window: alpha, share of the groups trained on, in (0, 1].
        anneal_from: delta, share of the epochs after which the window is given up, in [0, 1].
        rounding: of the window's width, "code" (round) or "paper" (ceil).
        revisit_every: m, so that no sample goes more than m plans without being planned: each plan adds the keyed 1/m
            of the ids whose turn it is. None never forces one back.
        **common: the options of every sampler, see :class:`samplewise.loaders.PlannedSampler`.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: for one outside its range.
    """

    plans_shares = True

    def __init__(
        self,
        size: int,
        *,
        epochs: int,
        prune: float = 0.1,
        groups: int = 10,
        window: float = 0.9,
        anneal_from: float = 0.875,
        rounding: Rounding = "code",
        revisit_every: int | None = None,
        **common: Unpack[SamplerOptions],
    ):
        owner = type(self).__name__
        epochs = integer(owner, "epochs", epochs, 1, what="the length of the whole training")
        prune = share(owner, "prune", prune, ends="[)", what="the share of samples dropped before clustering")
        groups = integer(owner, "groups", groups, 1, clustering.BINS)
        window = share(owner, "window", window, ends="(]", what="the share of the groups trained on")
        anneal_from = share(owner, "anneal_from", anneal_from, what="the share of the epochs before annealing")
        if rounding not in get_args(Rounding):
            raise ValueError(f"{owner}(rounding={rounding!r}): rounding must be 'code' (round) or 'paper' (ceil).")
        if revisit_every is not None:
            revisit_every = integer(owner, "revisit_every", revisit_every, 1, what="a number of plans")
        super().__init__(size, **common)
        self.epochs = epochs
        self.prune = prune
        self.groups = groups
        self.window = window
        self.anneal_from = anneal_from
        self.rounding: Rounding = rounding
        self.revisit_every = revisit_every

    def plan(self, epoch: int, rng: np.random.Generator) -> Plan:
        """Plan number `epoch`: window over the groups, or the uniform subset from delta E on."""
        ledger = self.ledger
        totals = ledger.totals
        lengths = totals.each(len(ledger.ids))
        shares = subset_shares(lengths, subset_size(self.size, self.prune), generator(self.seed, epoch, "seta"))
        k = shares[ledger.shard[0]]
        if self.epoch >= round(self.anneal_from * self.epochs, 9):
            rows = weights.subset(len(ledger.ids), k, rng)
        else:
            rows = seta_select(
                ledger.column("loss_last").cpu().numpy(),
                epoch,
                rng,
                groups=self.groups,
                window=self.window,
                rounding=self.rounding,
                k=k,
                totals=totals,
            )
        if self.revisit_every is not None:
            planned = has_turn(ledger.ids, epoch, self.revisit_every, self.seed)
            planned[rows] = True
            rows = np.flatnonzero(planned)
        return Plan(ledger.ids_of(rows))
