"""Planning time of every method, and of the clustering in it against scikit-learn.

`--size` changes the number of samples (default: 1e6 and 1e7).
"""

import argparse
import resource

import numpy as np
import torch
from sklearn.cluster import KMeans
from timing import best_of, header, judged, table

from samplewise.cuda_ext import ops
from samplewise.loaders import PlannedSampler
from samplewise.plugins import RS2, InfoBatch, SeTa, Uniform, clustering


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


def plans(size: int) -> dict[str, float]:
    """Print the table of plans; seconds of each."""
    limit = {10**6: 0.2, 10**7: 2.0}.get(size)
    times, rows = {}, []
    for sampler in (
        Uniform(size),
        RS2(size, ratio=0.5),
        RS2(size, ratio=0.5, mode="hash"),
        InfoBatch(size, epochs=30),
        InfoBatch(size, epochs=30, quantiles=((0.2, 0.25), (0.85, 0.5))),
        SeTa(size, epochs=30),
        SeTa(size, epochs=30, revisit_every=5),
    ):
        options = next((o for o in ("quantiles", "revisit_every") if getattr(sampler, o, None)), "")
        name = f"{type(sampler).__name__} {options or getattr(sampler, 'mode', '')}".strip()
        times[name] = seconds = planned(sampler)
        first = best_of(lambda sampler=sampler: next(iter(sampler)), repeat=3)
        in_time = judged(seconds, "", digits=3, most=limit if name == "SeTa" else None)
        rows.append([name, in_time, f"{seconds / size * 1e9:.1f}", f"{first * 1e3:.1f}"])
    permuted = best_of(lambda: torch.randperm(size), repeat=2)
    rows.append(["torch.randperm(N)", f"{permuted:.3f}", f"{permuted / size * 1e9:.1f}", ""])
    table([f"plan, N = {size:,}", "s", "ns a sample", "ms to first id"], rows)
    return times


def clusters(size: int, seta: float) -> None:
    """``seta``: seconds of a SeTa plan, of which the clustering takes a share."""
    values = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
    cuts = clustering.kmeans_thresholds(values, 10)
    ours = best_of(lambda: clustering.kmeans_thresholds(values, 10), repeat=3)
    counting = best_of(lambda: ops.histogram(torch.from_numpy(values)), repeat=3)
    some = values[: 10**6].reshape(-1, 1)
    model = KMeans(10, n_init=1, random_state=0)
    theirs = best_of(lambda: model.fit(some), repeat=1) * size / len(some)
    labels = clustering.group_labels(some[:, 0], cuts)
    centres = np.array([some[labels == g].mean() for g in range(10)])
    inertia = float(np.square(some[:, 0] - centres[labels]).sum()) / model.inertia_
    rows = [
        ["bins + exact dynamic programme", f"{ours:.3f}", "1.0x", f"{ours / seta:.0%}", f"{inertia:.5f}"],
        ["  of it, the first histogram", f"{counting:.3f}", f"{counting / ours:.2f}x", f"{counting / seta:.0%}", ""],
        ["scikit-learn KMeans (1e6, scaled)", f"{theirs:.3f}", f"{theirs / ours:.0f}x", "", "1.00000"],
    ]
    table([f"10 clusters, N = {size:,}", "s", "ratio", "share of a SeTa plan", "inertia to KMeans"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, nargs="*", default=[1e6, 1e7])
    header("Planning")
    for size in map(int, parser.parse_args().size):
        clusters(size, seta=plans(size)["SeTa"])
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")


if __name__ == "__main__":
    main()
