"""Planning time of every method, of the draws and of the clustering, against torch, numpy and scikit-learn.

`--size` changes the number of samples (default: 1e6 and 1e7).
"""

import argparse
import resource

import numpy as np
import torch
from sklearn.cluster import KMeans
from timing import best_of, header, table

from samplewise.loaders import PlannedSampler
from samplewise.plugins import RS2, InfoBatch, SeTa, Uniform, clustering, weights


def planned(sampler: PlannedSampler) -> float:
    """Seconds to go to a new epoch, the plan's checks and weights included."""
    size = sampler.size
    losses = torch.from_numpy(np.random.default_rng(0).lognormal(size=size).astype(np.float32))
    for begin in range(0, size, 1_000_000):
        ids = torch.arange(begin, min(begin + 1_000_000, size))
        sampler.ledger.update(ids, losses[begin : begin + ids.numel()])
    times = []
    for epoch in range(1, 4):
        sampler.set_epoch(epoch)
        times.append(sampler.plan_seconds)
    return min(times)


def plans(size: int) -> None:
    limits = {"SeTa": {10**6: "0.2 s", 10**7: "2 s"}.get(size, "")}
    rows = []
    for sampler in (
        Uniform(size),
        RS2(size, ratio=0.5),
        RS2(size, ratio=0.5, mode="hash"),
        InfoBatch(size, epochs=30),
        InfoBatch(size, epochs=30, quantiles=((0.2, 0.25), (0.85, 0.5))),
        SeTa(size, epochs=30),
        SeTa(size, epochs=30, revisit_every=5),
    ):
        seconds = planned(sampler)
        first = best_of(lambda sampler=sampler: next(iter(sampler)), repeat=3)
        options = next((o for o in ("quantiles", "revisit_every") if getattr(sampler, o, None)), "")
        name = f"{type(sampler).__name__} {options or getattr(sampler, 'mode', '')}".strip()
        target = limits.get(name, "")
        rows.append([name, f"{seconds:.3f}", f"{seconds / size * 1e9:.1f}", f"{first * 1e3:.1f}", target])
    permuted = best_of(lambda: torch.randperm(size), repeat=2)
    rows.append(["torch.randperm(N)", f"{permuted:.3f}", f"{permuted / size * 1e9:.1f}", "", ""])
    table([f"plan, N = {size:,}", "s", "ns a sample", "ms to first id", "target"], rows)


def draws(size: int) -> None:
    scores = np.random.default_rng(0).lognormal(size=size)
    k, rng = size // 2, np.random.default_rng(1)
    p = scores / scores.sum()
    candidates = [
        ("weights.subset (uniform)", lambda: weights.subset(size, k, rng)),
        ("weights.draw_without_replacement", lambda: weights.draw_without_replacement(scores, k, rng)),
        ("weights.draw_systematic", lambda: weights.draw_systematic(scores, k, rng)),
        ("weights.draw_with_replacement", lambda: weights.draw_with_replacement(scores, k, rng)),
    ]
    if size <= 10**6:
        candidates.append(("numpy choice(p, replace=False)", lambda: rng.choice(size, k, replace=False, p=p)))
    if size <= 2**24:
        tensor = torch.from_numpy(scores)
        candidates.append(("torch.multinomial", lambda: torch.multinomial(tensor, k, replacement=False)))
    times = [(name, best_of(draw, repeat=2)) for name, draw in candidates]
    ours = times[1][1]
    rows = [[name, f"{s:.3f}", f"{s / size * 1e9:.1f}", f"{s / ours:.1f}x"] for name, s in times]
    table([f"draw k = N/2, N = {size:,}", "s", "ns a sample", "to without_replacement"], rows)


def clusters(size: int) -> None:
    values = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
    cuts = clustering.kmeans_thresholds(values, 10)
    ours = best_of(lambda: clustering.kmeans_thresholds(values, 10), repeat=3)
    some = values[: 10**6].reshape(-1, 1)
    model = KMeans(10, n_init=1, random_state=0)
    theirs = best_of(lambda: model.fit(some), repeat=1) * size / len(some)
    labels = np.searchsorted(cuts, values[: 10**6], side="right")
    centres = np.array([some[labels == g].mean() for g in range(10)])
    inertia = float(np.square(some[:, 0] - centres[labels]).sum())
    rows = [
        ["bins + exact dynamic programme", f"{ours:.3f}", "1.0x", f"{inertia / model.inertia_:.5f}"],
        ["scikit-learn KMeans (1e6, scaled)", f"{theirs:.3f}", f"{theirs / ours:.0f}x", "1.00000"],
    ]
    table([f"10 clusters, N = {size:,}", "s", "ratio", "inertia to KMeans"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, nargs="*", default=[1e6, 1e7])
    header("Planning")
    for size in map(int, parser.parse_args().size):
        plans(size)
        draws(size)
        clusters(size)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")


if __name__ == "__main__":
    main()
