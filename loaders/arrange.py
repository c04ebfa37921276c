"""DistinctBatches: an epoch's order in which no two samples of one batch share a key, for example a positive document.

Of k samples there are ceil(k / G) batches, G = batch size times ranks, all of them full but the last: nothing is left
out and the length is exact. The samples are grouped by key and dealt round over the batches, groups in random order, so
that a group which is no larger than the number of batches never meets itself; batches, and places in them, are
shuffled. Samples with several keys are grouped by their most frequent one, and where the others clash, samples are
exchanged with random ones of other batches, wherever that leaves no more clashes, until none is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from samplewise.cuda_ext.checks import integer
from samplewise.loaders.ragged import Ragged

IntArray = NDArray[np.int64]

_TRIES = 3  # exchanges tried at once for each sample that clashes,
_ATTEMPTS = 2048, 1 << 17  # within these limits in all
_PATIENCE = 4, 50, 4_000_000  # rounds in a row that bring nothing: the fewest, the most, and how many keys they look at


class DistinctBatches:
    """Arranges a sampler's epochs so that the samples of a batch have no key in common.

    In-batch negatives need it: where two queries of a batch share a positive, each would be pushed away from its own.
    It is a sampler's option, ``MySampler(len(data), arrange=DistinctBatches(positives, batch_size=64))``, with the
    batch size of the loader; with several ranks the batches of all of them, which are trained on at once, are one batch
    here. Each sample is as likely to stand in one full batch as in any other.

    Where there is no such order (a key with more samples than batches), the clashes are spread evenly and a warning
    says how many are left. Where the ranks fill up the last batch with the epoch's first ids, these are chosen so that
    they do not clash in it, as far as the first batch has such.

    Args:
        keys: N lists of integers (or one bare integer each), a sample's keys; a list may be empty.
        batch_size: samples that one rank's loader puts in a batch.

    Raises:
        TypeError: keys that are no integers.
        ValueError: a batch size below 1.
    """

    def __init__(self, keys: Ragged | Sequence[Any] | NDArray[Any], batch_size: int):
        rows = Ragged.from_lists(keys, "DistinctBatches(keys)")
        self.batch_size = integer("DistinctBatches", "batch_size", batch_size, 1, what="that of the loader")
        self.names, numbers = np.unique(rows.values, return_inverse=True)
        self.keys = _without_repeats(Ragged(numbers.astype(np.int64, copy=False), rows.offsets))
        digest = crc32(self.keys.offsets.tobytes(), crc32(self.keys.values.tobytes()))
        self.fingerprint = f"batch_size={self.batch_size}, keys {digest:08x}"  # a state of another order is refused

    def __repr__(self) -> str:
        return f"DistinctBatches({len(self.keys)} samples, batch_size={self.batch_size})"

    def __call__(self, ids: IntArray, rng: np.random.Generator, ranks: int) -> IntArray:
        """The order of one epoch.

        Args:
            ids: int64 (k,), rows of ``keys``, repeats allowed.
            rng: the generator.
            ranks: number of ranks.

        Returns:
            int64 (k,), a permutation of 0 ... k - 1: positions in ``ids``.
        """
        if ids.max() >= len(self.keys):
            raise ValueError(
                f"DistinctBatches(keys): it has keys of {len(self.keys)} samples, but sample {ids.max()} is planned: "
                f"give the keys of all samples of the data set."
            )
        keys = self.keys.take(ids)
        size = self.batch_size * ranks
        batches = -(-len(ids) // size)
        batch = _dealt(_groups(keys, len(self.names)), batches, size, rng)
        if len(keys.values) > len(ids):
            _exchange(batch, keys, len(self.names), batches, rng)
        shuffled = rng.permutation(len(ids))
        order: IntArray = shuffled[np.argsort(batch[shuffled], kind="stable")]
        filling = -len(ids) % ranks
        if filling and batches > 1:
            _choose_filling(order, keys, size, filling)
        self._warn(keys, batch, batches)
        return order

    def _warn(self, keys: Ragged, batch: IntArray, batches: int) -> None:
        clashes = len(_doubled(_codes(keys, batch, len(self.names))))
        if not clashes:
            return
        counts = np.bincount(keys.values)
        why = "no order without was found"
        if counts.max() > batches:
            why = f"key {self.names[counts.argmax()]} has {counts.max()} samples and there are {batches} batches"
        warnings.warn(
            f"DistinctBatches: {clashes} times among {len(keys)} samples, one shares a key with another of its batch: "
            f"{why}. Fewer clash in smaller batches; mask them in the loss (known_positives).",
            stacklevel=3,
        )


def _without_repeats(rows: Ragged) -> Ragged:
    """Each row ascending, every key once."""
    if len(rows.values) == 0 or rows.lengths.max() == 1:
        return rows
    codes = np.unique(rows.row_numbers() * (int(rows.values.max()) + 1) + rows.values)
    numbers, values = np.divmod(codes, int(rows.values.max()) + 1)
    return Ragged(values, np.concatenate(([0], np.cumsum(np.bincount(numbers, minlength=len(rows))))).astype(np.int64))


def _groups(keys: Ragged, names: int) -> IntArray:
    """Each sample's most frequent key, or a group of its own where it has none: int64 (k,)."""
    groups = np.arange(names, names + len(keys), dtype=np.int64)
    counts = np.bincount(keys.values, minlength=names)
    some = keys.lengths > 0
    if some.any():
        ranked = counts[keys.values] * names + keys.values
        groups[some] = np.maximum.reduceat(ranked, keys.offsets[:-1][some]) % names
    return groups


