"""The reference of each op of :mod:`samplewise.cuda_ext.ops`, for whole arrays: it runs where no kernel is built.

The kernels give the same bits, operation for operation; those of ``csrc/core.h`` carry the same names. Tensors on a GPU
are copied to the CPU and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext.elementary import log_positive
from samplewise.cuda_ext.hashing import hash64

# The record of one sample: 32 bytes, float32 (N, 8); COUNT and LAST_STEP are int32 in the same bytes.
LOSS_LAST, LOSS_EMA, LOSS_MEAN, LOSS_M2, COUNT, LAST_STEP, WEIGHT, SCORE = range(8)
REJECTED, OUT_OF_RANGE, UPDATES = range(3)  # the ledger's counters
LOSS_LIMIT = 1e18
EXACT_PERMUTATION_LIMIT = 65_536
_PIECE = 1 << 16  # elements worked on at a time: what stays in the cache
_FEISTEL_ROUNDS = 8

Int64Array = NDArray[np.int64]
Uint64Array = NDArray[np.uint64]
Float32Array = NDArray[np.float32]


# --- ledger_update ----------------------------------------------------------------------------------------------------


def check_ids(ids: Int64Array, size: int) -> None:
    """Raise IndexError when an id (B,) lies outside [0, size)."""
    outside = (ids < 0) | (ids >= size)
    if outside.any():
        raise IndexError(
            f"ids: id {ids[outside][0]} is outside [0, {size}). Ids are rows of the data set that the ledger was made "
            f"for; build the sampler with len(train_set), and record no other data set's batches."
        )


def ledger_update(
    records: Tensor,
    counters: Tensor,
    links: Tensor,
    ids: Tensor,
    losses: Tensor,
    scores: Tensor | None,
    steps: Tensor | None,
    ema: float,
) -> None:
    """See :func:`samplewise.cuda_ext.ops.ledger_update`."""
    rows, values = ids.cpu().numpy(), losses.cpu().numpy()
    marks = None if scores is None else scores.cpu().numpy()
    when = np.full(rows.size, int(counters[UPDATES])) if steps is None else steps.cpu().numpy()
    check_ids(rows, records.shape[0])
    if steps is None:
        counters[UPDATES] += 1
    good = np.abs(values) <= LOSS_LIMIT  # False for NaN too
    if not good.all():
        counters[REJECTED] += int(values.size - np.count_nonzero(good))
        rows, values, marks, when = rows[good], values[good], None if marks is None else marks[good], when[good]
    if rows.size == 0:
        return
    in_order = np.sort(rows)
    if not (in_order[1:] == in_order[:-1]).any():
        gathered = _gather(records, rows)
        _add_losses(gathered, values, marks, when, ema)
        _scatter(records, rows, gathered)
        return
    unique, rounds = _duplicate_rounds(rows)
    gathered = _gather(records, unique)
    for where, entries in rounds:
        part = gathered[where]
        _add_losses(part, values[entries], None if marks is None else marks[entries], when[entries], ema)
        gathered[where] = part
    _scatter(records, unique, gathered)


def _duplicate_rounds(rows: Int64Array) -> tuple[Int64Array, list[tuple[Int64Array, Int64Array]]]:
    """Split a batch into rounds without duplicates: round r holds each id's r-th entry, in batch order."""
    unique, inverse = np.unique(rows, return_inverse=True)
    by_id = np.argsort(inverse, kind="stable")
    first_of_id = np.searchsorted(inverse[by_id], np.arange(unique.size))
    occurrence = np.empty(rows.size, dtype=np.int64)
    occurrence[by_id] = np.arange(rows.size) - first_of_id[inverse[by_id]]
    by_round = np.argsort(occurrence, kind="stable")
    cuts = np.cumsum(np.bincount(occurrence))[:-1]
    return unique, [(inverse[entries], entries) for entries in np.split(by_round, cuts)]


