"""What `observe` adds to a training step, against storing one float a sample and against taking the mean alone."""

from functools import partial

import torch
from timing import best_of, header, table

from samplewise.plugins import InfoBatch, Uniform

N = 1_000_000


def main() -> None:
    header(f"observe, N = {N:,} samples (microseconds a batch; ratio to one indexed store of a float a sample)")
    rows = []
    for batch in (64, 256, 4096):
        ids = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:batch]
        twice = torch.cat([ids[: batch // 2], ids[: batch // 2]])
        losses = torch.rand(batch, requires_grad=True)
        plain, weighted = Uniform(N), InfoBatch(N, epochs=10)
        weighted.observe(torch.arange(N), torch.rand(N))
        for sampler in (plain, weighted):
            sampler.set_epoch(1)
        store = torch.zeros(N)
        calls = {
            "losses.mean()": losses.mean,
            "store[ids] = losses": partial(store.__setitem__, ids, losses.detach()),
            "observe, no weights (mean included)": partial(plain.observe, ids, losses),
            "observe, with weights (mean included)": partial(weighted.observe, ids, losses),
            "observe, every id twice (mean included)": partial(plain.observe, twice, losses),
        }
        times = {name: best_of(call, number=max(20, 200_000 // batch // 20)) for name, call in calls.items()}
        mean, base = times["losses.mean()"], times["store[ids] = losses"]
        for name, seconds in times.items():
            added = seconds - mean if "observe" in name else seconds
            rows.append([name, f"{batch}", f"{seconds * 1e6:.1f}", f"{added * 1e6:.1f}", f"{seconds / base:.1f}x"])
    table(["call", "batch", "us", "us added to mean()", "ratio"], rows)


if __name__ == "__main__":
    main()