def _dealt(groups: IntArray, batches: int, size: int, rng: np.random.Generator) -> IntArray:
    """The batch of each sample: int64 (k,), all of them full but the last.

    The places are a table of ``size`` rows and one column a batch, filled row by row, in which the last column has gaps
    where the last batch is short. Samples of a group stand one after another: up to ``batches - 1`` of them meet in no
    column; ``batches`` of them do not where the rows have no gap, so such groups come first, and gaps in the end.
    """
    last = len(groups) - (batches - 1) * size  # places in the last batch
    counts = np.bincount(groups)
    turn = rng.permutation(len(counts))
    large = counts >= batches
    turn[large] -= len(counts)
    shuffled = rng.permutation(len(groups))
    in_turn = shuffled[np.argsort(turn[groups[shuffled]], kind="stable")]
    first = min(last, -(-int(counts[large].sum()) // batches))  # rows without a gap, for the large groups
    widths = np.full(size, batches - 1)
    widths[:first] += 1
    widths[first + rng.permutation(size - first)[: last - first]] += 1
    columns = np.arange(len(groups)) - np.repeat(np.cumsum(widths) - widths, widths)
    full = batches if last == size else batches - 1
    numbers = np.concatenate([rng.permutation(full), np.arange(full, batches)])
    dealt = np.empty(len(groups), dtype=np.int64)
    dealt[in_turn] = numbers[columns]
    return dealt


def _codes(keys: Ragged, batch: IntArray, names: int) -> IntArray:
    """(batch, key) as one number for each key of each sample: int64 (M,)."""
    codes: IntArray = batch[keys.row_numbers()] * names + keys.values
    return codes


def _doubled(codes: IntArray) -> IntArray:
    """What is there more than once, n - 1 times each, ascending."""
    codes = np.sort(codes)
    again: IntArray = codes[1:][codes[1:] == codes[:-1]]
    return again


def _exchange(batch: IntArray, keys: Ragged, names: int, batches: int, rng: np.random.Generator) -> None:
    """Exchange samples between batches, in place, until no key is twice in one or no round of exchanges helps."""
    unavoidable = int(np.maximum(np.bincount(keys.values) - batches, 0).sum())
    patience = min(max(_PATIENCE[0], _PATIENCE[2] // len(keys.values)), _PATIENCE[1])
    samples, fewest, vain = keys.row_numbers(), len(keys.values), 0
    while vain < patience:
        codes = _codes(keys, batch, names)
        ascending = np.argsort(codes)
        present = codes[ascending]
        again = np.flatnonzero(present[1:] == present[:-1])
        if len(again) <= unavoidable:
            return
        vain += 1
        if len(again) <= 0.99 * fewest:
            fewest, vain = len(again), 0
        clashing = np.unique(samples[ascending[np.concatenate([again, again + 1])]])
        movers = np.repeat(clashing, max(_TRIES, -(-_ATTEMPTS[0] // len(clashing))))
        movers = rng.permutation(movers)[: _ATTEMPTS[1]]
        partners = rng.integers(0, len(batch), len(movers))
        useful = _useful(movers, partners, batch, keys, names, present, most=0 if vain else -1)
        movers, partners = movers[useful], partners[useful]
        batch[movers], batch[partners] = batch[partners], batch[movers]


def _useful(
    movers: IntArray, partners: IntArray, batch: IntArray, keys: Ragged, names: int, present: IntArray, most: int
) -> IntArray:
    """Which exchanges, all made at once, add ``most`` (0, -1) clashes or fewer: positions in ``movers``.

    Each is judged by how often its keys are in the two batches. So no two may touch the same sample, or the same key in
    the same batch; of those that do, the first is made.
    """
    here, there = batch[movers], batch[partners]
    moved = _moved(movers, here, there, keys, names)
    moved_back = _moved(partners, there, here, keys, names)
    pair, source, target = (np.concatenate(parts) for parts in zip(moved, moved_back, strict=True))
    key_of_pair = pair * names + source % names
    kept = ~np.isin(key_of_pair, _doubled(key_of_pair))  # a key that both have stays where it is
    pair, source, target = pair[kept], source[kept], target[kept]
    change = (_times(present, target) > 0).astype(np.int64) - (_times(present, source) > 1)
    good = (np.bincount(pair, weights=change, minlength=len(movers)) <= most) & (here != there)
    made = good[pair]
    pair, exchanges = pair[made], np.flatnonzero(good)
    touched = np.concatenate([source[made], target[made], -1 - movers[good], -1 - partners[good]])
    return _apart(np.concatenate([pair, pair, exchanges, exchanges]), touched)


def _moved(samples: IntArray, here: IntArray, there: IntArray, keys: Ragged, names: int) -> tuple[IntArray, ...]:
    """Position in ``samples``, and code before and after the move, of each key of samples that change their batch."""
    rows = keys.take(samples)
    number = rows.row_numbers()
    return number, here[number] * names + rows.values, there[number] * names + rows.values


def _apart(owners: IntArray, touched: IntArray) -> IntArray:
    """The owners that touch nothing that one with a lower number touches, ascending."""
    by_owner = np.argsort(owners, kind="stable")
    owners = owners[by_owner]
    _, first, inverse = np.unique(touched[by_owner], return_index=True, return_inverse=True)
    late = owners[first][inverse] != owners
    return np.setdiff1d(owners, owners[late])


def _times(present: IntArray, codes: IntArray) -> IntArray:
    """How often each code is in ``present``, which ascends."""
    times: IntArray = np.searchsorted(present, codes, "right") - np.searchsorted(present, codes, "left")
    return times


def _choose_filling(order: IntArray, keys: Ragged, size: int, filling: int) -> None:
    """Put samples of the first batch that clash with none of the last at its beginning, in place."""
    first, last = order[:size].copy(), order[-(len(order) % size) :]
    rows = keys.take(first)
    clashing = np.isin(rows.values, keys.take(last).values)
    clean = np.bincount(rows.row_numbers()[clashing], minlength=size) == 0
    chosen = np.flatnonzero(clean)[:filling]
    order[:size] = np.concatenate([first[chosen], np.delete(first, chosen)])