def _gather(records: Tensor, rows: Int64Array) -> Float32Array:
    if records.device.type == "cpu":
        return records.numpy().take(rows, axis=0)
    return records[torch.from_numpy(rows).to(records.device)].cpu().numpy()


def _scatter(records: Tensor, rows: Int64Array, values: Float32Array) -> None:
    if records.device.type == "cpu":
        records.numpy()[rows] = values
    else:
        records[torch.from_numpy(rows).to(records.device)] = torch.from_numpy(values).to(records.device)


def _add_losses(
    part: Float32Array, losses: Float32Array, scores: Float32Array | None, steps: Int64Array, ema: float
) -> None:
    """Add one loss to each of the records (m, 8), all of different samples."""
    integers = part.view(np.int32)
    count = integers[:, COUNT] + 1
    first = count == 1
    with np.errstate(all="ignore"):
        delta = losses - part[:, LOSS_MEAN]
        mean = part[:, LOSS_MEAN] + delta / count.astype(np.float32)
        part[:, LOSS_M2] = part[:, LOSS_M2] + delta * (losses - mean)
        average = part[:, LOSS_EMA] + np.float32(1 - ema) * (losses - part[:, LOSS_EMA])
    part[:, LOSS_MEAN] = mean
    part[:, LOSS_EMA] = np.where(first, losses, average)
    part[:, LOSS_LAST] = losses
    integers[:, COUNT] = count
    integers[:, LAST_STEP] = steps
    if first.any():
        part[first, SCORE] = np.nan
    if scores is not None:
        part[:, SCORE] = np.where(np.isfinite(scores), scores, part[:, SCORE])


# --- permutation ------------------------------------------------------------------------------------------------------


def permutation(out: Tensor, n: int, seed: int, start: int, stride: int) -> None:
    """See :func:`samplewise.cuda_ext.ops.permutation`."""
    if n <= EXACT_PERMUTATION_LIMIT:
        elements = np.arange(n, dtype=np.uint64)
        keys = np.sort((hash64(elements, seed) & ~np.uint64(0xFFFF)) | elements) & np.uint64(0xFFFF)
        out.copy_(torch.from_numpy(keys[start::stride][: out.numel()].astype(np.int64)))
        return
    for begin in range(0, out.numel(), _PIECE):
        piece = out[begin : begin + _PIECE]
        positions = np.arange(piece.numel(), dtype=np.uint64) * np.uint64(stride) + np.uint64(start + begin * stride)
        piece.copy_(torch.from_numpy(_permuted(positions.astype(np.uint32), n, seed).astype(np.int64)))


