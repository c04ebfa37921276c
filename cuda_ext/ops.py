"""The ops under the library: schema, vectorised reference and fake kernel of each, in one place to read.

A schema is defined once, under the namespace ``samplewise``; the reference is registered as
``CompositeExplicitAutograd``. A native kernel that registers itself for ``CPU`` or ``CUDA`` is preferred by the
dispatcher as soon as its library is loaded: no caller changes and nothing here asks whether it is there.

Every op writes into tensors that the caller owns and returns nothing, so that ``torch.compile`` keeps it opaque and in
place.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMESPACE = "samplewise"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# The record of one sample: 32 bytes, float32 (N, 8); COUNT and LAST_STEP are int32 in the same bytes.
LOSS_LAST, LOSS_EMA, LOSS_MEAN, LOSS_M2, COUNT, LAST_STEP, WEIGHT, SCORE = range(8)
RECORD_WIDTH = 8
LOSS_LIMIT = 1e18
"""A loss beyond this is refused like a non-finite one: its square overflows float32."""


# --- ledger_update ----------------------------------------------------------------------------------------------------

LIBRARY.define(
    "ledger_update(Tensor(a!) records, Tensor(b!) rejected, Tensor ids, Tensor losses, Tensor? scores, SymInt step, "
    "float ema) -> ()"
)


def ledger_update(
    records: Tensor, rejected: Tensor, ids: Tensor, losses: Tensor, scores: Tensor | None, step: int, ema: float
) -> None:
    """Apply a batch of losses to the records of its samples, entry by entry in batch order.

    For each entry, with l its loss and n the sample's new count: ``last = l``; ``ema += (1 - ema_decay) * (l - ema)``,
    started at the first loss; Welford's ``mean += (l - mean_old) / n`` and ``m2 += (l - mean_old) * (l - mean_new)``.
    A score replaces the old one where it is finite.

    Args:
        records: float32 (N, 8), changed in place.
        rejected: int64 (1,), increased by the number of losses that are not finite or beyond ``LOSS_LIMIT``.
        ids: int64 (B,), rows in [0, N).
        losses: float32 (B,).
        scores: float32 (B,) or None.
        step: written as ``last_step``, in training batches.
        ema: decay of the moving average, in [0, 1).

    Raises:
        IndexError: an id lies outside [0, N); nothing is written then.
    """
    torch.ops.samplewise.ledger_update(records, rejected, ids, losses, scores, step, ema)


def check_ids(ids: NDArray[np.int64], size: int) -> None:
    """Raise IndexError when an id (B,) lies outside [0, size)."""
    if ids.size and ids.view(np.uint64).max() >= size:  # a negative id is a huge unsigned one
        bad = ids[(ids < 0) | (ids >= size)][0]
        raise IndexError(
            f"ids: id {bad} is outside [0, {size}). Ids are rows of the data set that the ledger was made for; "
            f"build the sampler with len(train_set), and record no other data set's batches."
        )


@torch.library.impl(LIBRARY, "ledger_update", "CompositeExplicitAutograd")
def _ledger_update_reference(
    records: Tensor, rejected: Tensor, ids: Tensor, losses: Tensor, scores: Tensor | None, step: int, ema: float
) -> None:
    rows, values = ids.cpu().numpy(), losses.cpu().numpy()
    marks = None if scores is None else scores.cpu().numpy()
    check_ids(rows, records.shape[0])
    good = np.abs(values) <= LOSS_LIMIT  # False for NaN too
    if not good.all():
        rejected += int(values.size - np.count_nonzero(good))
        rows, values, marks = rows[good], values[good], None if marks is None else marks[good]
    if rows.size == 0:
        return
    in_order = np.sort(rows)
    if not (in_order[1:] == in_order[:-1]).any():
        gathered = _gather(records, rows)
        _apply(gathered, values, marks, step, ema)
        _scatter(records, rows, gathered)
        return
    unique, rounds = _duplicate_rounds(rows)
    gathered = _gather(records, unique)
    for where, entries in rounds:
        part = gathered[where]
        _apply(part, values[entries], None if marks is None else marks[entries], step, ema)
        gathered[where] = part
    _scatter(records, unique, gathered)


def _duplicate_rounds(
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.int64], list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Split a batch into rounds without duplicates: round r holds each id's r-th entry, in batch order."""
    unique, inverse = np.unique(rows, return_inverse=True)
    by_id = np.argsort(inverse, kind="stable")
    first_of_id = np.searchsorted(inverse[by_id], np.arange(unique.size))
    occurrence = np.empty(rows.size, dtype=np.int64)
    occurrence[by_id] = np.arange(rows.size) - first_of_id[inverse[by_id]]
    by_round = np.argsort(occurrence, kind="stable")
    cuts = np.cumsum(np.bincount(occurrence))[:-1]
    return unique, [(inverse[entries], entries) for entries in np.split(by_round, cuts)]


