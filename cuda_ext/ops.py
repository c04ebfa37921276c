"""The ops under the library: what each computes, its schema and its fake kernel.

A schema is defined once, under the namespace ``samplewise``; the reference (:mod:`samplewise.cuda_ext.reference`) is
registered as ``CompositeExplicitAutograd``. A native kernel that registers itself for ``CPU`` or ``CUDA``
(``csrc/``, loaded by :mod:`samplewise.cuda_ext.native`) is preferred by the dispatcher: no caller changes and nothing
here asks whether it is there. The same arguments give the same bits from all of them, for any number of threads.

Every op here writes into tensors that the caller owns and returns nothing, so that ``torch.compile`` keeps it opaque
and in place. ``sample_losses``, which is differentiable, stands in :mod:`samplewise.cuda_ext.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samplewise.cuda_ext import reference
from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.histogram import Histogram, key_of

NAMESPACE = "samplewise"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
MAX_SIZE = 1 << 31
_FEW = 1 << 18  # up to here sorting is faster than histograms


def _define(schema: str) -> None:
    """Define an op and register its reference, which has its name; it returns nothing, and so does its fake kernel."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _nothing, lib=LIBRARY)


def _nothing(*arguments: Any) -> None:
    return None


_define(
    "ledger_update(Tensor(a!) records, Tensor(b!) counters, Tensor(c!) links, Tensor ids, Tensor losses, "
    "Tensor? scores, Tensor? steps, float ema) -> ()"
)
_define("permutation(Tensor(a!) out, int n, int seed, int start, int stride) -> ()")
_define("draw(Tensor(a!) out, Tensor(b!) tau, Tensor weights, int seed) -> ()")
_define("histogram(Tensor(a!) bins, Tensor values, int low, int shift) -> ()")


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
    """Apply a batch of losses to the records of its samples, entry by entry in batch order.

    For each entry, with l its loss and n the sample's new count: ``last = l``; ``ema += (1 - ema_decay) * (l - ema)``,
    started at the first loss; Welford's ``mean += (l - mean_old) / n`` and ``m2 += (l - mean_old) * (l - mean_new)``.
    A score replaces the old one where it is finite. ``last_step`` is the entry's step, or, without ``steps``, the
    number of updates before this one, which is counted on the records' device: right in a captured CUDA graph too.

    Args:
        records: float32 (N, 8), changed in place.
        counters: int64 (3,), increased: losses rejected because they are not finite or beyond 1e18; ids outside [0, N)
            that were passed over (on a GPU only); updates without ``steps``.
        links: int32 (N,) zeros, scratch memory of the CUDA kernel, zeros again afterwards; (0,) where the records are
            on the CPU.
        ids: int64 (B,), rows in [0, N).
        losses: float32 (B,).
        scores: float32 (B,) or None.
        steps: int64 (B,), written as ``last_step``, or None.
        ema: decay of the moving average, in [0, 1).

    Raises:
        IndexError: an id lies outside [0, N) and the records are on the CPU; nothing is written then.
    """
    try:
        torch.ops.samplewise.ledger_update(records, counters, links, ids, losses, scores, steps, ema)
    except RuntimeError:
        if records.device.type == "cpu":
            reference.check_ids(ids.numpy(), records.shape[0])
        raise


def permutation(n: int, seed: int, start: int, length: int, *, stride: int = 1, device: str = "cpu") -> Tensor:
    """Positions ``start, start + stride, ...`` of a keyed permutation of [0, n), without building the others.

    For n <= 65,536 the permutation sorts one hash per element. Above, it is a generalised Feistel network on Z_a x Z_b
    with a = ceil(sqrt(n)), b = ceil(n / a) and cycle walking (values >= n are sent through again): O(1) memory, any
    chunk at once.

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
    n = integer("permutation", "n", n, 1, MAX_SIZE, what="the number of elements")
    seed = _key("permutation", seed)
    last = start + (length - 1) * stride
    if start < 0 or length < 0 or stride < 1 or (length and last >= n):
        raise ValueError(
            f"permutation(n={n}, start={start}, length={length}, stride={stride}): positions must lie in [0, n)."
        )
    out = _empty(length, torch.device(device))
    torch.ops.samplewise.permutation(out, n, seed, start, stride)
    return out


def draw(weights: Tensor, k: int, seed: int) -> tuple[Tensor, float]:
    """Draw k items without replacement, one after the other with probability proportional to the weights left.

    Item i gets the key Exp(1)_i / w_i, its exponential variate a function of (seed, i) alone; the k smallest keys are
    drawn, ties going to the smaller id.

    Args:
        weights: float32 (N,), N in [1, 2^31]; items whose weight is not positive are drawn last of all. Scale them to
            a largest one near 1, so that keys do not overflow.
        k: number of items, in [0, N).
        seed: key; a 63-bit integer.

    Returns:
        ids int64 (k,), ascending, and tau, the smallest key that was not drawn: 1 / (1 - exp(-w_i tau)) is the inverse
        inclusion probability of item i, given the others' keys.

    Raises:
        TypeError: weights that are not float32.
        ValueError: weights of another shape, or k outside [0, N).
    """
    _check_float32("draw", "weights", weights)
    seed = _key("draw", seed)
    if weights.ndim != 1 or not 1 <= weights.numel() <= MAX_SIZE:
        raise ValueError(
            f"draw(weights=...): weights must have shape (N,), N in [1, 2^31], not {tuple(weights.shape)}."
        )
    out = _empty(integer("draw", "k", k, 0, weights.numel() - 1), weights.device)
    tau = torch.empty(1, dtype=torch.float32, device=weights.device)
    torch.ops.samplewise.draw(out, tau, weights.contiguous(), seed)
    return out, float(tau)


def _empty(length: int, device: torch.device) -> Tensor:
    """Int64 (length,): on the CPU from numpy, whose memory comes in huge pages, which torch's does not."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(length, dtype=np.int64))
    return torch.empty(length, dtype=torch.int64, device=device)