def _permuted(positions: NDArray[np.uint32], n: int, seed: int) -> NDArray[np.uint32]:
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = hash64(np.arange(_FEISTEL_ROUNDS, dtype=np.uint64), seed)
    values = _pass_through(positions, rows, columns, keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _pass_through(values[outside], rows, columns, keys)
        outside = outside[values[outside] >= n]
    return values


def _pass_through(values: NDArray[np.uint32], rows: int, columns: int, keys: Uint64Array) -> NDArray[np.uint32]:
    x, y = values // np.uint32(columns), values % np.uint32(columns)
    for r in range(0, _FEISTEL_ROUNDS, 2):
        x = _shift(x, y, rows, int(keys[r]))
        y = _shift(y, x, columns, int(keys[r + 1]))
    result: NDArray[np.uint32] = x * np.uint32(columns) + y
    return result


def _shift(left: NDArray[np.uint32], right: NDArray[np.uint32], modulus: int, key: int) -> NDArray[np.uint32]:
    """``(left + F(right)) mod modulus`` with F a keyed hash, scaled into [0, modulus)."""
    mixed = (right ^ np.uint32(key & 0xFFFFFFFF)) * np.uint32(0x9E3779B1)
    mixed = ((mixed ^ (mixed >> np.uint32(15))) ^ np.uint32(key >> 32)) * np.uint32(0x85EBCA77)
    moved: NDArray[np.uint32] = left + ((mixed.astype(np.uint64) * np.uint64(modulus)) >> np.uint64(32)).astype(
        np.uint32
    )
    moved -= np.where(moved >= modulus, np.uint32(modulus), np.uint32(0))
    return moved


# --- draw -------------------------------------------------------------------------------------------------------------


def draw(out: Tensor, tau: Tensor, weights: Tensor, seed: int) -> None:
    """See :func:`samplewise.cuda_ext.ops.draw`."""
    k = out.numel()
    keys = np.empty(weights.numel(), dtype=np.uint32)
    for piece, values in _pieces(weights.cpu().numpy()):
        keys[piece] = _draw_keys(np.arange(piece.start, piece.start + values.size, dtype=np.uint64), values, seed)
    bound = np.partition(keys, k)[k]
    ids = np.flatnonzero(keys < bound)
    if ids.size < k:
        ids = np.sort(np.append(ids, np.flatnonzero(keys == bound)[: k - ids.size]))
    out.copy_(torch.from_numpy(ids))
    tau.fill_(float(bound.view(np.float32)))


def _draw_keys(ids: Uint64Array, weights: Float32Array, seed: int) -> NDArray[np.uint32]:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        ratios = exponential(hash64(ids, seed)) / weights
    return np.where(weights > 0, ratios.view(np.uint32), np.uint32(0x7F800000))


def exponential(hashes: Uint64Array) -> Float32Array:
    """Standard exponential variates from 63 bits each: relative precision 2^-24 at both ends, never 0."""
    high = ((hashes >> np.uint64(32)) & np.uint64(0x7FFFFFFF)).astype(np.int32).astype(np.float32)
    low = ((hashes & np.uint64(0xFFFFFFFF)) >> np.uint64(1)).astype(np.int32).astype(np.float32)
    v = (high + (low + np.float32(0.5)) * np.float32(2.0**-31)) * np.float32(2.0**-32)  # uniform in (0, 1/2]
    upper = (hashes >> np.uint64(63)).astype(np.bool_)  # the variate is -log(v), or else -log(1 - v)
    x = np.where(upper, v, np.float32(1) - v)
    lost = np.where(upper, np.float32(0), (np.float32(1) - x) - v)  # what rounding took from 1 - v
    variates: Float32Array = -(log_positive(torch.from_numpy(x)).numpy() + lost / x)
    return variates


def _pieces(values: Float32Array, length: int = _PIECE) -> Iterator[tuple[slice, Float32Array]]:
    for start in range(0, values.size, length):
        yield slice(start, start + length), values[start : start + length]


# --- histogram --------------------------------------------------------------------------------------------------------


def histogram(bins: Tensor, values: Tensor, low: int, shift: int) -> None:
    """See :func:`samplewise.cuda_ext.ops.histogram`."""
    size = bins.shape[0]
    counts, offsets = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for _, piece in _pieces(values.cpu().numpy(), 1 << 20):
        offset = order_keys(piece[np.isfinite(piece)]).astype(np.int64) - low
        index = offset >> shift
        inside = (index >= 0) & (index < size)
        index, offset = index[inside], offset[inside] & ((1 << shift) - 1)
        counts += np.bincount(index, minlength=size)
        offsets += np.bincount(index, weights=offset, minlength=size).astype(np.int64)  # exact: sums below 2^53
    bins.copy_(torch.from_numpy(np.stack([counts, offsets], axis=1)))


def order_keys(values: Float32Array) -> NDArray[np.uint32]:
    """Integers in the order of the floats; -0 counts as 0."""
    bits = (values + np.float32(0)).view(np.uint32)
    keys: NDArray[np.uint32] = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(0x80000000))
    return keys


def values_of(keys: Int64Array) -> Float32Array:
    """The floats whose :func:`order_keys` these are, given as int64."""
    bits = keys.astype(np.uint32)
    return np.where(bits >> np.uint32(31), bits & np.uint32(0x7FFFFFFF), ~bits).view(np.float32)