def _gather(records: Tensor, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    if records.device.type == "cpu":
        return records.numpy().take(rows, axis=0)
    return records[torch.from_numpy(rows).to(records.device)].cpu().numpy()


def _scatter(records: Tensor, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    if records.device.type == "cpu":
        records.numpy()[rows] = values
    else:
        records[torch.from_numpy(rows).to(records.device)] = torch.from_numpy(values).to(records.device)


def _apply(
    part: NDArray[np.float32],
    losses: NDArray[np.float32],
    scores: NDArray[np.float32] | None,
    step: int,
    ema: float,
) -> None:
    """Apply one loss to each of the records (m, 8), all of different samples."""
    integers = part.view(np.int32)
    count = integers[:, COUNT] + 1
    first = count == 1
    delta = losses - part[:, LOSS_MEAN]
    mean = part[:, LOSS_MEAN] + delta / count.astype(np.float32)
    part[:, LOSS_M2] = part[:, LOSS_M2] + delta * (losses - mean)
    part[:, LOSS_MEAN] = mean
    average = part[:, LOSS_EMA] + np.float32(1 - ema) * (losses - part[:, LOSS_EMA])
    part[:, LOSS_EMA] = np.where(first, losses, average)
    part[:, LOSS_LAST] = losses
    integers[:, COUNT] = count
    integers[:, LAST_STEP] = step
    if first.any():
        part[first, SCORE] = np.nan
    if scores is not None:
        part[:, SCORE] = np.where(np.isfinite(scores), scores, part[:, SCORE])


@torch.library.register_fake(f"{NAMESPACE}::ledger_update", lib=LIBRARY)
def _ledger_update_fake(
    records: Tensor, rejected: Tensor, ids: Tensor, losses: Tensor, scores: Tensor | None, step: int, ema: float
) -> None:
    return None


# --- permutation ------------------------------------------------------------------------------------------------------

LIBRARY.define("permutation(Tensor(a!) out, int n, int seed, int start, int stride) -> ()")

EXACT_PERMUTATION_LIMIT = 65_536
"""Up to here a permutation is sorted random keys (exactly uniform over the seeds); above, a Feistel network."""
_FEISTEL_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def permutation(n: int, seed: int, start: int, length: int, *, stride: int = 1, device: str = "cpu") -> Tensor:
    """Positions ``start, start + stride, ...`` of a keyed permutation of [0, n), without building the others.

    For n <= 65,536 the permutation sorts one 64-bit hash per element. Above, it is a generalised Feistel network on
    Z_a x Z_b with a = ceil(sqrt(n)), b = ceil(n / a) and cycle walking (values >= n are sent through again): O(1)
    memory, any chunk at once.

    Args:
        n: number of elements, in [1, 2^31].
        seed: key; a 63-bit integer (``samplewise.loaders.seeding.derive``).
        start: first position.
        length: number of positions; the last, ``start + (length - 1) * stride``, lies below n.
        stride: distance of positions, >= 1: the number of ranks when each takes its share.
        device: where the result lives.

    Returns:
        int64 (length,).

    Raises:
        ValueError: positions outside [0, n), or n outside [1, 2^31].
    """
    if not 1 <= n <= 1 << 31:
        raise ValueError(f"permutation(n={n}): n is the number of elements and must be in [1, 2^31].")
    last = start + (length - 1) * stride
    if start < 0 or length < 0 or stride < 1 or (length and last >= n):
        raise ValueError(
            f"permutation(n={n}, start={start}, length={length}, stride={stride}): positions must lie in [0, n)."
        )
    out = torch.empty(length, dtype=torch.int64, device=device)
    torch.ops.samplewise.permutation(out, n, seed, start, stride)
    return out


@torch.library.impl(LIBRARY, "permutation", "CompositeExplicitAutograd")
def _permutation_reference(out: Tensor, n: int, seed: int, start: int, stride: int) -> None:
    if n <= EXACT_PERMUTATION_LIMIT:
        values = _sorted_keys(n, seed)[start : start + max(0, (out.numel() - 1)) * stride + 1 : stride][: out.numel()]
        out.copy_(torch.from_numpy(values.copy()))
        return
    for begin in range(0, out.numel(), EXACT_PERMUTATION_LIMIT):  # pieces that stay in the cache
        piece = out[begin : begin + EXACT_PERMUTATION_LIMIT]
        positions = np.arange(piece.numel(), dtype=np.uint64) * np.uint64(stride) + np.uint64(start + begin * stride)
        piece.copy_(torch.from_numpy(_feistel(positions, n, seed).view(np.int64)))


@torch.library.register_fake(f"{NAMESPACE}::permutation", lib=LIBRARY)
def _permutation_fake(out: Tensor, n: int, seed: int, start: int, stride: int) -> None:
    return None


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: a bijection of uint64 whose output bits all depend on all input bits."""
    mixed: NDArray[np.uint64] = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hash64(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Keyed hash of uint64 values: ``mix64(mix64(seed) + (value + 1) * golden)``, the splitmix64 stream of the key."""
    key = mix64(np.array([seed & _MASK], dtype=np.uint64))
    return mix64(key + (values + np.uint64(1)) * np.uint64(_GOLDEN))


@lru_cache(maxsize=4)
def _sorted_keys(n: int, seed: int) -> NDArray[np.int64]:
    order: NDArray[np.int64] = np.argsort(hash64(np.arange(n, dtype=np.uint64), seed), kind="stable")
    return order


def _feistel(positions: NDArray[np.uint64], n: int, seed: int) -> NDArray[np.uint64]:
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    keys = hash64(np.arange(_FEISTEL_ROUNDS, dtype=np.uint64), seed)
    values: NDArray[np.uint64] = _feistel_once(positions, rows, columns, keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _feistel_once(values[outside], rows, columns, keys)
        outside = outside[values[outside] >= n]
    return values


def _feistel_once(values: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x, y = values // np.uint64(columns), values % np.uint64(columns)
    for r in range(0, _FEISTEL_ROUNDS, 2):
        x = _shift(x, y, rows, keys[r])
        y = _shift(y, x, columns, keys[r + 1])
    result: NDArray[np.uint64] = x * np.uint64(columns) + y
    return result


def _shift(left: NDArray[np.uint64], right: NDArray[np.uint64], modulus: int, key: np.uint64) -> NDArray[np.uint64]:
    """``(left + F(right)) mod modulus`` with F a keyed hash, scaled into [0, modulus) by its top 32 bits."""
    mixed = (right + key) * np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    moved: NDArray[np.uint64] = left + (((mixed >> np.uint64(32)) * np.uint64(modulus)) >> np.uint64(32))
    moved -= np.where(moved >= modulus, np.uint64(modulus), np.uint64(0))
    return moved
