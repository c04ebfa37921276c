"""Draws by weight, permutations and histograms, against numpy and torch.

`--size` changes the number of samples (default: 1e6, 1e7 and 1e8; the histograms end at 1e7).
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from timing import best_of, best_of_each, header, judged, peak_memory, table

from samplewise.cuda_ext import ops, reference
from samplewise.plugins import weights

CHUNK = 65_536
LARGE = 10**7  # above, the slow ones are left out or scaled
Calls = dict[str, Callable[[], object]]


def draws(size: int) -> None:
    """k = N/2 items without replacement, by weight."""
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=size).astype(np.float32)
    scores /= scores.max()
    tensor, k = torch.from_numpy(scores), size // 2
    out, tau = torch.empty(k, dtype=torch.int64), torch.empty(1)

    def by_numpy() -> None:
        keys = rng.standard_exponential(size, dtype=np.float32)
        keys /= scores
        np.flatnonzero(keys < np.partition(keys, k)[k])

    calls: Calls = {
        "ops.draw": lambda: ops.draw(tensor, k, 1),
        "numpy: exponential keys, partition": by_numpy,
        "weights.draw_without_replacement": lambda: weights.draw_without_replacement(scores, k, rng),
        "weights.subset (uniform)": lambda: weights.subset(size, k, rng),
        "reference": lambda: reference.draw(out, tau, tensor, 1),
    }
    if size <= LARGE:
        calls["weights.draw_systematic"] = lambda: weights.draw_systematic(scores, k, rng)
        calls["weights.draw_with_replacement"] = lambda: weights.draw_with_replacement(scores, k, rng)
    if size <= 2**24:
        calls["torch.multinomial"] = lambda: torch.multinomial(tensor, k)
    seconds = best_of_each(calls, repeat=3 if size <= LARGE else 2)
    # at most 1.3 times numpy's time, so at least 0.77 of ours
    least = {"numpy: exponential keys, partition": 0.77, "torch.multinomial": 7 if size == 10**7 else None}
    rows = []
    for name, s in seconds.items():
        ratio = judged(s / seconds["ops.draw"], least=least.get(name))
        rows.append([name, f"{s:.3f}", f"{s / size * 1e9:.1f}", ratio])
    if size > 2**24:
        rows.append(["torch.multinomial", "refuses more than 2^24", "", ""])
    table([f"draw k = N/2, N = {size:,}", "s", "ns a sample", "to ops.draw"], rows)


def permutations(size: int) -> None:
    """All N positions of a random permutation."""

    def in_chunks() -> None:
        for start in range(0, size, CHUNK):
            ops.permutation(size, 1, start, min(CHUNK, size - start))

    calls: Calls = {
        "torch.randperm": lambda: torch.randperm(size),
        "ops.permutation": lambda: ops.permutation(size, 1, 0, size),
        f"ops.permutation, in chunks of {CHUNK:,}": in_chunks,
    }
    megabytes = {name: peak_memory(call) for name, call in calls.items()}
    seconds = best_of_each(calls, repeat=3)
    out = torch.empty(min(size, LARGE), dtype=torch.int64)
    some = best_of(lambda: reference.permutation(out, size, 1, 0, 1), repeat=1)
    seconds["reference"] = some * size / out.numel()
    base = seconds["torch.randperm"]
    rows = []
    for name, s in seconds.items():
        least = 4 if size == 10**8 and name.startswith("ops") else None
        memory = f"{megabytes[name]:.1f}" if name in megabytes else ""
        rows.append([name, f"{s:.3f}", f"{s / size * 1e9:.1f}", judged(base / s, least=least), memory])
    table([f"permutation, N = {size:,}", "s", "ns a sample", "faster than randperm", "MB added at the peak"], rows)


def histograms(size: int) -> None:
    values = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
    tensor, middle = torch.from_numpy(values), size // 2
    binned = ops.histogram(tensor)
    bins = torch.empty(binned.counts.size, 2, dtype=torch.int64)
    histogram: Calls = {
        "ops.histogram, 65,536 bins": partial(ops.histogram, tensor),
        "reference": partial(reference.histogram, bins, tensor, binned.low, binned.shift),
        "np.histogram, 1,024 bins": partial(np.histogram, values, bins=1024),
        "torch.histc, 1,024 bins": partial(torch.histc, tensor, bins=1024),
    }
    median: Calls = {
        "ops.order_statistics, the median": partial(ops.order_statistics, tensor, [middle]),
        "np.partition, the median": partial(np.partition, values, middle),
        "torch.median": tensor.median,
        "np.sort": partial(np.sort, values),
    }
    seconds = best_of_each(histogram | median)
    rows = []
    for group in (histogram, median):
        ours = seconds[next(iter(group))]
        rows += [[n, f"{seconds[n]:.4f}", f"{seconds[n] / size * 1e9:.2f}", f"{seconds[n] / ours:.1f}x"] for n in group]
    table([f"histogram and median, N = {size:,}", "s", "ns a sample", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, nargs="*", default=[1e6, 1e7, 1e8])
    header("Draws, permutations and histograms")
    for size in map(int, parser.parse_args().size):
        draws(size)
        permutations(size)
        if size <= LARGE:
            histograms(size)


if __name__ == "__main__":
    main()