def histogram(values: Tensor, *, low: float | None = None, high: float | None = None, bins: int = 65_536) -> Histogram:
    """Count values in bins that keep their order, with exact sums: the same for any order of the values.

    The bins are equally wide in the integers that order float32 values (``x -> bits(x)``, negative ones mirrored), so
    that they are finest near 0 and, with 65,536 of them, never wider than 1/128 of the value, whatever the range. Each
    is ``2^shift`` such integers, the smallest power of two for which ``bins`` of them reach from ``low`` to ``high``.

    Args:
        values: float32 (M,), any stride; those that are not finite or in no bin are passed over.
        low: lies in the first bin; None takes the smallest finite value.
        high: lies in the last bin; None takes the largest finite value.
        bins: most bins, in [512, 2^24].

    Returns:
        The histogram, on the CPU: its counts and sums are a few hundred kilobytes.

    Raises:
        TypeError: values that are not float32.
        ValueError: values of another shape, none that is finite, low > high, or bins outside its range.
    """
    _check_float32("histogram", "values", values)
    if values.ndim != 1:
        raise ValueError(f"histogram(values=...): values must have shape (M,), not {tuple(values.shape)}.")
    bins = integer("histogram", "bins", bins, 1 << 9, 1 << 24)  # a bin never crosses a power of two
    if low is None or high is None:
        ends = finite_range(values)
        if ends is None:
            raise ValueError("histogram(values=...): there is no finite value.")
        smallest, largest = ends
        low, high = smallest if low is None else low, largest if high is None else high
    if not low <= high:
        raise ValueError(f"histogram(low={low}, high={high}): low must not be above high.")
    first, last = key_of(low), key_of(high)
    shift = 0
    while (last >> shift) - (first >> shift) >= bins:
        shift += 1
    first = first >> shift << shift
    counted = torch.empty((last - first >> shift) + 1, 2, dtype=torch.int64, device=values.device)
    torch.ops.samplewise.histogram(counted, values, first, shift)
    counts, offsets = counted.cpu().numpy().T
    return Histogram(counts, offsets, first, shift)


def order_statistics(values: Tensor, ranks: Sequence[int]) -> NDArray[np.float32]:
    """The values of the given ranks, exactly: many values from a histogram and one more for each rank, few sorted.

    Args:
        values: float32 (M,), any stride; those that are not finite are passed over.
        ranks: from 0, the smallest finite value, to the number of finite values less 1.

    Returns:
        float32 (len(ranks),).

    Raises:
        ValueError: for a rank outside its range, or as :func:`histogram`.
    """
    _check_float32("order_statistics", "values", values)
    if values.numel() <= _FEW:
        finite = np.sort(values[values.isfinite()].cpu().numpy())
        return finite[[integer("order_statistics", "rank", rank, 0, finite.size - 1) for rank in ranks]]
    return counted_order_statistics(histogram, values, ranks)


def counted_order_statistics(
    count: Callable[..., Histogram], values: Tensor, ranks: Sequence[int]
) -> NDArray[np.float32]:
    """As :func:`order_statistics`, from histograms alone: ``count`` makes them, with :func:`histogram`'s arguments."""
    coarse = count(values)
    found = []
    for rank in ranks:
        at, before = coarse.bin_of(integer("order_statistics", "rank", rank, 0, coarse.count - 1))
        fine = count(values, low=float(coarse.edges[at]), high=float(coarse.ends[at]))  # one key a bin
        found.append(fine.edges[fine.bin_of(rank - before)[0]])
    return np.array(found, dtype=np.float32)


def _key(owner: str, seed: int) -> int:
    return integer(owner, "seed", seed, 0, (1 << 63) - 1, what="a key, see samplewise.loaders.seeding.derive,")


def _check_float32(owner: str, name: str, values: Tensor) -> None:
    kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
    if kind != torch.float32:
        raise TypeError(f"{owner}({name}=...): {name} must be a float32 tensor, not {kind}; convert it first.")


def finite_range(values: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest finite one of float32 values (M,), None where none is."""
    low, high = (float(end) for end in values.aminmax()) if values.numel() else (inf, inf)
    if not (isfinite(low) and isfinite(high)):
        values = values[values.isfinite()]
        if values.numel() == 0:
            return None
        low, high = (float(end) for end in values.aminmax())
    return low, high
